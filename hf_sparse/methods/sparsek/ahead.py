"""Take decoding steps on the CPU with the bookkeeping of many steps done at once.

A score is frozen and not needed before its token leaves the window. So the inputs of new tokens are kept until
`STEPS` of them came and are scored together, and the slots of the next tokens are found in one go (`next_slots`). A
step writes a key, a value and a position, and attends. Whoever reads the scores in between, as copying and cropping
do, has them computed first (`SparseKCacheLayer.scores`).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsek.scorer import Scorer

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention
    from hf_sparse.methods.sparsek.cache import SparseKCacheLayer

STEPS = 32  # that are foreseen, or as many as the window has
_LEAST_WINDOW = 8  # of fewer steps the overhead is larger than the gain
_MOST_ROWS = 64  # rows times KV heads, each of which has a queue in Python


@dataclass
class Ahead:
    """Hold what is known of the next steps of a layer, and what is left to do for those that were.

    Attributes:
        scorer: gives the tokens their scores.
        slots: `[B, Hkv, n]` int64, of the next `n` tokens from the first one that was foreseen, as indices into all
            slots of a row.
        first: `[B]` int64, position of that token.
        is_full: whether no slot is empty.
        columns: `[B, Hkv, D]` for each step, the slots as an index of keys and values.
        keys, values, positions: of all slots of a row, `[B, N, D]` and `[B, N]`, in the memory of the cache layer.
        states: `[B, 1, C]` for each step that was, inputs of the attention module.
    """

    scorer: Scorer
    slots: Tensor
    first: Tensor
    is_full: bool
    columns: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    positions: Tensor
    states: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def write_scores(self, scores: Tensor) -> None:
        """Score the tokens that came and write to the scores of all slots."""
        if not self.states:
            return
        count = len(self.states)
        index = self.first[:, None] + torch.arange(count)
        new = self.scorer(torch.cat(self.states, 1), index)
        scores.view(len(scores), -1).scatter_(1, self.slots[..., :count].flatten(1), new.flatten(1))


def step_ahead(attention: "SparseKAttention", new: NewTokens, cache: "SparseKCacheLayer") -> Tensor | None:
    """Give the one new token of each row its slot, and attend to the slots; the token is scored later.

    Args:
        new: one token of each row.
        cache: takes in the tokens.

    Returns:
        `[B, Hq, 1, D]`; `None`, with nothing changed, if the step has to take another path: it is not on the CPU, or
        compiled, differentiated or padded, or a baseline chooses, or the cache is empty, of another adapter or for a
        single step.
    """
    query, key, value, hidden_states, valid, scaling = new
    is_plain = type(query) is Tensor and query.device.type == "cpu" and valid is None
    if not is_plain or torch.compiler.is_compiling() or torch.is_grad_enabled() or not attention.uses_scorer:
        return None
    name = attention.active
    if not cache.may_look_ahead or cache.empty or cache.soft or cache.owner != (attention.identities[name], None):
        return None
    if cache.window < _LEAST_WINDOW or key.shape[0] * key.shape[1] > _MOST_ROWS:
        return None
    scorer: Scorer = attention.sparsek_scorer[name]  # type: ignore[assignment]
    ahead = cache.ahead
    if ahead is None or len(ahead.states) == len(ahead.columns) or ahead.scorer is not scorer:
        ahead = _look_ahead(cache, scorer)
    step = len(ahead.states)
    column = ahead.columns[step]
    ahead.states.append(hidden_states.clone())
    ahead.keys.scatter_(1, column, key.squeeze(2))
    ahead.values.scatter_(1, column, value.squeeze(2))
    ahead.positions.scatter_(1, column[..., 0], cache.seen[:, None].expand(column.shape[:2]))
    cache.seen.add_(1)
    return cache.attend(query, scaling=scaling, is_full=ahead.is_full)


def _look_ahead(cache: "SparseKCacheLayer", scorer: Scorer) -> Ahead:
    """Find the slots of the next steps of a layer, all of whose tokens have scores then."""
    count = min(STEPS, cache.window)
    slots = cache.next_slots(count)
    columns = slots.unsqueeze(-1).expand(-1, -1, -1, cache.keys.shape[-1]).unbind(2)
    is_full = bool(cache.positions.min() >= 0)
    rows, dim = len(slots), cache.keys.shape[-1]
    flat = cache.keys.view(rows, -1, dim), cache.values.view(rows, -1, dim), cache.positions.view(rows, -1)
    cache.ahead = Ahead(scorer, slots, cache.seen.clone(), is_full, columns, *flat)
    return cache.ahead
