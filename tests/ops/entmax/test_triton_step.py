"""A decoding step of entmax in its kernels against plain PyTorch in float64."""

from dataclasses import astuple

import pytest
import torch

from hf_sparse.ops.entmax.step import Scales, _plain
from hf_sparse.ops.entmax.triton.step import step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Several programs, blocks of keys, and rounds of each loop even at the lengths of these tests.
SMALL = {"block": 16, "greatest": 4, "programs": 3, "wide": 32, "gathered": 4, "stages": 1}
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter multiplies no bfloat16

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter")


def scales_of(alpha, scaling, query):
    """ "heads" is a number for each head, "log" a logarithm for each."""
    heads = query.shape[1]
    if scaling == "log":
        return Scales.of_logarithm(alpha, 0.3, torch.linspace(-1, 0.5, heads, device=query.device))
    alpha = torch.linspace(1.2, 1.9, heads) if alpha == "heads" else alpha
    scaling = torch.linspace(0.5, -0.2, heads) if scaling == "heads" else scaling
    return Scales.of(alpha, scaling, query)


def assert_same(
    *,
    batch=1,
    kv_heads=1,
    group=1,
    queries=1,
    keys=75,
    dim=8,
    alpha=1.5,
    scaling=0.3,
    causal=True,
    padding=False,
    ties=False,
    dtype=torch.float32,
    first=None,
    index=None,
    size=1,
    change=lambda tensor: tensor,
    **sizes,
):
    """Compare output of the kernels, in the dtype, with that of the reference for the same numbers."""
    torch.manual_seed(0)
    query = torch.randn(batch, kv_heads * group, queries, dim) * 2
    key, value = torch.randn(2, batch, kv_heads, keys, dim)
    if ties:
        query, key = query.round(), key.round()
    if isinstance(first, int):  # one for all texts, as `Tensor.expand` makes it, with other numbers behind it
        first = torch.tensor([first, -7, keys, 0, 1], device=DEVICE)[:1].expand(batch)
    elif first is not None:
        first = torch.tensor(first, device=DEVICE)
    valid = None
    if padding:  # a text that begins late, one with holes and with padding at its end, one without any token
        position = torch.arange(keys)
        valid = torch.stack([position >= keys // 3, (position % 3 > 0) & (position < keys - 1), position < 0][:batch])
        hidden = ~valid[:, None, :, None]
        key, value = key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, torch.nan)
        valid = valid.to(DEVICE)
    tensors = [change(tensor.to(DEVICE, dtype)) for tensor in (query, key, value)]
    index = None if index is None else index.to(DEVICE)

    def run(attend, tensors, **sizes):
        scales = scales_of(alpha, scaling, tensors[0])
        numbers = (*astuple(scales), causal, valid, first, index, size)
        return attend(*tensors, *numbers, **sizes)

    expected = run(_plain, [tensor.double() for tensor in tensors])
    for variant in (SMALL | sizes, {}):
        output = run(step, tensors, **variant)
        assert output.dtype == dtype and output.is_contiguous()
        tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
        scale = max(0.1, float(expected.abs().max()))
        assert float((output.double() - expected).abs().max()) / scale < tolerance  # a NaN fails too


SHAPES = {
    "one head": {},
    "one key": {"keys": 1},
    "a group of three, scales and alphas of heads": {"group": 3, "kv_heads": 2, "alpha": "heads", "scaling": "heads"},
    "logarithms of scales": {"group": 3, "scaling": "log"},
    "logarithms of scales, another alpha": {"group": 2, "scaling": "log", "alpha": 1.7},
    "a group of eight": {"group": 8, "keys": 33},
    "sparsemax": {"alpha": 2.0, "dim": 20, "group": 2},
    "almost softmax": {"alpha": 1.05},
    "several queries": {"queries": 5, "group": 2},
    "sixteen queries, as many as keys": {"queries": 16, "keys": 16, "group": 2},
    "both directions": {"causal": False, "queries": 3},
    "padding": {"padding": True, "batch": 3, "group": 2},
    "several queries, padding": {"padding": True, "batch": 3, "queries": 4},
    "ties": {"ties": True, "dim": 4},
    "equal logits": {"scaling": 0.0},
    "queries that tell nothing apart but two keys": {"scaling": 40.0},
    "head size 80": {"dim": 80, "group": 2},
    "head size 256": {"dim": 256, "scaling": 0.05, "keys": 40},
    "half precision": {"dtype": HALF, "dim": 32, "group": 4, "kv_heads": 2},
    "a cache of fixed size": {"first": [40], "group": 2},
    "texts of different lengths": {"first": [0, 17, 74], "batch": 3, "group": 2},
    "one position for all texts": {"first": [40], "batch": 3},
    "one position that is expanded": {"first": 40, "batch": 3, "group": 2},
    "several queries in a cache of fixed size": {"first": [3, 70], "batch": 2, "queries": 5},
    "a cache of fixed size with padding": {"first": [60, 61, 9], "batch": 3, "padding": True, "queries": 2},
    "no query in the text": {"first": [75], "group": 2},
}


# Each differs from one that runs by default in a number or in a pair of features which each run.
WIDE = {
    "logarithms of scales, another alpha", "a group of eight", "almost softmax", "equal logits",
    "one position for all texts", "several queries in a cache of fixed size",
}  # fmt: skip


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.full if name in WIDE else ()) for name in SHAPES
])  # fmt: skip
def test_all_keys(name):
    assert_same(**SHAPES[name])


