"""Pieces of prompts side by side: which ones go together, and where their tokens stand."""

import pytest
import torch

from hf_sparse.core import prompt_chunks
from hf_sparse.core.prompt_chunks import Chunk, ChunkGroup, groups_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # the device is named; nothing is put there


def chunks_of(*pieces):
    """Pieces of `(before, length)`, one after another behind two tokens of others."""
    chunks, begin = [], 2
    for before, length in pieces:
        chunks.append(Chunk(begin, begin + length, before))
        begin += length
    return tuple(chunks)


def test_tokens_lie_side_by_side_and_come_back():
    chunks = chunks_of((4, 2), (7, 3))
    group = ChunkGroup.of(chunks, [5, 6], 8, CPU)
    assert not group.is_first and not group.is_dense and group.most_context == 10
    assert ChunkGroup.of(chunks, [5, 6], 10, CPU).is_dense
    assert group.table.tolist() == [[2, 3, 3], [4, 5, 6]]
    assert group.valid.tolist() == [[True, True, False], [True, True, True]]
    assert (group.row.tolist(), group.index.tolist()) == ([0, 0, 1, 1, 1], [4, 5, 7, 8, 9])
    assert (group.members.tolist(), group.before.tolist(), group.lengths.tolist()) == ([5, 6], [4, 7], [2, 3])
    packed = torch.randn(9, 2, 4)
    rows = group.padded(packed)
    assert rows.shape == (2, 2, 3, 4) and torch.equal(rows[1, :, 2], packed[6])
    assert torch.equal(group.packed(rows), packed[group.tokens])
    assert group.padded(packed[:, 0]).shape == (2, 3, 4)
    assert ChunkGroup.of(chunks_of((0, 3), (0, 3)), [0, 1], 8, CPU).valid is None


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_groups_are_of_one_kind_and_of_about_one_length(device):
    generator = torch.Generator().manual_seed(0)
    pieces = torch.randint(1, 200, (300, 2), generator=generator).tolist()
    chunks = chunks_of(*((before * (number % 2), length) for number, (before, length) in enumerate(pieces)))
    groups = list(groups_of(chunks, 128, device))
    assert sorted(number for group in groups for number in group) == list(range(300))
    assert len(groups) < 100
    for group in groups:
        assert len({(chunks[number].before == 0, chunks[number].context <= 128) for number in group}) == 1
        lengths = [chunks[number].length for number in group]
        assert max(lengths) < 2 * min(lengths)


def test_groups_are_bounded_by_what_their_attention_takes_up(monkeypatch):
    monkeypatch.setattr(prompt_chunks, "_MOST_LOGITS", 1000)
    texts, pieces = [(0, 10)] * 25, [(40, 10)] * 9
    sizes = [len(group) for group in groups_of(chunks_of(*texts, *pieces), 64, CPU)]
    assert sorted(sizes) == [1, 2, 2, 2, 2, 5, 10, 10]  # 10 x 10 x 10 and 2 x 10 x 50
    assert [len(group) for group in groups_of(chunks_of((0, 500), (0, 500)), 64, CPU)] == [1, 1]
