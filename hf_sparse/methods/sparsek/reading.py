"""Read a text from its beginning on in few launches, where that runs eager on a GPU with the scores of a scorer.

On short texts the host sets the pace. So what depends on the layout of the tensors alone is looked up by it, and the
slots of all layers but the first are allocated together.
"""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.core.generation import Generation
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsek.budget import Budget, Counts
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.first_calls import layers_like
from hf_sparse.methods.sparsek.fixed_memory import SharedSlots, fix_address, lasting
from hf_sparse.methods.sparsek.scorer import LinearScorer
from hf_sparse.ops.selection.thresholds import MOST_LISTED
from hf_sparse.ops.triton import DTYPES, MOST_ROWS, installed, is_on_gpu

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention
    from hf_sparse.ops.selection.triton.reading import ReadingSettings, Slots
    from hf_sparse.ops.triton.replay import Program

_TRITON = installed()
_MOST_PROGRAMS = 64  # of a dictionary
_ROUNDING = 64  # of the most selected keys of a head, where heads differ: layers of about as many share a program

_programs: dict[Hashable, "Program"] = {}  # by layout, for tensors at multiples of 16 bytes


class Scoring(NamedTuple):
    """Hold what a linear scorer computes with.

    Attributes:
        weight, slope: its parameters.
        key: their addresses, the dtype of the weight and the slopes of the configuration: the rest follows from them.
        addresses: of weight and slope, 0 for none.
        layout: what launches depend on of them; `None` if an address is no multiple of 16 bytes.
    """

    weight: Tensor
    slope: Tensor | None
    key: tuple[Any, ...]
    addresses: tuple[int, int]
    layout: Hashable | None


@dataclass
class SharedReading:
    """Hold what layers read with that one call of a model has not filled yet: launches, and memory for all of them.

    Attributes:
        keys: what the keys of these layers have in common: rows, heads, size, dtype and device.
        slots: of all these layers.
        counts: for each of them the slots of a KV head, or of each of them.
        first: the number among the layers of the call of the one that has the first slots.
        layout: what the launches of the layer that read last were noted for.
        program: these launches.
        memory: what they write to beside slots; one layer after another uses it.
        others: program and memory of other layouts that layers had before, as where heads differ.
    """

    keys: tuple[Any, ...]
    slots: SharedSlots
    counts: Sequence[Any]
    first: int
    layout: Hashable
    program: "Program"
    memory: Tensor | None
    others: dict[Hashable, tuple["Program", Tensor | None]] = field(default_factory=dict)

    def number_of(self, cache: SparseKCacheLayer) -> int | None:
        """Return the number of the slots that are for a layer, which reads now; `None` if there are none."""
        call = cache.call
        number = -1 if call is None else call.begun - self.first
        is_there = 0 <= number < len(self.counts) and self.counts[number] == (cache.counts or cache.slots)
        return number if is_there else None

    def use(self, layout: Hashable, key: Tensor) -> bool:
        """Take the launches for another layout of tensors; tell whether there are any for keys like these."""
        found = self.others.get(layout)
        if found is None:
            program = _programs.get(layout)
            if program is None or self.keys != _keys_layout(key):
                return False
            with lasting():
                found = program, program.memory()
        self.others[self.layout] = self.program, self.memory
        self.layout, (self.program, self.memory) = layout, found
        return True


def _keys_layout(key: Tensor) -> tuple[Any, ...]:
    """Return what keys of layers have in common that share slots: rows, heads, size, dtype and device."""
    batch, heads, _, dim = key.shape
    return batch, heads, dim, key.dtype, key.device


def scoring_of(attention: "SparseKAttention") -> Scoring | None:
    """Return what the scorer in use computes with; `None` if its scores are not linear, or it is not on a GPU."""
    scorers: Any = attention._modules["sparsek_scorer"]  # not by `nn.Module.__getattr__`, which is slow
    scorer = scorers._modules[attention.active]
    weight, slope = scorer._parameters.get("weight"), scorer._parameters.get("slope")
    if weight is None or not isinstance(scorer, LinearScorer) or not weight.is_cuda:
        return None
    key = (weight.data_ptr(), weight.dtype, 0 if slope is None else slope.data_ptr(), scorer.slopes)
    known = attention.scoring
    if known is None or known.weight is not weight or known.slope is not slope or known.key != key:
        of_slope = None if slope is None else (slope.dtype, slope.device)
        layout = (weight.shape, weight.stride(), weight.dtype, weight.device, of_slope, scorer.slopes)
        is_aligned = (key[0] | key[2]) % 16 == 0
        known = attention.scoring = Scoring(weight, slope, key, (key[0], key[2]), layout if is_aligned else None)
    return known


def read_in_few_launches(
    attention: "SparseKAttention", new: NewTokens, cache: SparseKCacheLayer, generation: Generation | None = None
) -> Tensor | None:
    """Score the tokens of a text, attend, and fill a cache layer that holds nothing yet.

    A text that fits into the slots is attended to by the kernel of the base model, with the same result.

    Args:
        new: all tokens of each row.
        cache: takes in the tokens.
        generation: what was announced to this layer; then kernels of the other layers are compiled beside its own.

    Returns:
        `[B, Hq, T, D]`; `None`, with nothing changed, if the text has to take another path: there is padding, it is
        being compiled, recorded or differentiated, the cache was used before, or no kernel takes what came.
    """
    query, key, value, hidden_states, valid, scaling = new
    if valid is not None or cache.is_initialized or not _TRITON or type(query) is not Tensor or torch.is_grad_enabled():
        return None
    if not attention.uses_scorer:
        return None
    if cache.owner != (attention.identities[attention.active], None):  # an error may have ended an earlier call
        return None
    scoring = scoring_of(attention) if cache.scoring is None else cache.scoring
    if scoring is None:
        return None
    call = cache.call
    end = None if call is None else call.end
    counts = None if cache.counts is None else (most_selected(cache.k), key.shape[2] <= cache.slots)
    layout = (
        query.shape, query.stride(), query.dtype, query.device, key.shape, key.stride(), key.dtype, value.stride(),
        value.dtype, hidden_states.dtype, hidden_states.stride(), scaling, scoring.layout,
        cache.k if counts is None else counts, cache.window, cache.sinks, end is None,
    )  # fmt: skip
    addresses = aligned_addresses(new, scoring)
    # Where layers share, one before has asked.
    if (call is None or call.shared is None) and not _may_read(attention, query, cache):
        return None
    found = shared_reading(cache, key, layout) if addresses else None
    if found is not None and addresses:
        shared, number = found
        of_slots = shared.slots.addresses(number)
        if not shared.program.order:  # all keys fit: the launches read no query and return nothing
            del addresses[0]
        of_heads: Any = cache.k
        tables = (0, 0) if cache.counts is None else _addresses_of_tables(of_heads, cache.counts, key.device)
        bases = [*addresses, *scoring.addresses, *of_slots, *tables, 0 if end is None else end.data_ptr()]
        results = shared.program.launch(bases, shared.memory)
        output = results[0] if results else None
        cache.take_shared(shared.slots, number)
    elif takes(new, scoring, cache.k):
        if generation is not None:
            _compile_all(generation, new, scoring)
        output, slots = _read(new, scoring, cache, end, layout if addresses else None)
        cache.take(*slots)
    else:
        return None
    return attend_to_all(new) if output is None else output


