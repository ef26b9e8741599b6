"""The sparse weights of entmax attention are those of the `entmax` package, pair by pair, and hold no zero."""

import pytest
import torch
from entmax import entmax15, entmax_bisect, sparsemax

from hf_sparse.ops.entmax import entmax_attention, entmax_weights, weights
from hf_sparse.ops.tiles import Tiles
from hf_sparse.ops.tiles.tiles import tile_counts

SHAPES = {
    "whole text": (37, 37),
    "end of a text": (11, 37),
    "one query": (1, 37),
    "one token": (1, 1),
}
TILES = {"all keys": None, "square": (8, 8), "a list per query": (8, 1), "a list for 2 queries": (16, 2)}


def tensors(queries, keys, heads=4, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(2, heads, queries, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, kv_heads, keys, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return query, key, value


def graph(queries, keys, sizes, heads):
    if sizes is None:
        return None
    mask = torch.rand(2, heads, *tile_counts(queries, keys, *sizes), generator=torch.Generator().manual_seed(3)) < 0.6
    return Tiles.of_mask(mask, *sizes)


@pytest.mark.cross("values")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", TILES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
@pytest.mark.parametrize("heads_of_lists", [4, 2, 1])
@pytest.mark.parametrize("logits", [1, 1 << 22])  # one query at a time, and all at once
def test_weights_are_those_of_the_definition(shape, sizes, causal, alpha, heads_of_lists, logits, monkeypatch):
    monkeypatch.setattr(weights, "_LOGITS", logits)
    queries, keys = SHAPES[shape]
    query, key, value = tensors(queries, keys)
    tiles = graph(queries, keys, TILES[sizes], heads_of_lists)
    scaling = torch.tensor([0.3, 0.5, 1.0, 0.2], dtype=torch.float64)
    options = {"alpha": alpha, "scaling": scaling, "causal": causal, "tiles": tiles}
    sparse = entmax_weights(query, key, **options)
    assert sparse.is_coalesced() and sparse.shape == (2, 4, queries, keys) and bool((sparse.values() > 0).all())
    transform = {1.5: entmax15, 2.0: sparsemax}.get(alpha, lambda row, dim: entmax_bisect(row, alpha, dim, n_iter=100))
    group, dense = 2, sparse.to_dense()
    for batch in range(2):
        for head in range(4):
            for place in range(queries):
                position = keys - queries + place
                allowed = torch.arange(keys) <= position if causal else torch.ones(keys, dtype=torch.bool)
                if tiles is not None:
                    first = (keys - queries) // tiles.rows
                    lists = tiles.index[batch, head * heads_of_lists // 4, position // tiles.rows - first]
                    allowed = allowed & torch.isin(torch.arange(keys) // tiles.size, lists[lists >= 0])
                expected = torch.zeros(keys, dtype=torch.float64)
                if allowed.any():
                    row = scaling[head] * (key[batch, head // group, allowed] @ query[batch, head, place])
                    expected[allowed] = transform(row, dim=-1)
                torch.testing.assert_close(dense[batch, head, place], expected, rtol=0, atol=1e-9)
    output = entmax_attention(query, key, value, **options)
    torch.testing.assert_close(dense @ value.repeat_interleave(2, 1), output, rtol=0, atol=1e-9)


def test_no_query():
    query, key, _ = tensors(0, 5)
    assert entmax_weights(query, key, alpha=1.5, scaling=1.0, causal=True).shape == (2, 4, 0, 5)


def test_a_graph_of_another_text_is_refused():
    query, key, _ = tensors(37, 37)
    tiles = graph(30, 30, (8, 8), 4)
    with pytest.raises(ValueError, match="37 queries of 37 keys are 5 tiles of 8, got a graph of 4 query tiles"):
        entmax_weights(query, key, alpha=1.5, scaling=1.0, causal=True, tiles=tiles)
