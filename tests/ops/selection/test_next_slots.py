"""The slots that are foreseen, against those that tokens take one after another."""

import pytest
import torch

from hf_sparse.ops.selection.next_slots import next_slots
from hf_sparse.ops.selection.slots import insert_token

BATCH, HEADS, DIM = 3, 2, 4


def after_some_tokens(tokens, k, window, sinks, scores):
    """Slots `[B, Hkv, S]` after as many tokens of each row as `tokens` says, put there one by one."""
    size = (BATCH, HEADS, k + window + sinks)
    keys, values = torch.zeros(*size, DIM), torch.zeros(*size, DIM)
    table, positions = torch.zeros(size), torch.full(size, -1)
    seen = torch.zeros(BATCH, dtype=torch.int64)
    for step in range(max(tokens)):
        real, key = torch.tensor([step < count for count in tokens]), torch.zeros(BATCH, HEADS, 1, DIM)
        score = scores[..., step, None]
        insert_token(keys, values, table, positions, seen, key, key, score, real, window=window, sinks=sinks)
        seen += real
    return keys, values, table, positions, seen


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tokens", [(1, 1, 1), (5, 17, 40), (40, 39, 41), (3, 60, 22)], ids=str)
@pytest.mark.parametrize(("k", "window", "sinks"), [(6, 8, 2), (1, 12, 0), (9, 5, 7), (4, 1, 1)])
def test_they_are_those_of_the_tokens_to_come(k, window, sinks, tokens, ties):
    scores = torch.randn(BATCH, HEADS, 100)
    if ties:
        scores = scores.round()
    state = after_some_tokens(tokens, k, window, sinks, scores)
    *tables, positions, seen = state
    foreseen = next_slots(tables[2], positions, seen, window, window=window, sinks=sinks)
    assert foreseen.shape == (BATCH, HEADS, window)
    for step in range(window):
        before, key = positions.clone(), torch.randn(BATCH, HEADS, 1, DIM)
        score = torch.randn(BATCH, HEADS, 1)  # of which the slots do not depend
        insert_token(*tables, positions, seen, key, key, score, None, window=window, sinks=sinks)
        seen += 1
        assert torch.equal((positions != before).int().argmax(-1), foreseen[..., step])