LISTS = {
    "a list for each query head": {"heads": 4, "group": 2, "kv_heads": 2},
    "a list for each KV head, of another text too": {"heads": 2, "group": 2, "kv_heads": 2, "batch": 2},
    "a list for all": {"heads": 1, "group": 2, "kv_heads": 2},
    "padding": {"heads": 2, "group": 2, "padding": True, "batch": 3},
    "positions on the device": {"heads": 2, "group": 2, "first": [50, 20], "batch": 2, "keys": 70},
}


@pytest.mark.cross("values")
@pytest.mark.parametrize("shape", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("size", [1, 8])
def test_listed_tiles(shape, size):
    shape = {"batch": 1, "keys": 75} | shape
    heads = shape.pop("heads")
    generator = torch.Generator().manual_seed(0)
    total = -(-shape["keys"] // size)
    index = torch.rand(shape["batch"], heads, 1, total, generator=generator).argsort(-1)[..., : total // 2 + 1]
    index[..., 1] = -1  # anywhere
    index[:, 0] = -1 if heads > 1 else index[:, 0]  # a list of nothing
    assert_same(**shape, index=index, size=size)


@pytest.mark.parametrize("shape", [
    {"keys": 1}, {"keys": 33, "group": 3, "kv_heads": 2, "batch": 2}, {"keys": 64, "dim": 20},
    {"keys": 48, "padding": True},
    {"keys": 70, "dtype": HALF, "dim": 32, "group": 4, "alpha": "heads"}, {"keys": 40, "padding": True, "alpha": 2.0},
])  # fmt: skip
def test_the_newest_token_is_written_by_the_way(shape):
    """It comes beside a cache that has room for more, where anything may stand in its place."""
    torch.manual_seed(0)
    shape = {"batch": 3, "kv_heads": 2, "group": 2, "dim": 8, "dtype": torch.float32, "alpha": 1.5} | shape
    batch, kv_heads, keys, dim, dtype = (shape[name] for name in ("batch", "kv_heads", "keys", "dim", "dtype"))
    query = torch.randn(batch, kv_heads * shape["group"], 1, dim, device=DEVICE).to(dtype)
    key, value = torch.randn(2, batch, kv_heads, keys, dim, device=DEVICE).to(dtype)
    valid = None
    if shape.get("padding"):  # a text that begins late, and one whose newest token is padding
        valid = torch.arange(keys, device=DEVICE).expand(batch, -1) >= keys // 3
        valid = valid & ~(torch.arange(batch, device=DEVICE) == 1)[:, None]
    scales = astuple(scales_of(shape["alpha"], 0.4, query))
    expected = _plain(*(part.double() for part in (query, key, value)), *scales, True, valid, None, None, 1)
    for variant in (SMALL, {}):
        rooms = [torch.full((batch, kv_heads, keys + 5, dim), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
        for room, part in zip(rooms, (key, value), strict=True):
            room[:, :, : keys - 1] = part[:, :, :-1]
        kept = [room[:, :, :keys] for room in rooms]
        # As a layer of a model hands them over: heads inside tokens.
        newest = tuple(part[:, :, -1:].transpose(1, 2).contiguous().transpose(1, 2) for part in (key, value))
        output = step(query, *kept, *scales, True, valid, None, None, 1, newest=newest, **variant)
        assert all(map(torch.equal, kept, (key, value)))
        assert all(bool(room[:, :, keys:].isnan().all()) for room in rooms)
        tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
        assert float((output.double() - expected).abs().max()) < tolerance


@pytest.mark.parametrize("change", [
    lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: x.mT.contiguous().mT,
    lambda x: torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view(x.shape),
], ids=["wider rows", "heads inside", "columns first", "odd address"])  # fmt: skip
def test_layouts(change):
    """Other strides and addresses are other binaries, or copies."""
    for dim in (16, 20):
        assert_same(kv_heads=2, group=2, keys=75 if DEVICE == "cuda" else 35, dim=dim, change=change)
        if DEVICE == "cuda":  # the interpreter has no binaries
            assert_same(kv_heads=2, group=2, dim=dim)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs are the GPU's")
def test_a_captured_step_follows_the_text():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 64, device="cuda") for heads, n in ((4, 1), (2, 300), (2, 300)))
    scales, first = Scales.of(1.5, 0.1, query), torch.tensor([5, 5], device="cuda")
    arguments = (query, key, value, *astuple(scales), True, None, first, None, 1)
    step(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(*arguments)
    for place in ([0, 299], [150, 64], [298, 1]):
        first.copy_(torch.tensor(place))
        graph.replay()
        torch.testing.assert_close(output, _plain(*arguments), rtol=1e-4, atol=1e-5)
