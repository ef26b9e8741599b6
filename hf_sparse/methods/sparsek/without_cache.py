"""Attend to whole texts of which nothing is kept, where no gradient is wanted and nothing else looks on.

On short texts the host sets the pace, and what serves training too asks for much that is of no use here: a text that
fits into the budget needs no scores at all, and all launches are noted together.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_sparse.core.backbone_call import BackboneCall
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.known_layer import Scoring, known_scoring
from hf_sparse.methods.sparsek.reading import (
    are_aligned,
    layout_of,
    most_selected,
    remember,
    settings_of,
    takes,
)
from hf_sparse.ops.causal_attention import attend_by_sdpa, takes_kernel
from hf_sparse.ops.triton import installed, is_on_gpu

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention
    from hf_sparse.ops.triton.replay import Program

_TRITON = installed()

_programs: dict[Hashable, "Program"] = {}  # by layout, for tensors at multiples of 16 bytes


class ReadyLayer(NamedTuple):
    """Hold what a layer attends with in a forward that keeps nothing.

    Attributes:
        length: tokens of the texts that it is ready for.
        launches: what its launches depend on beside the layout of the tensors, see `_launches_of`; `None` where all
            keys are attended to.
        addresses: those that the launches take after the inputs; none where all keys are attended to.
    """

    length: int
    launches: Hashable
    addresses: tuple[int, ...]


@dataclass
class SharedLaunches:
    """Hold the launches that the layers of one forward have in common, while their tensors have the same layout.

    Attributes:
        layout: of the tensors.
        programs: the launches, by what they depend on of a layer; `None` where SDPA is to attend to all keys.
        memory: that they use; one layer after another does.
    """

    layout: Hashable
    programs: "dict[Hashable, Program | None]" = field(default_factory=dict)
    memory: Tensor | None = None


def ready_layer(attention: "SparseKAttention", length: int) -> ReadyLayer | None:
    """Return what a layer attends to texts of a length with, without gradients and autocast.

    Returns:
        `None` where `attend_without_cache` has to ask for more, or takes no text.
    """
    if attention.training or not attention.causal or not attention.uses_scorer:
        return None
    budget = attention.budget
    if length <= budget.fewest_slots:
        return ReadyLayer(length, None, ())
    scoring = known_scoring(attention) if _TRITON else None
    if scoring is None or scoring.layout is None:
        return None
    table = 0 if isinstance(budget.k, int) else _address_of_counts(budget.k, scoring.weight.device)
    return ReadyLayer(length, _launches_of(budget, scoring), (*scoring.addresses, table))


def _launches_of(budget: Budget, scoring: Scoring) -> Hashable:
    """Return what launches depend on of a layer: heads that differ select by a table, up to a number of keys."""
    of_budget = budget if isinstance(budget.k, int) else budget._replace(k=(most_selected(budget.k),))
    return scoring.layout, of_budget


def attend_fast_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    ready: ReadyLayer | None,
    call: BackboneCall,
    scaling: float,
) -> Tensor | None:
    """Attend as `attend_without_cache`, by launches that are known, in one function: to Python calls are slow.

    Args:
        query, key, value, hidden_states, scaling: of all tokens of each row, without padding.
        ready: of the layer.
        call: the forward.

    Returns:
        `[B, Hq, T, D]`; `None` where `attend_without_cache` has to do it.
    """
    if ready is None or key.shape[2] != ready.length or torch.is_grad_enabled() or type(query) is not Tensor:
        return None
    launches = ready.launches
    layout = layout_of(query, key, value, hidden_states, scaling)
    shared: SharedLaunches | None = call.shared
    if shared is None or shared.layout != layout:
        shared = call.shared = SharedLaunches(layout)
    if launches in shared.programs:
        program = shared.programs[launches]
    else:
        program = _programs.get((layout, launches)) if is_on_gpu(query) else None
        if program is None and (launches is not None or takes_kernel(query, key, value)):
            return None
        shared.programs[launches] = program
        if program is not None and (shared.memory is None or len(shared.memory) < program.used):
            shared.memory = program.memory()
    if program is None:
        return attend_by_sdpa(query, key, value, scaling)
    bases = [query.data_ptr(), key.data_ptr(), value.data_ptr(), hidden_states.data_ptr()]
    if (bases[0] | bases[1] | bases[2] | bases[3]) % 16:
        return None
    if launches is None:  # all keys are attended to, and nothing is scored
        del bases[3]
    bases += ready.addresses
    return program.launch(bases, shared.memory)[0]


def attend_without_cache(attention: "SparseKAttention", new: NewTokens) -> Tensor | None:
    """Attend to texts from their beginning on, in `eval` mode and in causal order.

    Returns:
        `[B, Hq, T, D]`; `None` if the texts have to take another path: there is padding, they are compiled or
        differentiated, under autocast, or for a baseline or an observer, or no kernel takes what came.
    """
    query, key, value, hidden_states, valid, scaling = new
    if valid is not None or attention.training or not attention.causal or torch.is_grad_enabled():
        return None
    if (
        not attention.uses_scorer
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cuda" if query.is_cuda else "cpu")
    ):
        return None
    budget = attention.budget
    if key.shape[2] <= budget.fewest_slots:
        return _attend_to_all(new)
    if not _TRITON or type(query) is not Tensor or not is_on_gpu(query):
        return None
    scoring = known_scoring(attention)
    if scoring is None:
        return None
    is_noted = scoring.layout is not None and are_aligned(new)
    launch_key = (layout_of(query, key, value, hidden_states, scaling), _launches_of(budget, scoring))
    program = _programs.get(launch_key) if is_noted else None
    if program is None:
        return _attend(new, scoring, budget, launch_key if is_noted else None)
    table = 0 if isinstance(budget.k, int) else _address_of_counts(budget.k, key.device)
    bases = [query.data_ptr(), key.data_ptr(), value.data_ptr(), hidden_states.data_ptr()]
    return program.launch([*bases, *scoring.addresses, table], program.memory())[0]


def _attend_to_all(new: NewTokens) -> Tensor | None:
    """Attend to all keys up to the query; the launch of the kernel for short texts is noted, if that takes them."""
    query, key, value, hidden_states, _, scaling = new
    if not takes_kernel(query, key, value):
        return attend_by_sdpa(query, key, value, scaling)
    layout = layout_of(query, key, value, hidden_states, scaling)
    is_noted = are_aligned(new)
    program = _programs.get((layout, None)) if is_noted else None
    if program is not None:
        return program.launch([query.data_ptr(), key.data_ptr(), value.data_ptr()], program.memory())[0]
    from hf_sparse.ops.triton.causal_attention import attend, noted_attention

    output = attend(query, key, value, scaling)
    if is_noted:
        remember(_programs, (layout, None), noted_attention(query, key, value, scaling))
    return output


@functools.lru_cache(maxsize=1024)
def _address_of_counts(k: tuple[int, ...], device: torch.device) -> int:
    """Return where the table of heads that differ is, which stays there for good."""
    from hf_sparse.ops.selection.triton.reading import counts_of_heads

    return counts_of_heads(k, device).data_ptr()


def _attend(new: NewTokens, scoring: Scoring, budget: Budget, launch_key: Hashable | None) -> Tensor | None:
    """Return the output, `None` if no kernel takes what came; note the launches under a key."""
    if not takes(new, scoring, budget.k):
        return None
    from hf_sparse.ops.selection.triton.reading import attend_text, noted_attention

    inputs = new.query, new.key, new.value, new.hidden_states, scoring.weight, scoring.slope
    settings = settings_of(budget, new.key.shape[2], new.scaling, scoring)
    output = attend_text(*inputs, settings)
    if launch_key is not None:
        remember(_programs, launch_key, noted_attention(*inputs, settings))
    return output
