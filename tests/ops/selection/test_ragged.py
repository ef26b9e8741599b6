"""Slots of heads with different numbers of them: each head's part of the buffer is what the head alone would have."""

import pytest
import torch

from hf_sparse.ops.selection import ragged, slots

BATCH, DIM, COUNTS, WINDOW, SINKS = 2, 4, (9, 20, 13), 5, 2
HEADS = len(COUNTS)


def buffers():
    total = sum(COUNTS)
    positions = torch.full((BATCH, total), -1)
    return [*torch.zeros(2, BATCH, total, DIM), torch.zeros(BATCH, total), positions]


def alone():
    return [
        [*torch.zeros(2, BATCH, 1, count, DIM), torch.zeros(BATCH, 1, count), torch.full((BATCH, 1, count), -1)]
        for count in COUNTS
    ]


@pytest.mark.parametrize("begin", [0, 3, 30])
def test_filling_steps_and_attention(begin):
    key, value = torch.randn(2, BATCH, HEADS, 60, DIM)
    scores, queries = torch.randn(BATCH, HEADS, 60), torch.randn(BATCH, HEADS * 2, 60, DIM)
    offsets = ragged.offsets_of(COUNTS, torch.device("cpu"))
    assert offsets.tolist() == [0, 9, 29, 42] and offsets.dtype == torch.int32
    state, heads, seen = buffers(), alone(), torch.zeros(BATCH, dtype=torch.int64)
    layout, rules = {"counts": COUNTS, "offsets": offsets}, {"window": WINDOW, "sinks": SINKS}
    if begin:
        text = [tensor[:, :, :begin] for tensor in (key, value, scores)]
        ragged.fill_slots(*state, seen, *text, **layout, **rules)
        for head, own in enumerate(heads):
            slots.fill_slots(*own, seen.clone(), *(tensor[:, head : head + 1] for tensor in text), **rules)
    for t in range(begin, 60):
        token = [tensor[:, :, t : t + 1] for tensor in (key, value, scores)]
        ragged.insert_token(*state, seen, *token, None, **layout, **rules)
        query = queries[:, :, t : t + 1]
        output = ragged.attend_slots(query, state[0], state[1], state[3], **layout, scaling=0.4)
        for head, own in enumerate(heads):
            slots.insert_token(*own, seen, *(tensor[:, head : head + 1] for tensor in token), None, **rules)
            expected = slots.attend_slots(query[:, 2 * head : 2 * head + 2], own[0], own[1], own[3], scaling=0.4)
            assert torch.equal(output[:, 2 * head : 2 * head + 2], expected)
        seen += 1
    for buffer, own in zip(state, zip(*heads, strict=True), strict=True):
        assert torch.equal(buffer, torch.cat([tensor.squeeze(1) for tensor in own], 1))
    full = ragged.attend_slots(query, state[0], state[1], None, **layout, scaling=0.4)
    torch.testing.assert_close(full, output)
