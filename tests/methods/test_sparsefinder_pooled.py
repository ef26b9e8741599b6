"""Sparsefinder with tiles by mean keys: which are listed, and where all keys are attended."""

import itertools

import pytest
import torch

from hf_sparse.core.layer import AttentionShape
from hf_sparse.methods.sparsefinder import SparsefinderConfig
from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention
from hf_sparse.ops.entmax import entmax_attention
from hf_sparse.ops.tiles.tiles import tile_counts

HEADS, KV_HEADS, DIM, LENGTH, SCALING = 4, 2, 8, 75, 0.5
SIZES = {"predictor": "pooled", "tile": 16, "choices": 1, "window": 4, "pool": 4, "exact_up_to": 20}


def build(causal=True, **changes):
    module = SparsefinderAttention.for_shape(AttentionShape(32, HEADS, KV_HEADS, DIM, layer=0, causal=causal))
    module.add_adapter("default", SparsefinderConfig(**{**SIZES, **changes}))
    return module.eval()


def tensors(batch=2, length=LENGTH):
    torch.manual_seed(0)
    query = 3 * torch.randn(batch, HEADS, length, DIM) + 3 * torch.randn(batch, HEADS, 1, DIM)
    key, value = torch.randn(2, batch, KV_HEADS, length, DIM)
    return query, key, value


def attend(module, query, key, value, valid=None):
    return module.attend(query, key, value, hidden_states=None, valid=valid, cache=None, scaling=SCALING)


def full(module, query, key, value):
    scaling = SCALING * module.parameters_in_use.scale
    return entmax_attention(query, key, value, alpha=1.5, scaling=scaling, causal=module.causal)


def by_definition(module, query, key, shape):
    """Let every query choose one tile by its products with means of keys, one after the other."""
    config, mask = module.config, torch.zeros(shape, dtype=torch.bool)
    left, right = (config.window - 1, 0) if module.causal else (config.window // 2, (config.window - 1) // 2)
    rows, tiles = config.rows, shape[3]
    for tile in range(shape[2]):
        begin, end = tile * rows, min(LENGTH, (tile + 1) * rows)
        own = begin // config.tile
        first = max(0, begin - left) // config.tile if config.window else own
        last = min(tiles - 1, (tile * rows + rows - 1 + right) // config.tile) if config.window else own
        last = own if module.causal else last
        known = {0, *range(first, last + 1)}
        mask[:, :, tile, sorted(known)] = True
        offered = [j for j in range(own if module.causal else tiles) if j not in known]
        for batch, head, row in itertools.product(range(shape[0]), range(HEADS), range(begin, end)):
            score = {}
            for j in offered:
                keys = key[batch, head // 2, j * config.tile : (j + 1) * config.tile]
                means = torch.stack([group.mean(0) for group in keys.split(config.pool)])
                score[j] = float((means @ query[batch, head, row]).max())
            if score:
                mask[batch, head * shape[1] // HEADS, tile, max(score, key=score.get)] = True
    return mask


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "changes", [{}, {"per_group": True, "query_tile": 2}, {"query_tile": 4}, {"window": 0}], ids=str
)
def test_lists_have_window_first_and_chosen_tiles(causal, changes):
    module, seen = build(causal, **changes), []
    module.observer = lambda text, graph, certificate: seen.append(graph)
    query, key, value = tensors()
    output = attend(module, query, key, value)
    (graph,) = seen
    config = module.config
    assert graph.index.shape[1] == (KV_HEADS if config.per_group else HEADS)
    _, total = tile_counts(LENGTH, LENGTH, config.tile, config.rows)
    mask = graph.mask(total)
    own = torch.arange(mask.shape[2]) * config.rows // config.tile
    assert bool(mask[:, :, torch.arange(len(own)), own].all()) and bool(mask[..., 0].all())
    expected_mask = by_definition(module, query, key, mask.shape)
    assert torch.equal(mask, expected_mask) and not bool(mask.all())
    edges = graph.edges(LENGTH, LENGTH, causal=causal).repeat_interleave(HEADS // graph.index.shape[1], 1)
    scaling = SCALING * module.parameters_in_use.scale
    expected = entmax_attention(query, key, value, alpha=1.5, scaling=scaling, causal=causal, edges=edges)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_a_tile_that_one_query_seeks_is_listed():
    query, key, value = tensors(batch=1)
    key[:, :, 20] = 9 * query[:, ::2, 70]  # tile 1, far from the last queries
    module, seen = build(per_group=False), []
    module.observer = lambda text, graph, certificate: seen.append(graph)
    attend(module, query, key, value)
    assert bool(seen[0].mask(5)[0, ::2, 4, 1].all())


def test_short_texts_and_single_queries_see_all_keys():
    module, inputs = build(), tensors(length=20)
    torch.testing.assert_close(attend(module, *inputs), full(module, *inputs))
    query, key, value = tensors()
    one = query[:, :, -1:], key, value
    torch.testing.assert_close(attend(module, *one), full(module, *one))
    assert not torch.allclose(attend(module, query, key, value), full(module, query, key, value), atol=1e-3)


def test_padding_moves_no_tile():
    """A text in a padded batch has the lists that it has alone."""
    module, inputs = build(window=1), tensors()
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, :13] = False
    together = attend(module, *inputs, valid=valid)
    for row, real in enumerate(valid):
        alone = attend(module, *(tensor[row, None][:, :, real] for tensor in inputs))
        torch.testing.assert_close(together[row, None][:, :, real], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("new", [1, 5, 20, 31, 32, 40])
def test_padding_decides_not_whether_new_tokens_see_all_keys(new):
    """Fewer than a tile of queries has see all keys, in a padded batch as well; 32 or more have lists."""
    length = 300
    module, (query, key, value) = build(tile=32, window=1, exact_up_to=0), tensors(length=length)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, :13] = False
    query = query[:, :, length - new :]
    with torch.no_grad():
        together = attend(module, query, key, value, valid=valid)
        for row, first in enumerate((0, 13)):
            text = query[row, None], key[row, None, :, first:], value[row, None, :, first:]
            torch.testing.assert_close(together[row, None], attend(module, *text), rtol=0, atol=1e-5)
            assert torch.allclose(together[row, None], full(module, *text), rtol=0, atol=1e-5) is (new < 32)


def test_with_a_list_for_each_query_nothing_depends_on_later_tokens():
    query, key, value = tensors()
    module, before = build(query_tile=1), 50
    whole = attend(module, query, key, value)
    changed = [torch.cat([tensor[:, :, :before], 9 * tensor[:, :, before:]], 2) for tensor in (query, key, value)]
    torch.testing.assert_close(attend(module, *changed)[:, :, :before], whole[:, :, :before], rtol=0, atol=1e-5)
    assert not torch.allclose(whole, full(module, query, key, value), atol=1e-3)
