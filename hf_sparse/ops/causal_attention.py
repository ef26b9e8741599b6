"""Attend to all keys up to the query: dense causal attention of whole texts.

Where attention is a small part of a forward, the host sets the pace, and to it a launch that is known
(`ops.triton.replay`) costs a fraction of a call of SDPA, whose kernels are faster on the GPU. So there is a kernel for
short texts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.triton import DTYPES, MOST_ROWS, installed, is_on_gpu

_TRITON = installed()
_MOST_PRODUCTS = 1 << 31  # of numbers of queries and keys; measured on an H200, see docs/speed.md


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """Compute causal softmax attention of texts without padding.

    Args:
        query: `[B, Hq, T, D]`, positions applied.
        key, value: `[B, Hkv, T, D]` of the same tokens; Hkv divides Hq.
        scaling: multiplies the logits.

    Returns:
        `[B, Hq, T, D]`.
    """
    if takes_kernel(query, key, value):
        from hf_sparse.ops.triton.causal_attention import attend

        return attend(query, key, value, scaling)
    return attend_by_sdpa(query, key, value, scaling)


def attend_by_sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Compute what `causal_attention` does by the kernel of the base model."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)


def takes_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether texts are attended to by the kernel for short ones: without gradients, on a GPU, not recorded."""
    return (
        _TRITON
        and is_short(query)
        and type(query) is Tensor
        and not torch.is_grad_enabled()
        and is_on_gpu(query)
        and are_launchable(query, key, value)
    )


def is_short(query: Tensor) -> bool:
    """Tell whether texts with queries `[B, Hq, T, D]` are so short that the host sets the pace of their attention."""
    return query.numel() * query.shape[2] <= _MOST_PRODUCTS


def are_launchable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether kernels may be launched now for queries, keys and values on a GPU, by dtypes, sizes and layout."""
    return (
        query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= 256
        and max(query.shape[:2]) <= MOST_ROWS
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and key.device == value.device == query.device
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )
