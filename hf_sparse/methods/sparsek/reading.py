"""Read a text from its beginning on in few launches, where that runs eager on a GPU with the scores of a scorer.

On short texts the host sets the pace. So what depends on the layout of the tensors alone is looked up by it, and the
slots of all layers are allocated together (of long texts, those of all layers but the first).
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse.core.generation import Generation, is_announced
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsek.budget import Budget, Counts
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.first_calls import layers_like
from hf_sparse.methods.sparsek.fixed_memory import SharedSlots, fix_address, lasting
from hf_sparse.methods.sparsek.known_layer import LayerToRead, Scoring, known_scoring, layer_to_read
from hf_sparse.ops.causal_attention import are_launchable, attend_by_sdpa
from hf_sparse.ops.selection.thresholds import MOST_LISTED
from hf_sparse.ops.triton import DTYPES, MOST_ROWS, installed, is_on_gpu

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention
    from hf_sparse.ops.selection.triton.reading import ReadingSettings, Slots
    from hf_sparse.ops.triton.replay import Program

_TRITON = installed()
_MOST_PROGRAMS = 512  # of a dictionary; one has some kilobytes, and each layer may have its own for each length
_ROUNDING = 64  # of the most selected keys of a head, where heads differ: layers of about as many share a program

_programs: dict[Hashable, "Program"] = {}  # by layout, for tensors at multiples of 16 bytes


@dataclass
class SharedReading:
    """Hold what layers read with that one call of a model has not filled yet: launches, and memory for all of them.

    Attributes:
        first: the number among the layers of the call of the one that has the first slots.
        layout: of the tensors that the launches are for, see `layout_of`.
        layers: those that have slots here.
        slots: of all these layers.
        tables: for each of them the last addresses that its launches take: of tables of heads that differ, and of the
            number of tokens that is read in a recorded prompt; 0 for none.
        programs: for each of them its launches; `None` where none are known yet.
        memory: what the launches write to beside slots; one layer after another uses it.
    """

    first: int
    layout: Hashable
    layers: list[LayerToRead]
    slots: SharedSlots
    tables: list[tuple[int, int, int]]
    programs: "list[Program | None]"
    memory: Tensor | None = None

    def make_room(self, program: "Program | None") -> None:
        """Allocate memory for launches, unless there is enough."""
        if program is not None and program.used and (self.memory is None or len(self.memory) < program.used):
            with lasting():
                self.memory = program.memory()


def read_in_few_launches(
    attention: "SparseKAttention", new: NewTokens, cache: SparseKCacheLayer, generation: Generation | None = None
) -> Tensor | None:
    """Score the tokens of a text, attend, and fill a cache layer that holds nothing yet.

    A text that fits into the slots is attended to in full, see `ops.causal_attention`.

    Args:
        new: all tokens of each row.
        cache: takes in the tokens.
        generation: what was announced to this layer; then kernels of the other layers are compiled beside its own.

    Returns:
        `[B, Hq, T, D]`; `None`, with nothing changed, if the text has to take another path: there is padding, it is
        being compiled, recorded or differentiated, the cache was used before, or no kernel takes what came.
    """
    query, key, value, hidden_states, _, scaling = new
    if not _is_new_text(attention, new, cache):
        return None
    scoring = None if cache.call is None else cache.scoring
    if scoring is None:
        scoring = known_scoring(attention)
    if scoring is None:
        return None
    call = cache.call
    # Where layers share, one before has asked.
    if (call is None or call.shared is None) and not _may_read(attention, query, cache):
        return None
    layout = layout_of(query, key, value, hidden_states, scaling)
    is_noted = scoring.layout is not None and are_aligned(new)
    shared = _shared_reading(cache, key, layout, scoring) if is_noted else None
    output = None if shared is None else read_fast(query, key, value, hidden_states, cache, scaling, shared)
    if output is not None:
        return output
    if not takes(new, scoring, cache.k):
        return None
    if generation is not None:
        _compile_all(generation, new, scoring)
    output, slots = _read(new, scoring, cache, layout if is_noted else None)
    cache.take(*slots)
    return attend_by_sdpa(query, key, value, scaling) if output is None else output


def begin_reading(attention: "SparseKAttention", new: NewTokens, cache: SparseKCacheLayer) -> bool:
    """Look up what the layers of a call of the model share, at the first of them that reads.

    Args:
        new, cache: as in `read_in_few_launches`.

    Returns:
        False, with nothing changed, where `read_in_few_launches` has to ask for more, or launches are not known yet.
    """
    if is_announced() or not _is_new_text(attention, new, cache) or not _may_read(attention, new.query, cache):
        return False
    scoring = cache.scoring
    if scoring is None or scoring.layout is None:
        return False
    layout = layout_of(*new[:4], new.scaling)
    return _shared_reading(cache, new.key, layout, scoring) is not None


def _is_new_text(attention: "SparseKAttention", new: NewTokens, cache: SparseKCacheLayer) -> bool:
    """Tell whether a cache layer of this adapter, which holds nothing, is to be filled with whole rows."""
    if new.valid is not None or cache.is_initialized or not _TRITON:
        return False
    if type(new.query) is not Tensor or torch.is_grad_enabled() or not attention.uses_scorer:
        return False
    return cache.owner == (attention.identities[attention.active], None)  # an error may have ended an earlier call


def read_fast(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    cache: SparseKCacheLayer,
    scaling: float,
    shared: SharedReading | None = None,
) -> Tensor | None:
    """Read a text as `read_in_few_launches`, by launches that are known, as a layer before in the same call did.

    Nearly all stands in this one function: to Python a call costs as much as what it does here.

    Args:
        query, key, value, hidden_states, scaling: of all tokens of each row, without padding.
        cache: takes in the tokens.
        shared: what the layer reads with; by default what its call has.

    Returns:
        `[B, Hq, T, D]`; `None`, with nothing changed, where no layer before has read like this one.
    """
    if shared is None:
        call: Any = cache.call
        if call is None or call.shared is None:
            return None
        shared = call.shared
    if cache.is_initialized or torch.is_grad_enabled() or type(query) is not Tensor:
        return None
    number = cache.number_in_call - shared.first
    if not 0 <= number < len(shared.programs):
        return None
    program = shared.programs[number]
    if program is None or layout_of(query, key, value, hidden_states, scaling) != shared.layout:
        return None
    bases = [query.data_ptr(), key.data_ptr(), value.data_ptr(), hidden_states.data_ptr()]
    if (bases[0] | bases[1] | bases[2] | bases[3]) % 16:
        return None
    if not program.order:  # the launches fill the slots, read no query and return nothing
        del bases[0]
    scoring: Any = shared.layers[number].scoring
    bases += scoring.addresses
    bases += shared.slots.addresses(number)
    bases += shared.tables[number]
    results = program.launch(bases, shared.memory)
    cache.take_shared(shared.slots, number)
    if results:
        return results[0]
    return attend_by_sdpa(query, key, value, scaling)


def layout_of(query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor, scaling: float) -> Hashable:
    """Return what launches depend on of the tensors that a layer attends with, beside what its scorer has."""
    return (
        query.shape, query.stride(), query.dtype, query.device, key.shape, key.stride(), key.dtype, value.stride(),
        value.dtype, hidden_states.dtype, hidden_states.stride(), scaling,
    )  # fmt: skip


def are_aligned(new: NewTokens) -> bool:
    """Tell whether all inputs lie at multiples of 16 bytes, so that launches are noted."""
    query, key, value, hidden_states = new[:4]
    return not (query.data_ptr() | key.data_ptr() | value.data_ptr() | hidden_states.data_ptr()) % 16


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


def most_selected(k: Counts, fits: bool = False) -> int:
    """Return the selected keys of every head; where heads differ of the one that has most, rounded up.

    Args:
        k: of each head.
        fits: whether all keys of the text have slots: then what goes beyond the slots of a head takes no time, and
            rounding is to a power of 2.
    """
    if isinstance(k, int):
        return k
    most = max(k)
    return 1 << (most - 1).bit_length() if fits else -(-most // _ROUNDING) * _ROUNDING


def settings_of(budget: Budget, length: int, scaling: float, scoring: Scoring) -> "ReadingSettings":
    """Return what a text of so many tokens is read with."""
    from hf_sparse.ops.selection.triton.reading import ReadingSettings

    k, window, sinks = budget
    of_heads = None if isinstance(k, int) else k
    most = most_selected(k, length <= budget.fewest_slots)
    return ReadingSettings(most, window, sinks, scaling, scoring.slopes, of_heads)


def _compile_all(generation: Generation, new: NewTokens, scoring: Scoring) -> None:
    """Compile the kernels of all layers of a model for inputs like these, also those of a prompt that is recorded."""
    from hf_sparse.ops.selection.triton.reading import compile_readings

    heads, length = new.key.shape[1:3]
    budgets = {layer.budget for layer in layers_like(generation) if layer.num_key_value_heads == heads}
    kinds = [
        settings_of(budget, length, new.scaling, scoring)
        for budget in budgets
        if most_selected(budget.k) <= MOST_LISTED
    ]
    compile_readings(new.query, new.key, new.value, new.hidden_states, scoring.weight, scoring.slope, kinds)


@functools.lru_cache(maxsize=1024)
def _addresses_of_tables(k: Counts, counts: tuple[int, ...] | None, device: torch.device) -> tuple[int, int]:
    """Return where the tables of heads that differ are, which stay there for good; 0 for none."""
    if counts is None or isinstance(k, int):
        return 0, 0
    from hf_sparse.ops.selection.triton.reading import tables_of_heads

    of_keys, offsets = tables_of_heads(k, counts, device)
    return of_keys.data_ptr(), offsets.data_ptr()


def _shared_reading(cache: SparseKCacheLayer, key: Tensor, layout: Hashable, scoring: Scoring) -> SharedReading | None:
    """Return slots and launches for a layer, and for the next ones of its call of the model where it is the first.

    Args:
        cache: the layer, which holds nothing yet.
        key: `[B, Hkv, T, D]`, which it is going to read.
        layout: what `layout_of` returns of its tensors.
        scoring: what its scorer computes with.

    Returns:
        `None` if no launches are known for the layout.
    """
    from hf_sparse.ops.selection.triton.reading import places_of_slots

    call = cache.call
    batch, heads, length, dim = key.shape
    end = None if call is None else call.end
    own = layer_to_read(cache, scoring)
    program = _programs.get(_launch_key(layout, own, length, end))
    if program is None:
        return None
    shared: SharedReading | None = None if call is None else call.shared
    if shared is not None and shared.layout == layout:
        number = cache.number_in_call - shared.first
        if 0 <= number < len(shared.layers):  # its launches were noted by a layer after the first of these
            shared.programs[number] = program
            shared.make_room(program)
            return shared
    layers = [own]
    if call is not None and shared is None:
        others: list[LayerToRead] = call.kinds[cache.number_in_call + 1 :]
        # Layers may lie on several devices, which the layout of the scorer tells.
        if all([other.scoring and other.scoring.layout == scoring.layout for other in others]):
            layers += others
    counts = tuple([layer.counts or layer.budget.fewest_slots for layer in layers])
    slots = SharedSlots(places_of_slots(batch, heads, dim, key.dtype, counts), key.device)
    of_end = 0 if end is None else end.data_ptr()
    tables = [(*_addresses_of_tables(layer.budget.k, layer.counts, key.device), of_end) for layer in layers]
    found: dict[Budget, Program | None] = {own.budget: program}
    for layer in layers:
        if layer.budget not in found:
            found[layer.budget] = _programs.get(_launch_key(layout, layer, length, end))
    programs = [found[layer.budget] for layer in layers]
    made = SharedReading(cache.number_in_call, layout, layers, slots, tables, programs)
    for of_layer in found.values():
        made.make_room(of_layer)
    if call is not None and shared is None:
        call.shared = made
    return made


def _launch_key(layout: Hashable, layer: LayerToRead, length: int, end: Tensor | None) -> Hashable:
    """Return what the launches of a layer depend on; where heads differ, layers of about as many keys share them."""
    budget, k = layer.budget, layer.budget.k
    of_heads: Hashable = k
    if not isinstance(k, int):
        fits = length <= budget.fewest_slots
        of_heads = most_selected(k, fits), fits
    return layout, layer.scoring and layer.scoring.layout, of_heads, budget.window, budget.sinks, end is None


def _read(
    new: NewTokens, scoring: Scoring, cache: SparseKCacheLayer, layout: Hashable | None
) -> tuple[Tensor | None, "Slots"]:
    """Return the output, `None` where SDPA is to attend, and the slots; note the launches of the layout."""
    from hf_sparse.ops.selection.triton.reading import noted_reading, read_text

    inputs = new.query, new.key, new.value, new.hidden_states
    end = None if cache.call is None else cache.call.end
    layer = layer_to_read(cache, scoring)
    settings = settings_of(layer.budget, new.key.shape[2], new.scaling, scoring)
    with lasting():
        output, slots = read_text(*inputs, scoring.weight, scoring.slope, settings, end)
    for tensor in slots:
        fix_address(tensor)
    if layout is not None:
        program = noted_reading(*inputs, scoring.weight, scoring.slope, slots, settings, end)
        remember(_programs, _launch_key(layout, layer, new.key.shape[2], end), program)
    return output, slots


def takes(new: NewTokens, scoring: Scoring, k: Counts) -> bool:
    """Tell whether the kernels take a text: devices, dtypes, sizes and layout."""
    query, key, value, states, _, _ = new
    weight, slope = scoring.weight, scoring.slope
    return (
        are_launchable(query, key, value)
        and states.dtype in DTYPES
        and weight.dtype in DTYPES
        and key.shape[0] * key.shape[1] <= MOST_ROWS
        and most_selected(k) <= MOST_LISTED
        and states.is_contiguous()
        and weight.is_contiguous()
        and weight.device == query.device == states.device
        and (slope is None or (slope.device == query.device and slope.dtype in DTYPES))
    )
