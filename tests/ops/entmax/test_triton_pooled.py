"""The kernels that list tiles by mean keys against plain PyTorch: the same lists."""

import pytest
import torch

from hf_sparse.ops.entmax.inputs import Inputs
from hf_sparse.ops.entmax.layout import layout_of
from hf_sparse.ops.entmax.pooled import pooled_tiles
from hf_sparse.ops.entmax.triton.pooled import fused_pooled_tiles, takes_pooled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter")

SHAPES = {
    "a list per head": {},
    "lists for KV heads": {"grouped": True},
    "scales of heads, one below 0": {"scaling": "heads"},
    "both directions": {"causal": False, "window": 9},
    "both directions, no window": {"causal": False, "window": 0, "choices": 2},
    "fewer queries than keys": {"queries": 45, "keys": 150, "global_tokens": 20},
    "small tiles of queries": {"rows": 16, "pool": 4},
    "one query": {"queries": 1, "keys": 90},
    "a tile in which the queries begin": {"queries": 8, "keys": 90, "pool": 16},
    "as many choices as there are tiles": {"choices": 100},
    "batch, and one mean per tile": {"batch": 2, "pool": 64},
    "every key by itself": {"pool": 1, "queries": 100},
}


def assert_equal(batch=1, queries=150, keys=None, scaling=0.3, rows=None, grouped=False, first=None, **choice):
    torch.manual_seed(0)
    keys, heads, size = keys or queries, 4, 32
    options = {"causal": True, "pool": 8, "choices": 1, "window": 1, "global_tokens": 1} | choice
    query = torch.randn(batch, heads, queries, 20, device=DEVICE)
    query = query + 2 * torch.randn(batch, heads, 1, 20, device=DEVICE)
    query[:, :, queries // 3] = 0
    key = torch.randn(batch, 2, keys, 20, device=DEVICE)
    if scaling == "heads":
        scaling = torch.linspace(0.5, -0.2, heads, device=DEVICE)
    expected = pooled_tiles(
        query.double(),
        key.double(),
        size=size,
        rows=rows,
        grouped=grouped,
        first_query=first,
        scaling=scaling,
        **options,
    )  # fmt: skip, no kernel takes float64
    layout = layout_of(Inputs(query, key, 1.0, True, None, first), 2 if grouped else heads, size, rows or size)
    assert takes_pooled(layout, options["pool"], None)
    found = fused_pooled_tiles(query, key, scaling, layout, **options)
    width = max(found.index.shape[3], expected.index.shape[3])
    padded = [torch.nn.functional.pad(x.index, (0, width - x.index.shape[3]), value=-1) for x in (found, expected)]
    assert torch.equal(*padded)
    assert (found.size, found.rows) == (expected.size, expected.rows)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lists(shape):
    assert_equal(**shape)


def test_queries_somewhere_in_the_text():
    assert_equal(batch=2, queries=64, keys=150, first=torch.tensor([32, 64], device=DEVICE))


@pytest.mark.parametrize("rows", [16, 8])
def test_queries_of_zeros_behind_a_text_change_no_list(rows):
    """Whatever the keys are that stand there."""
    torch.manual_seed(0)
    length, padded, options = 107, 150, {"causal": True, "choices": 1, "pool": 8, "window": 1, "global_tokens": 1}
    query, key = torch.randn(2, 1, 2, padded, 20, device=DEVICE)
    query[:, :, length:], key[:, :, length:] = 0, 100 * key[:, :, length:]
    lists = []
    for end in (length, padded):
        inputs = Inputs(query[:, :, :end], key[:, :, :end], 1.0, True, None, None)
        layout = layout_of(inputs, 2, 16, rows)
        found = fused_pooled_tiles(inputs.query, inputs.key, 0.3, layout, **options).mask(-(-padded // 16))
        lists.append(found[:, :, : -(-length // rows)])
    assert torch.equal(*lists)
