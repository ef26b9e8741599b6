"""Read a text from its beginning on in few launches, where that runs eager on a GPU with the scores of a scorer."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.methods.sparsek.cache import SparseKCacheLayer, lasting
from hf_sparse.methods.sparsek.ragged_cache import RaggedCacheLayer
from hf_sparse.methods.sparsek.scorer import SLOPE_TOKENS, LinearScorer
from hf_sparse.ops.triton import DTYPES, MOST_ROWS, installed

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention

_TRITON = installed()
_MOST_SELECTED = 8192  # keys of a list that the kernels of the selection take


def read_in_few_launches(
    attention: "SparseKAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    valid: Tensor | None,
    cache: SparseKCacheLayer,
    scaling: float,
) -> Tensor | None:
    """Score the tokens of a text, attend, and fill a cache layer that holds nothing yet.

    A text that fits into the slots is attended to by the kernel of the base model, with the same result.

    Args:
        query, key, value, hidden_states, valid, scaling: see `SparseAttentionLayer.attend`.

    Returns:
        `[B, Hq, T, D]`; `None`, with nothing changed, if the text has to take another path: there is padding, it is
        being compiled, recorded or differentiated, the cache was used before, or no kernel takes what came.
    """
    if valid is not None or cache.is_initialized or not _TRITON or type(query) is not Tensor or not query.is_cuda:
        return None
    if attention.baseline is not None or attention.observer is not None or torch.is_grad_enabled():
        return None
    name = attention.active
    # The cache layer may be that of another adapter, or of a budget that was overridden since.
    if isinstance(cache, RaggedCacheLayer):
        return None  # one list of keys for all heads: `SparseKAttention` calls the kernels head by head
    if cache.owner != (attention.identities[name], None) or attention.budget != (cache.k, cache.window, cache.sinks):
        return None
    scorer: Any = attention.sparsek_scorer[name]
    if not isinstance(scorer, LinearScorer) or not _takes(query, key, value, hidden_states, scorer, cache):
        return None
    from hf_sparse.ops.selection.triton.reading import ReadingSettings, read_text

    settings = ReadingSettings(cache.k, cache.window, cache.sinks, scaling, float(scorer.position_slope), SLOPE_TOKENS)
    with lasting():
        output, slots = read_text(query, key, value, hidden_states, scorer.weight, scorer.slope, settings)
    cache.take(*slots)
    if output is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return output


def _takes(
    query: Tensor, key: Tensor, value: Tensor, states: Tensor, scorer: LinearScorer, cache: SparseKCacheLayer
) -> bool:
    """Tell whether the kernels take a text: device, dtypes, sizes and layout, and that nothing is recorded."""
    weight, slope, dtype = scorer.weight, scorer.slope, query.dtype
    return (
        dtype in DTYPES
        and dtype == key.dtype == value.dtype
        and states.dtype in DTYPES
        and weight.dtype in DTYPES
        and query.shape[-1] == value.shape[-1] <= 256
        and key.shape[0] * key.shape[1] <= MOST_ROWS
        and cache.k <= _MOST_SELECTED
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and states.is_contiguous()
        and weight.is_contiguous()
        and weight.device == query.device == states.device
        and (slope is None or (slope.device == query.device and slope.dtype in DTYPES))
        and query.device.index == torch.cuda.current_device()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and not torch.is_autocast_enabled("cuda")
    )
