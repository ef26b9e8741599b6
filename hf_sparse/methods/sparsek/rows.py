"""Keep the KV slots of many requests in the rows of a pool, as an engine that serves them needs it.

`SparseKAttention` has the first four functions as its methods. A forward gathers the rows of its requests into a cache
layer, runs the attention of the module as it is, and writes the rows back. What the rows of others hold is never read.
On a GPU a decoding step finds its rows in the pool itself.

As long as nothing of a text was evicted, its token `p` lies in slot `p` of each head: all that write to slots take the
first empty one. So pieces of several such texts are written to the rows where they belong, and attended to densely.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.core.new_tokens import NewTokens, PackedTokens
from hf_sparse.core.prompt_chunks import ChunkGroup
from hf_sparse.core.request_state import StateRows, StateTensor
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.settings import WHOLE_PROMPT
from hf_sparse.methods.sparsek.step import step_in_rows
from hf_sparse.ops.selection.ragged import offsets_of

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
        table = (sum(_slots_of_heads(attention)),)
    return (
        StateTensor("positions", table, torch.int64, fresh=-1),
        StateTensor("seen", (1,), torch.int64),
        StateTensor("scores", table, torch.float32),
        StateTensor("keys", (*table, head_dim), dtype),
        StateTensor("values", (*table, head_dim), dtype),
    )


@torch.no_grad()
def attend_chunk(attention: "SparseKAttention", at: StateRows, is_first: bool, new: NewTokens) -> Tensor:
    """Attend with the next tokens of one request; see `SparseAttentionLayer.attend_chunk`."""
    return _attended(attention, at, attention.make_cache_layer() if is_first else _gathered(attention, at), new)


@torch.no_grad()
def attend_chunks(attention: "SparseKAttention", at: StateRows, chunks: ChunkGroup, packed: PackedTokens) -> Tensor:
    """Attend with the next tokens of several requests; see `SparseAttentionLayer.attend_chunks`."""
    if chunks.is_dense:
        _write(attention, at, chunks, packed)
        return _attended_densely(attention, at, chunks, packed)
    cache = attention.make_cache_layer() if chunks.is_first else _gathered(attention, at)
    q, k, v, hidden_states = (chunks.padded(tensor) for tensor in packed[:4])
    new = NewTokens(q, k, v, hidden_states, chunks.valid, packed.scaling)
    return chunks.packed(_attended(attention, at, cache, new))


@torch.no_grad()
def attend_steps(attention: "SparseKAttention", at: StateRows, new: NewTokens) -> Tensor:
    """Take a decoding step of several requests; see `SparseAttentionLayer.attend_steps`."""
    if at.sources is at.rows:
        output = step_in_rows(attention, at, new)
        if output is not None:
            return output
    return _attended(attention, at, _gathered(attention, at), new)


def _write(attention: "SparseKAttention", at: StateRows, chunks: ChunkGroup, packed: PackedTokens) -> None:
    """Write new tokens of texts of which nothing is evicted to their slots."""
    index = at.rows.long()
    if chunks.is_first:
        head_dim, dtype = packed.key.shape[-1], packed.key.dtype
        for part, state in zip(request_state(attention, head_dim, dtype), at.states, strict=True):
            state.index_fill_(0, index, part.fresh)
    elif at.sources is not at.rows:
        for state in at.states:
            state.index_copy_(0, index, state.index_select(0, at.sources))
    positions, seen, scores, keys, values = at.states
    key, value, hidden = (tensor.index_select(0, chunks.tokens) for tensor in packed[1:4])
    slots = chunks.index[:, None] + _first_slots(attention, key.device)
    place = index.index_select(0, chunks.row)[:, None], slots  # [n, Hkv]
    for table, numbers in (
        (positions, chunks.index[:, None].expand_as(slots)),
        (scores, attention.score(hidden[None], chunks.index[None])[0].T),
        (keys, key),
        (values, value),
    ):
        _by_slot(table, numbers.ndim).index_put_(place, numbers)
    seen.index_copy_(0, index, (chunks.before + chunks.lengths)[:, None])


def _attended_densely(attention: "SparseKAttention", at: StateRows, chunks: ChunkGroup, packed: PackedTokens) -> Tensor:
    """Attend to all keys of texts of which nothing is evicted, after the new tokens were written to their slots."""
    query, key = packed.query, packed.key
    grouped = query.shape[1] != key.shape[1]
    queries, mask = chunks.padded(query), None
    if chunks.is_first:
        keys, values = chunks.padded(key), chunks.padded(packed.value)
    else:
        number = torch.arange(chunks.most_context, device=key.device)
        place = at.rows.long()[:, None, None], number[:, None] + _first_slots(attention, key.device)
        is_filled = (number < (chunks.before + chunks.lengths)[:, None])[:, :, None, None]
        keys, values = (  # [B, Hkv, Tk, D]; what an empty slot holds may be anything
            _by_slot(state, 3)[place].masked_fill(~is_filled, 0).transpose(1, 2) for state in at.states[3:]
        )
        last = chunks.before[:, None] + number[: queries.shape[2]]
        mask = (number <= last[:, :, None])[:, None]
    output = F.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=mask is None, scale=packed.scaling, enable_gqa=grouped
    )
    return chunks.packed(output)


def _by_slot(state: Tensor, ndim: int) -> Tensor:
    """Return a view of a state tensor in which the slots of all heads are one dimension, `[rows, slots, ...]`."""
    return state if state.ndim == ndim else state.view(len(state), -1, *state.shape[3:])


def _first_slots(attention: "SparseKAttention", device: torch.device) -> Tensor:
    """Return the first slot of each head in a row, `[Hkv]`."""
    return offsets_of(_slots_of_heads(attention), device)[:-1]


def _slots_of_heads(attention: "SparseKAttention") -> list[int]:
    """Return the number of slots of each head."""
    return [attention.budget.of_head(head).slots for head in range(attention.num_key_value_heads)]


def _gathered(attention: "SparseKAttention", at: StateRows) -> SparseKCacheLayer:
    """Return a cache layer with copies of the states that are read."""
    positions, seen, scores, keys, values = (state.index_select(0, at.sources) for state in at.states)
    cache = attention.make_cache_layer()
    no_padding = torch.zeros(len(at.sources), dtype=torch.bool, device=at.sources.device)
    cache.take(keys, values, scores, positions, seen[:, 0], no_padding, seen.new_zeros(()))
    return cache


def _attended(attention: "SparseKAttention", at: StateRows, cache: SparseKCacheLayer, new: NewTokens) -> Tensor:
    """Attend with a cache layer, and write what it holds then into the rows."""
    cache.may_look_ahead = False
    output = attention.attend(**new._asdict(), cache=cache)
    held = (cache.positions, cache.seen[:, None], cache.scores, cache.keys, cache.values)
    index = at.rows.long()
    for state, tensor in zip(at.states, held, strict=True):
        state.index_copy_(0, index, tensor)
    return output
