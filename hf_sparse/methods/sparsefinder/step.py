"""Take a decoding step eager on a GPU in few launches, with what does not change between steps decided once."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.cache import SparsefinderCacheLayer
from hf_sparse.ops.entmax.step import MOST_ROWS
from hf_sparse.ops.entmax.triton import takes_kernels

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention


def step_over_all_keys(
    attention: "SparsefinderAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    cache: SparsefinderCacheLayer,
    scaling: float,
) -> Tensor | None:
    """Attend with one causal query per text to all keys, and write the newest key and value where the cache keeps them.

    Args:
        query, key, value, valid, scaling: see `SparseAttentionLayer.attend`, for one token.

    Returns:
        `[B, Hq, 1, D]`, contiguous; `None`, with nothing changed, if the step has to take another path: it is being
        compiled or differentiated, or no kernel takes what came.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not takes_kernels(query, key, value):
        return None
    if query.shape[1] // key.shape[1] > MOST_ROWS or query.device.index != torch.cuda.current_device():
        return None
    from hf_sparse.ops.entmax.triton.step import step  # Triton is there only beside a CUDA device

    scales = attention.parameters_in_use.step_scales(query, scaling)
    newest = cache.newest
    if newest is not None and (newest[0].stride(3) != 1 or newest[1].stride(3) != 1):
        return None
    output = step(
        query, key, value, scales.scale, scales.exponent, scales.kind, scales.factor, scales.is_log, True, valid, None,
        None, 1, newest=newest,
    )  # fmt: skip
    cache.newest = None
    return output
