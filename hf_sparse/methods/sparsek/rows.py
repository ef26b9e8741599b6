"""Keep the KV slots of many requests in the rows of a pool, as an engine that serves them needs it.

A forward gathers the rows of its requests into a cache layer, runs the attention of the module as it is, and writes the
rows back. What the rows of others hold is never read. On a GPU a decoding step finds its rows in the pool itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse.core.request_state import StateTensor
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.settings import WHOLE_PROMPT
from hf_sparse.methods.sparsek.step import step_in_rows

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention


def request_state(attention: "SparseKAttention", head_dim: int, dtype: torch.dtype) -> tuple[StateTensor, ...]:
    """Describe the tensors that a row of the pool consists of; see `SparseKCacheLayer` for what they hold.

    Args:
        head_dim: size of a key or value of one head.
        dtype: of keys and values.

    Raises:
        UnsupportedModelError: the whole prompt is pinned.
    """
    if attention.config.pin_prompt == WHOLE_PROMPT:
        raise UnsupportedModelError(
            f"an adapter that pins the whole prompt (pin_prompt={WHOLE_PROMPT}) cannot be served, for prompts come in "
            "pieces: pin a number of tokens"
        )
    budget = attention.budget
    table: tuple[int, ...] = (attention.num_key_value_heads, budget.slots)
    if not isinstance(budget.k, int):  # see `RaggedCacheLayer`
        table = (sum(budget.of_head(head).slots for head in range(len(budget.k))),)
    return (
        StateTensor("positions", table, torch.int64, fresh=-1),
        StateTensor("seen", (1,), torch.int64),
        StateTensor("scores", table, torch.float32),
        StateTensor("keys", (*table, head_dim), dtype),
        StateTensor("values", (*table, head_dim), dtype),
    )


@torch.no_grad()
def attend_chunk(
    attention: "SparseKAttention",
    states: Sequence[Tensor],
    row: Tensor,
    source: Tensor,
    is_first: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    scaling: float,
) -> Tensor:
    """Attend with the next tokens of one request; see `SparseAttentionLayer.attend_chunk`."""
    cache = attention.make_cache_layer() if is_first else _gathered(attention, states, source)
    return _attended(attention, states, row, cache, query, key, value, hidden_states, scaling)


@torch.no_grad()
def attend_steps(
    attention: "SparseKAttention",
    states: Sequence[Tensor],
    rows: Tensor,
    sources: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    scaling: float,
) -> Tensor:
    """Take a decoding step of several requests; see `SparseAttentionLayer.attend_steps`."""
    if sources is rows:
        output = step_in_rows(attention, states, rows, query, key, value, hidden_states, scaling)
        if output is not None:
            return output
    cache = _gathered(attention, states, sources)
    return _attended(attention, states, rows, cache, query, key, value, hidden_states, scaling)


def _gathered(attention: "SparseKAttention", states: Sequence[Tensor], rows: Tensor) -> SparseKCacheLayer:
    """Return a cache layer with copies of some rows."""
    positions, seen, scores, keys, values = (state.index_select(0, rows) for state in states)
    cache = attention.make_cache_layer()
    no_padding = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    cache.take(keys, values, scores, positions, seen[:, 0], no_padding, seen.new_zeros(()))
    return cache


def _attended(
    attention: "SparseKAttention",
    states: Sequence[Tensor],
    rows: Tensor,
    cache: SparseKCacheLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    scaling: float,
) -> Tensor:
    """Attend with a cache layer, and write what it holds then into the rows."""
    cache.may_look_ahead = False
    output = attention.attend(query, key, value, hidden_states=hidden_states, valid=None, cache=cache, scaling=scaling)
    held = (cache.positions, cache.seen[:, None], cache.scores, cache.keys, cache.values)
    index = rows.long()
    for state, tensor in zip(states, held, strict=True):
        state.index_copy_(0, index, tensor)
    return output