def read_fast(
    query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor, cache: SparseKCacheLayer, scaling: float
) -> Tensor | None:
    """Read a text as `read_in_few_launches`, by launches that are known, as a layer before in the same call did.

    Nearly all stands in this one function: to Python a call costs as much as what it does here.

    Args:
        query, key, value, hidden_states, scaling: of all tokens of each row, without padding.
        cache: takes in the tokens.

    Returns:
        `[B, Hq, T, D]`; `None`, with nothing changed, where no layer before has read like this one.
    """
    call, scoring = cache.call, cache.scoring
    shared: Any = None if call is None else call.shared
    if call is None or shared is None or scoring is None or cache.is_initialized:
        return None
    if torch.is_grad_enabled() or type(query) is not Tensor:
        return None
    number, counts = call.begun - shared.first, cache.counts
    if not 0 <= number < len(shared.counts) or shared.counts[number] != (counts or cache.slots):
        return None
    k: Any = cache.k if counts is None else (most_selected(cache.k), key.shape[2] <= cache.slots)
    # As in `read_in_few_launches`.
    layout = (
        query.shape, query.stride(), query.dtype, query.device, key.shape, key.stride(), key.dtype, value.stride(),
        value.dtype, hidden_states.dtype, hidden_states.stride(), scaling, scoring.layout, k, cache.window,
        cache.sinks, call.end is None,
    )  # fmt: skip
    of_key, of_value, of_states = key.data_ptr(), value.data_ptr(), hidden_states.data_ptr()
    if (query.data_ptr() | of_key | of_value | of_states) % 16:
        return None
    if layout != shared.layout and not shared.use(layout, key):
        return None
    program = shared.program
    # Where all keys fit into the slots, the launches fill these and return nothing: they read no query.
    bases = [query.data_ptr()] if program.order else []
    bases += (of_key, of_value, of_states, *scoring.addresses, *shared.slots.addresses(number))
    of_heads: Any = cache.k
    bases += (0, 0) if counts is None else _addresses_of_tables(of_heads, counts, key.device)
    bases.append(0 if call.end is None else call.end.data_ptr())
    results = program.launch(bases, shared.memory)
    cache.take_shared(shared.slots, number)
    if results:
        return results[0]
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)


def attend_to_all(new: NewTokens) -> Tensor:
    """Attend to all keys up to the query by the kernel of the base model, `[B, Hq, T, D]`."""
    query, key, value = new[:3]
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=new.scaling, enable_gqa=grouped)


def aligned_addresses(new: NewTokens, scoring: Scoring) -> list[int] | None:
    """Return the addresses of query, key, value and hidden states; `None` unless all inputs allow noted launches.

    These are for tensors at multiples of 16 bytes, the weights of the scorer among them.
    """
    query, key, value, hidden_states = new[:4]
    addresses = [query.data_ptr(), key.data_ptr(), value.data_ptr(), hidden_states.data_ptr()]
    is_aligned = not (addresses[0] | addresses[1] | addresses[2] | addresses[3]) % 16
    return addresses if is_aligned and scoring.layout is not None else None


def remember(programs: "dict[Hashable, Program]", layout: Hashable, program: "Program | None") -> None:
    """Keep the launches of a layout in place of the oldest ones; `None` is not kept."""
    if program is not None:
        if len(programs) >= _MOST_PROGRAMS:
            programs.pop(next(iter(programs)), None)
        programs[layout] = program


def _may_read(attention: "SparseKAttention", query: Tensor, cache: SparseKCacheLayer) -> bool:
    """Tell whether a text is read on a GPU, in its own dtype, with the budget of the cache layer."""
    if not is_on_gpu(query) or torch.is_autocast_enabled("cuda"):
        return False
    # Without a call the budget may have been overridden since the layer was made.
    return cache.call is not None or attention.budget == (cache.k, cache.window, cache.sinks)


