"""Attend to whole texts of which nothing is kept, where no gradient is wanted and nothing else looks on.

On short texts the host sets the pace, and what serves training too asks for much that is of no use here: a text that
fits into the budget needs no scores at all, and of a longer one all launches are noted together.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.core.backbone_call import BackboneCall
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.reading import (
    Scoring,
    attend_to_all,
    can_be_noted,
    layout_of,
    most_selected,
    remember,
    scoring_of,
    settings_of,
    takes,
)
from hf_sparse.ops.triton import installed, is_on_gpu

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention
    from hf_sparse.ops.triton.replay import Program

_TRITON = installed()

_programs: dict[Hashable, "Program"] = {}  # by layout, for tensors at multiples of 16 bytes


class ReadyLayer(NamedTuple):
    """Hold what a layer attends with in a forward that keeps nothing.

    Attributes:
        fewest_slots: as many tokens are attended to in full.
        budget: what launches depend on of the budget of the layer, see `_launch_budget`.
        scoring: what its scorer computes with; `None` where no kernel knows it, or none is needed.
        table: where the table of heads that differ is, 0 without one.
    """

    fewest_slots: int
    budget: Budget
    scoring: Scoring | None
    table: int


@dataclass
class SharedLaunches:
    """Hold the launches that the layers of one forward have in common, while their tensors have the same layout.

    Attributes:
        layout: of tensors and scorer.
        programs: the launches, by what they depend on of the budget of a layer.
        memory: that they use; one layer after another does.
    """

    layout: Hashable
    programs: "dict[Budget, Program]" = field(default_factory=dict)
    memory: Tensor | None = None


def ready_layer(attention: "SparseKAttention", length: int) -> ReadyLayer | None:
    """Return what a layer attends to texts of a length with, without gradients and autocast.

    Returns:
        `None` where `attend_without_cache` has to ask for more, or takes no text.
    """
    if attention.training or not attention.causal or not attention.uses_scorer:
        return None
    budget = attention.budget
    fewest = budget.fewest_slots
    scoring = scoring_of(attention) if _TRITON and length > fewest else None
    if scoring is None or isinstance(budget.k, int):
        return ReadyLayer(fewest, budget, scoring, 0)
    return ReadyLayer(fewest, _launch_budget(budget), scoring, _address_of_counts(budget.k, scoring.weight.device))


def _launch_budget(budget: Budget) -> Budget:
    """Return what launches depend on of a budget: heads that differ select by a table, up to a number of keys."""
    return budget if isinstance(budget.k, int) else budget._replace(k=(most_selected(budget.k),))


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
    if ready is None or torch.is_grad_enabled() or type(query) is not Tensor:
        return None
    if key.shape[2] <= ready.fewest_slots:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    scoring = ready.scoring
    if scoring is None:
        return None
    bases = [query.data_ptr(), key.data_ptr(), value.data_ptr(), hidden_states.data_ptr()]
    if (bases[0] | bases[1] | bases[2] | bases[3]) % 16:
        return None
    layout = layout_of(query, key, value, hidden_states, scaling), scoring.layout
    shared: SharedLaunches | None = call.shared
    if shared is None or shared.layout != layout:
        shared = call.shared = SharedLaunches(layout)
    program = shared.programs.get(ready.budget)
    if program is None:
        program = _programs.get((*layout, ready.budget))
        if program is None:
            return None
        shared.programs[ready.budget] = program
        if shared.memory is None or len(shared.memory) < program.used:
            shared.memory = program.memory()
    bases += (*scoring.addresses, ready.table)
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
        return attend_to_all(new)
    if not _TRITON or type(query) is not Tensor or not is_on_gpu(query):
        return None
    scoring = scoring_of(attention)
    if scoring is None:
        return None
    launch_key = (layout_of(query, key, value, hidden_states, scaling), scoring.layout, _launch_budget(budget))
    is_noted = can_be_noted(new, scoring)
    program = _programs.get(launch_key) if is_noted else None
    if program is None:
        return _attend(new, scoring, budget, launch_key if is_noted else None)
    table = 0 if isinstance(budget.k, int) else _address_of_counts(budget.k, key.device)
    bases = [query.data_ptr(), key.data_ptr(), value.data_ptr(), hidden_states.data_ptr()]
    return program.launch([*bases, *scoring.addresses, table], program.memory())[0]


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
