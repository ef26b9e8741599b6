"""Tile lists against loops over tokens."""

import pytest
import torch

from hf_sparse.ops.tiles.allowed import allowed_edges, allowed_tiles, positions_of, tiles_of_valid
from hf_sparse.ops.tiles.tiles import Tiles, joined, near_edges, own_tiles, tile_counts, window_and_global


@pytest.fixture
def random_mask():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.rand(*shape, generator=generator) < 0.4


def padding(keys: int) -> torch.Tensor:
    """Left, right and inner padding, and none."""
    valid = torch.ones(4, keys, dtype=torch.bool)
    valid[0, : keys // 3] = False
    valid[1, -(keys // 4) :] = False
    valid[2, 5:9] = False
    return valid


def in_order(index: torch.Tensor) -> bool:
    rows = index.flatten(0, 2).tolist()
    listed = [[tile for tile in row if tile >= 0] for row in rows]
    return all(row[: len(tiles)] == tiles == sorted(set(tiles)) for row, tiles in zip(rows, listed, strict=True))


def test_lists_and_masks_are_the_same_graph(random_mask):
    mask = random_mask(2, 3, 4, 7)
    mask[0, 0, 1] = False
    tiles = Tiles.of_mask(mask, 16)
    assert in_order(tiles.index)
    assert tiles.index.shape[-1] == mask.sum(-1).max()
    assert torch.equal(tiles.mask(7), mask)
    assert torch.equal(tiles.counts, mask.sum(-1))


def test_graphs_of_consecutive_queries_are_joined(random_mask):
    mask = random_mask(2, 3, 9, 7)
    parts = [Tiles.of_mask(part, 16, 4) for part in mask.split([2, 1, 6], 2)]
    whole = joined(parts)
    assert (whole.size, whole.rows) == (16, 4)
    assert torch.equal(whole.index, Tiles.of_mask(mask, 16, 4).index)


def test_empty_lists():
    tiles = Tiles.of_mask(torch.zeros(1, 2, 3, 3, dtype=torch.bool), 8)
    assert tiles.index.shape == (1, 2, 3, 0)
    assert not tiles.mask(3).any() and not tiles.counts.any()
    assert tiles.union(tiles).index.shape == (1, 2, 3, 0)


@pytest.mark.parametrize("lead", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_union_names_each_tile_once(random_mask, lead):
    left, right = random_mask(2, 3, 5, 6), random_mask(*lead, 5, 6)
    union = Tiles.of_mask(left, 4).union(Tiles.of_mask(right, 4))
    assert in_order(union.index)
    assert torch.equal(union.mask(6), left | right)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "size", "rows"),
    [(23, 23, 4, 4), (5, 23, 4, 4), (1, 24, 8, 8), (7, 7, 16, 16), (9, 20, 1, 1), (9, 23, 4, 1), (9, 23, 8, 2)],
)
def test_edges_are_the_allowed_pairs_of_listed_tiles(random_mask, causal, queries, keys, size, rows):
    listed, total = tile_counts(queries, keys, size, rows)
    mask = random_mask(4, 2, listed, total)
    found = Tiles.of_mask(mask, size, rows).edges(queries, keys, causal=causal)
    expected = torch.zeros(4, 2, queries, keys, dtype=torch.bool)
    for b in range(4):
        for row in range(queries):
            position = keys - queries + row
            for j in range(keys):
                if not causal or j <= position:
                    first = (keys - queries) // rows
                    expected[b, :, row, j] = mask[b, :, position // rows - first, j // size]
    assert torch.equal(found, expected)
    some = torch.tensor([queries - 1, 0])
    found = Tiles.of_mask(mask, size, rows).edges(queries, keys, causal=causal, rows=some)
    assert torch.equal(found, expected[:, :, some])
    own = own_tiles(listed, keys, size, rows)
    ends = [min(keys - 1, ((keys - queries) // rows + n) * rows + rows - 1) for n in range(listed)]
    assert own.tolist() == [end // size for end in ends]


@pytest.mark.cross
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 2, 5, 8, 9, 100])
@pytest.mark.parametrize("global_tokens", [0, 1, 6, 100])
@pytest.mark.parametrize("rows", [4, 2, 1])
def test_window_and_global(causal, window, global_tokens, rows):
    queries, keys, size = 17, 35, 4
    tiles = window_and_global(queries, keys, size, rows=rows, window=window, global_tokens=global_tokens, causal=causal)
    listed, total = tile_counts(queries, keys, size, rows)
    expected = torch.zeros(1, 1, listed, total, dtype=torch.bool)
    for row in range(listed):
        start = ((keys - queries) // rows + row) * rows
        for i in range(start, start + rows):
            begin = i - window + 1 if causal else i - window // 2
            for j in [*range(min(keys, global_tokens)), *range(max(0, begin), min(total * size, begin + window))]:
                expected[0, 0, row, j // size] = True
    assert in_order(tiles.index)
    assert torch.equal(tiles.mask(total), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "global_tokens"), [(1, 0), (4, 2), (5, 0), (100, 0)])
def test_near_edges(causal, window, global_tokens):
    options = {"window": window, "global_tokens": global_tokens, "causal": causal}
    position = torch.tensor([[3, 7, 8], [0, 4, 11]])
    found = near_edges(position, 12, **options)
    assert found.shape == (2, 1, 3, 12)
    assert torch.equal(found[:1], near_edges(position[0], 12, **options))
    for (b, row), at in zip(
        torch.cartesian_prod(torch.arange(2), torch.arange(3)), position.flatten().tolist(), strict=True
    ):
        begin = at - window + 1 if causal else at - window // 2
        marked = [begin <= j < begin + window or j < global_tokens for j in range(12)]
        assert found[b, 0, row].tolist() == marked


def test_no_list_is_as_long_as_the_text(largest_tensor):
    tokens, size = 1 << 16, 64
    with largest_tensor() as largest:
        tiles = window_and_global(tokens, tokens, size, window=128, global_tokens=1, causal=True)
        tiles = tiles.union(tiles)
    assert tiles.index.shape == (1, 1, 1024, 4)
    assert largest.numel <= 1024 * 2 * 4


@pytest.mark.parametrize("causal", [True, False])
def test_allowed_tiles_hold_an_allowed_pair(causal):
    queries, keys, size = 17, 35, 4
    valid = padding(keys)
    listed, total = tile_counts(queries, keys, size)
    first = total - listed
    # A tile of queries counts whole, also where only its last queries are given.
    edges = allowed_edges(torch.arange(first * size, keys), keys, causal=causal, valid=valid)
    found = allowed_tiles(
        torch.arange(total - listed, total), total, causal=causal, valid_tiles=tiles_of_valid(valid, size)
    )
    for row in range(listed):
        for column in range(total):
            pairs = edges[:, :, row * size : row * size + size, column * size : column * size + size]
            if row + first != column:  # an inner padding can leave a diagonal tile without a pair, never forbid one
                assert torch.equal(found[:, :, row, column], pairs.any(-1).any(-1))
            assert not (pairs.any(-1).any(-1) & ~found[:, :, row, column]).any()


def test_positions():
    assert positions_of(2, 5).tolist() == [3, 4]
    assert positions_of(2, 5, torch.tensor([1])).tolist() == [4]


def test_bad_input():
    index = torch.zeros(1, 1, 2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least 1 position, got size=0"):
        Tiles(index, 0)
    with pytest.raises(ValueError, match="at least 1 position, got size=-3"):
        tile_counts(4, 4, -3)
    with pytest.raises(ValueError, match="Tq=5, Tk=4"):
        tile_counts(5, 4, 2)
    with pytest.raises(ValueError, match=r"\[B, H, nq, m\] int64, got \(1, 1, 2, 1\) torch.int32"):
        Tiles(index.int(), 4)
    for lengths in (torch.ones(1, 1, 2, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"length for each list, \(1, 1, 2\) int32, got \(1, 1, .\) torch.int"):
            Tiles(index, 4, lengths=lengths)
    with pytest.raises(ValueError, match=r"\[B, H, nq, nk\] bool, got \(2, 2\) torch.float32"):
        Tiles.of_mask(torch.ones(2, 2), 4)
    with pytest.raises(ValueError, match="expected a graph of key tiles 0 to 1, got tile 3"):
        Tiles(index[:, :, :1] + 3, 4).mask(2)
    for rows in (0, 3, 8):
        with pytest.raises(ValueError, match=f"a tile of queries must divide a tile of 4 keys, got rows={rows}"):
            tile_counts(5, 9, 4, rows)
    with pytest.raises(ValueError, match="2 query tiles of 4 by 4 positions and 2 of 2 by 4"):
        Tiles(index, 4).union(Tiles(index, 4, 2))
    with pytest.raises(ValueError, match="2 query tiles of 4 by 4 positions and 2 of 8 by 8"):
        Tiles(index, 4).union(Tiles(index, 8))
    with pytest.raises(ValueError, match="9 queries of 9 keys are 3 tiles of 4, got a graph of 2"):
        Tiles(index, 4).edges(9, 9, causal=True)
    with pytest.raises(ValueError, match="at least 0, got -1 and 0"):
        window_and_global(4, 4, 2, window=-1, causal=True)
    with pytest.raises(ValueError, match=r"valid \[B, 4\] bool, got \(1, 3\)"):
        allowed_edges(torch.arange(4), 4, causal=True, valid=torch.ones(1, 3, dtype=torch.bool))