def most_selected(k: Counts) -> int:
    """Return the selected keys of every head; where heads differ of the one that has most, or somewhat more."""
    return k if isinstance(k, int) else -(-max(k) // _ROUNDING) * _ROUNDING


def settings_of(budget: Budget, scaling: float, scoring: Scoring) -> "ReadingSettings":
    """Return what a text is read with."""
    from hf_sparse.ops.selection.triton.reading import ReadingSettings

    k, window, sinks = budget
    of_heads = None if isinstance(k, int) else k
    return ReadingSettings(most_selected(k), window, sinks, scaling, scoring.key[3], of_heads)


def _compile_all(generation: Generation, new: NewTokens, scoring: Scoring) -> None:
    """Compile the kernels of all layers of a model for inputs like these, also those of a prompt that is recorded."""
    from hf_sparse.ops.selection.triton.reading import compile_readings

    heads = new.key.shape[1]
    budgets = {layer.budget for layer in layers_like(generation) if layer.num_key_value_heads == heads}
    kinds = [settings_of(budget, new.scaling, scoring) for budget in budgets if most_selected(budget.k) <= MOST_LISTED]
    compile_readings(new.query, new.key, new.value, new.hidden_states, scoring.weight, scoring.slope, kinds)


@functools.lru_cache(maxsize=1024)
def _addresses_of_tables(k: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> tuple[int, int]:
    """Return where the tables of heads that differ are, which stay there for good."""
    from hf_sparse.ops.selection.triton.reading import tables_of_heads

    of_keys, offsets = tables_of_heads(k, counts, device)
    return of_keys.data_ptr(), offsets.data_ptr()


def shared_reading(cache: SparseKCacheLayer, key: Tensor, layout: Hashable) -> tuple[SharedReading, int] | None:
    """Return slots and launches for a layer, and for the next ones of its call of the model.

    Args:
        cache: the layer, which holds nothing yet.
        key: `[B, Hkv, T, D]`, of the kind that the slots hold.
        layout: what launches depend on.

    Returns:
        With the number that the layer has there; `None` if no launches are known for the layout.
    """
    call = cache.call
    shared: Any = None if call is None else call.shared
    number = None if shared is None else shared.number_of(cache)
    if number is not None and (shared.layout == layout or shared.use(layout, key)):
        return shared, number
    program = _programs.get(layout)
    if program is None:
        return None
    batch, heads, dim, _, _ = keys = _keys_layout(key)
    from hf_sparse.ops.selection.triton.reading import places_of_slots

    own = cache.counts or cache.slots
    first, counts = 0, (own,)
    if call is not None and shared is None:
        first, kinds = call.begun, call.kinds[call.begun :]
        # A layer may come out of turn, and layers may lie on several devices, which the scoring tells.
        if kinds and own == kinds[0][0] and all([scoring == kinds[0][1] for _, scoring in kinds]):
            counts = tuple([count for count, _ in kinds])
    slots = SharedSlots(places_of_slots(batch, heads, dim, key.dtype, counts), key.device)
    with lasting():
        made = SharedReading(keys, slots, counts, first, layout, program, program.memory())
    if call is not None and shared is None:
        call.shared = made
    return made, 0


def _read(
    new: NewTokens, scoring: Scoring, cache: SparseKCacheLayer, end: Tensor | None, layout: Hashable | None
) -> tuple[Tensor | None, "Slots"]:
    """Return the output, `None` where all keys fit into the slots, and the slots; note the launches of the layout."""
    from hf_sparse.ops.selection.triton.reading import noted_reading, read_text

    inputs = new.query, new.key, new.value, new.hidden_states
    settings = settings_of(Budget(cache.k, cache.window, cache.sinks), new.scaling, scoring)
    with lasting():
        output, slots = read_text(*inputs, scoring.weight, scoring.slope, settings, end)
    for tensor in slots:
        fix_address(tensor)
    if layout is not None:
        program = noted_reading(*inputs, scoring.weight, scoring.slope, slots, settings, end)
        remember(_programs, layout, program)
    return output, slots


def takes(new: NewTokens, scoring: Scoring, k: Counts) -> bool:
    """Tell whether the kernels take a text: devices, dtypes, sizes and layout."""
    query, key, value, states, _, _ = new
    weight, slope, dtype = scoring.weight, scoring.slope, query.dtype
    return (
        dtype in DTYPES
        and dtype == key.dtype == value.dtype
        and states.dtype in DTYPES
        and weight.dtype in DTYPES
        and query.shape[-1] == value.shape[-1] <= 256
        and key.shape[0] * key.shape[1] <= MOST_ROWS
        and most_selected(k) <= MOST_LISTED
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and states.is_contiguous()
        and weight.is_contiguous()
        and key.device == value.device == weight.device == query.device == states.device
        and (slope is None or (slope.device == query.device and slope.dtype in DTYPES))
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )
