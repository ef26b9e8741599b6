"""Read a text from its beginning on in few launches, where that runs eager on a GPU with the scores of a scorer.

On short texts the host sets the pace. So what depends on the layout of the tensors alone is decided for the first layer
that has it, and the others compare: a model's layers have one layout.
"""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.methods.sparsek.cache import SparseKCacheLayer, lasting
from hf_sparse.methods.sparsek.scorer import SLOPE_TOKENS, LinearScorer
from hf_sparse.ops.triton import DTYPES, MOST_ROWS, installed

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention
    from hf_sparse.ops.triton.replay import Program

_TRITON = installed()
_MOST_SELECTED = 8192  # keys of a list that the kernels of the selection take


class _Reading(NamedTuple):
    """Hold the launches that read texts of one layout, of tensors at multiples of 16 bytes."""

    layout: Hashable
    program: "Program"


_latest: _Reading | None = None  # the layout that was read last


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
    if valid is not None or cache.is_initialized or not _TRITON or not _is_on_current_device(query):
        return None
    if attention.baseline is not None or attention.observer is not None or torch.is_grad_enabled():
        return None
    name = attention.active
    # The cache layer may be that of another adapter, or of a budget that was overridden since.
    if not cache.is_new and (
        cache.owner != (attention.identities[name], None) or attention.budget != (cache.k, cache.window, cache.sinks)
    ):
        return None
    scorer: Any = attention.sparsek_scorer[name]
    if not isinstance(scorer, LinearScorer) or torch.is_autocast_enabled("cuda"):
        return None
    inputs = (query, key, value, hidden_states, scorer.weight, scorer.slope)
    settings = (cache.k, cache.window, cache.sinks, scaling, scorer.position_slope)
    layout = (settings, *[None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in inputs])
    # Whoever asks for another address takes the path that looks at everything.
    is_aligned = not any([x.data_ptr() % 16 for x in inputs if x is not None])
    fits = key.shape[2] <= cache.slots
    latest = _latest
    if latest is not None and is_aligned and latest.layout == layout:
        with lasting():
            results = latest.program.run(inputs[1:] if fits else inputs)
        output, slots = (None, results) if fits else (results[0], results[1:])
    elif _takes(query, key, value, hidden_states, scorer, cache):
        output, slots = _read(inputs, settings, layout, is_aligned)
    else:
        return None
    cache.take(*slots)
    if output is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return output


def _read(
    inputs: tuple[Any, ...], settings: tuple[Any, ...], layout: Hashable, is_aligned: bool
) -> tuple[Tensor | None, Any]:
    """Return the output, `None` where all keys fit into the slots, and the slots; note the launches."""
    global _latest
    from hf_sparse.ops.selection.triton.reading import ReadingSettings, noted_reading, read_text

    *budget, scaling, position_slope = settings
    of_text = ReadingSettings(*budget, scaling, float(position_slope), SLOPE_TOKENS)
    with lasting():
        output, slots = read_text(*inputs, of_text)
    program = noted_reading(*inputs, of_text) if is_aligned else None
    if program is not None:
        _latest = _Reading(layout, program)
    return output, slots


def _is_on_current_device(query: Tensor) -> bool:
    """Tell whether a tensor is one of CUDA's current device, where Triton launches."""
    return query.is_cuda and type(query) is Tensor and query.device.index == torch.cuda.current_device()


def _takes(
    query: Tensor, key: Tensor, value: Tensor, states: Tensor, scorer: LinearScorer, cache: SparseKCacheLayer
) -> bool:
    """Tell whether the kernels take a text: devices, dtypes, sizes and layout."""
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
        and key.device == value.device == weight.device == query.device == states.device
        and (slope is None or (slope.device == query.device and slope.dtype in DTYPES))
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )
