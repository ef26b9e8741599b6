"""The entmax kernels against plain PyTorch in float64: over all keys and over listed tiles, outputs and gradients."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_sparse.ops.entmax import certified_entmax_attention, entmax_attention
from hf_sparse.ops.entmax.inputs import Inputs
from hf_sparse.ops.entmax.layout import layout_of
from hf_sparse.ops.entmax.pooled import pooled_tiles
from hf_sparse.ops.entmax.threshold import distribution
from hf_sparse.ops.entmax.triton import attention, pooled, sweep, takes_kernels
from hf_sparse.ops.entmax.triton.attention import attend
from hf_sparse.ops.entmax.triton.common import Numbers
from hf_sparse.ops.entmax.triton.few import Few
from hf_sparse.ops.entmax.triton.fused import fused_attention, lists_of
from hf_sparse.ops.entmax.triton.groups import Buffered
from hf_sparse.ops.entmax.triton.pooled import fused_pooled_tiles
from hf_sparse.ops.entmax.triton.sweep import FAR, SHORT, TURNS, Blocks, blocks_of, candidates, packed_bits
from hf_sparse.ops.tiles.tiles import Tiles, tile_counts
from hf_sparse.ops.triton import replay

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Several programs and blocks of keys even at the lengths of these tests, a rising bound, and groups of every kernel.
SMALL = {
    "sweep": Blocks(16, 32, 4, 1), "start": Blocks(16, 16, 4, 1), "near": 16, "probe": 2, "every": 1,
    "few": Few(16, 1),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter")


def size(on_a_gpu: int, interpreted: int) -> int:
    """Return a length: the interpreter takes time by the pair of a query and a key."""
    return on_a_gpu if DEVICE == "cuda" else interpreted


@dataclass
class Case:
    """Random inputs of one shape, and what the reference and the kernels make of them."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = size(77, 18)
    keys: int | None = None
    dim: int = 8
    alpha: float | str = 1.5  # "heads" is one for each head, with a gradient
    scaling: float | str = 0.3
    causal: bool = True
    padding: bool = False
    ties: bool = False
    dtype: torch.dtype = torch.float32
    inputs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        heads = self.kv_heads * self.group
        self.keys = self.keys or self.queries
        query = torch.randn(self.batch, heads, self.queries, self.dim) * 2
        key, value = torch.randn(2, self.batch, self.kv_heads, self.keys, self.dim)
        if self.ties:
            query, key = query.round(), key.round()
        if self.padding:  # whatever stands there
            hidden = ~self.valid[:, None, :, None]
            key, value = key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, torch.nan)
            query = query.masked_fill(hidden[:, :, self.keys - self.queries :], torch.nan)
        self.inputs = [tensor.to(self.dtype) for tensor in (query, key, value)]

    @property
    def valid(self) -> Tensor | None:
        """`[B, Tk]`: a text that begins late, one with holes, one without any token."""
        if not self.padding:
            return None
        position = torch.arange(self.keys)
        rows = [position >= self.keys // 3, position % 3 > 0, position < 0]
        return torch.stack([rows[row % 3] for row in range(self.batch)])

    def run(self, attend, dtype: torch.dtype, gradients: bool) -> dict[str, Tensor]:
        """Return the output, and the gradients for a fixed upstream gradient."""
        heads = self.kv_heads * self.group
        numbers = {
            name: torch.linspace(*ends, heads, dtype=torch.promote_types(dtype, torch.float32)).to(DEVICE)
            if choice == "heads"
            else choice
            for name, choice, ends in (("alpha", self.alpha, (1.2, 1.9)), ("scaling", self.scaling, (0.5, -0.2)))
        }
        leaves = dict(zip(("query", "key", "value"), (x.to(DEVICE, dtype) for x in self.inputs), strict=True))
        leaves |= {name: number for name, number in numbers.items() if isinstance(number, Tensor)}
        for leaf in leaves.values():
            leaf.requires_grad_(gradients)
        valid = None if self.valid is None else self.valid.to(DEVICE)
        tensors = (leaves["query"], leaves["key"], leaves["value"])
        output = attend(*tensors, causal=self.causal, valid=valid, **numbers)
        found = {"output": output.detach()}
        if gradients:
            upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
            wanted = torch.autograd.grad(output, list(leaves.values()), upstream)
            found |= {f"d {name}": gradient for name, gradient in zip(leaves, wanted, strict=True)}
        return found


def assert_same(case: Case, kernels, reference=entmax_attention, gradients: bool = True) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[case.dtype]
    expected = case.run(reference, torch.float64, gradients)
    for name, found in case.run(kernels, case.dtype, gradients).items():
        assert found.dtype == (case.dtype if name in ("output", "d query", "d key", "d value") else torch.float32)
        scale = max(0.1, float(expected[name].abs().max()))
        error = float((found.double() - expected[name]).abs().max()) / scale
        assert error < tolerance, f"{name}: {error:.1e}"  # a NaN fails too


def exact(**sizes):
    def kernels(*tensors, **options):
        return attend(*tensors, **options, **{**SMALL, **sizes})[0]

    return kernels


# Triton's interpreter multiplies no bfloat16.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16

SHAPES = {
    "plain": {"queries": size(150, 37)},
    "group of three, scales and alphas of heads": {"group": 3, "alpha": "heads", "scaling": "heads"},
    "eight query heads": {"group": size(8, 2), "queries": size(300, 3)},
    "sparsemax": {"alpha": 2.0, "dim": 20},
    "one token": {"queries": 1},
    "one query of several keys": {"queries": 1, "keys": size(90, 37), "group": 2},
    "fewer queries than keys": {"queries": 5, "keys": size(90, 37)},
    "both directions": {"causal": False, "queries": size(150, 33)},
    "padding": {"padding": True, "batch": 3, "queries": size(170, 3), "keys": size(190, 19)},
    "padding, both directions": {"padding": True, "batch": 2, "causal": False, "queries": size(170, 13)},
    "ties": {"ties": True, "dim": 4},
    "equal logits": {"scaling": 0.0, "queries": 18},
    "head size 80": {"dim": 80, "queries": 9},
    "head size 256": {"dim": 256, "queries": size(200, 3), "scaling": 0.05},
    "half precision": {"dtype": HALF, "dim": 32},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_keys(shape):
    assert_same(Case(**shape), exact())


@pytest.mark.parametrize(("keys", "rows"), [(SHORT, 64), (SHORT + 1, 128), (FAR + 1, 64)])
@pytest.mark.parametrize("listed", [False, True])
def test_short_and_long_texts_by_default(keys, rows, listed):
    """Half precision and small heads, which have sizes of their own."""
    queries = size(300, 130 if listed else 70)  # two tiles of queries, or two programs of 64
    shape = {"queries": queries, "keys": keys, "dim": 16, "dtype": HALF}
    query, key, _ = Case(**shape).inputs
    assert blocks_of(query, key, None)[0].rows == rows
    if listed:
        assert_listed({**shape, "tile": 128, "heads": 1})
    else:
        assert_same(Case(**shape), lambda *tensors, **options: attend(*tensors, **options)[0])


@pytest.mark.parametrize("alpha", [1.3, 2.0])
def test_sorted_groups_with_ties_and_without_keys(alpha, monkeypatch):
    """With equal logits all keys have weight: groups of queries have as many as a limit, more, or none."""
    monkeypatch.setattr(sweep, "HEAVY", 32)
    assert_same(Case(queries=37, scaling=0.0, alpha=alpha), exact())
    assert_same(Case(queries=37, scaling=0.0, alpha=alpha, batch=3, padding=True, group=2), exact())
    assert_listed({"queries": 37, "scaling": 0.0, "alpha": alpha, "tile": 16, "heads": 1, "group": 2}, **SMALL)


@pytest.mark.parametrize("capacity", [64, 2], ids=["all blocks", "two blocks"])
@pytest.mark.parametrize("lists", [False, True])
def test_groups_with_most_candidates_are_the_first_of_the_queues(capacity, lists, monkeypatch):
    """Each group is in one queue or in none, and one of which blocks are missing has many candidates."""
    monkeypatch.setattr(sweep, "HEAVY", 24)
    length, limits = 80, {"few": 20, "kept": 36}
    case = Case(queries=length, group=2, dim=4)
    query, key, _ = (tensor.to(DEVICE) for tensor in case.inputs)
    described = None
    if lists:
        described = lists_of(
            Tiles.of_mask(torch.ones(1, 1, 5, 5, device=DEVICE).bool(), 16), Inputs(query, key, 1.0, True, None, None)
        )
    blocks = Blocks(16, 16, 4, 1)
    found = candidates(
        query, key, Numbers(None, 0.1, None, 2), None, None, None, True, capacity, *limits.values(), blocks, blocks,
        near=16, lists=described,
    )  # fmt: skip
    counts = found.counts.tolist()
    bits = [sum(int(word & 0xFFFFFFFF).bit_count() for block in words[:count] for word in block)
            for words, count in zip(found.words.tolist(), counts, strict=True)]  # fmt: skip
    total = torch.tensor([25 if count > capacity else of for of, count in zip(bits, counts, strict=True)])
    assert found.totals.tolist() == total.tolist()
    most, first, second = total > 36, (total > 24) & (total <= 36), (total > 20) & (total <= 24)
    turn = found.turn.tolist()
    assert turn == [0, *(int(some.sum()) for some in (first, second, most)), *[0] * (TURNS - 4)]
    assert turn[1] > 0 and (capacity == 2 or turn[3] > 0)
    large, queue = found.queue.tolist()
    assert sorted(large[: turn[3]]) == most.nonzero()[:, 0].tolist()
    assert sorted(queue[: turn[1]]) == first.nonzero()[:, 0].tolist()
    assert sorted(queue[len(total) - turn[2] :]) == second.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("limits", [{"capacity": 1}, {"most": 16}, {"kept": 16}, {"kept": 16, "most": 32}], ids=str)
@pytest.mark.parametrize("large", [1, 2])
def test_more_candidates_than_the_buffers_take(limits, large):
    """Groups of queries near the beginning fit into all buffers, others into large ones or into none.

    A backward has no list of the keys of those that fit into large ones only."""
    buffered = Buffered(16, 1, 2, large=large)
    assert_same(Case(queries=size(150, 37), alpha=1.3), exact(**limits, buffered=buffered))


KERNELS: dict[str, dict[str, Any]] = {
    "most groups with few": {"few": Few(size(128, 256), 4)},
    "few groups with few": {"few": Few(16, 1)},
    "more chunks, fewer registers": {"few": Few(64, 2), "buffered": Buffered(16, 1, 1, wide=16)},
}


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_many_candidates(alpha, kernels):
    """Heads from a few keys with weight to hundreds: those of a group fill several registers, or none of them do."""
    case = Case(group=3, queries=size(300, 17), keys=size(3000, 250), alpha=alpha)
    query, key, value = (tensor.to(DEVICE) for tensor in case.inputs)
    scaling = torch.tensor([0.003, 0.2, 2.0], device=DEVICE)
    output, tau, count = attend(query, key, value, alpha=alpha, scaling=scaling, causal=True, **SMALL | kernels)
    z = query.double() @ key.double().transpose(-1, -2) * (scaling.double() * (alpha - 1))[:, None, None]
    sees = torch.ones_like(z).tril(case.keys - case.queries).bool()
    weight = distribution(z.masked_fill(~sees, -torch.inf), 1 / (alpha - 1))
    largest = torch.where(weight > 0, z - weight ** (alpha - 1), -torch.inf).amax(-1)
    assert float(((tau.double() - largest).abs() / (1 + largest.abs())).max()) < 2e-6
    expected = weight @ value.double()
    allowed = torch.full_like(largest, 1e-5)
    if alpha == 2:  # a weight is a difference of two numbers as large as the threshold: four of its last digits
        allowed = torch.maximum(allowed, 4 * torch.finfo(torch.float32).eps * largest.abs())
    assert ((output.double() - expected).abs() <= allowed[..., None] + 1e-5 * expected.abs()).all()
    assert int(count[:, 0].min()) > 50 and int(count[:, 2].max()) < 16


def test_thresholds_and_supports():
    case = Case(queries=size(90, 17), padding=True, batch=2)
    query, key, value = (tensor.to(DEVICE) for tensor in case.inputs)
    options = {"alpha": 1.5, "scaling": 0.3, "causal": True, "valid": case.valid.to(DEVICE)}
    _, tau, count = attend(query, key, value, **options, **SMALL)
    everything = Tiles(torch.zeros(2, 1, 1, 1, dtype=torch.int64, device=DEVICE), case.keys)
    exact = [tensor.double() for tensor in (query, key, value)]
    _, certificate = certified_entmax_attention(*exact, everything, **options)
    torch.testing.assert_close(tau.double(), certificate.tau, rtol=1e-5, atol=1e-5)
    assert torch.equal(count.long(), certificate.support)


def test_the_bound_rises_and_stays_below_the_threshold():
    """Queries in the direction of keys that are neither first nor near: a bound over these does not know of the others.

    It rises in the sweep, and begins higher where some of the keys between are looked at."""
    torch.manual_seed(0)
    length, dim = size(256, 80), 16
    query, key = torch.randn(2, 1, 1, length, dim)
    query[..., 0], key[..., 0] = 8, 0
    key[:, :, 16:32, 0] = torch.rand(16)
    query, key, one = query.to(DEVICE), key.to(DEVICE), torch.ones(1, device=DEVICE)
    arguments = (query, key, Numbers(0.15 * one, 1.0, None, 2), None, None, None, True)
    first, risen, probed = (
        candidates(*arguments, 64, 16, 64, *[Blocks(16, 16, 4, 1)] * 2, near=16, every=every, probe=probe).bound[0, 0]
        for every, probe in ((length, 0), (1, 0), (length, 2))  # blocks of keys: never, or after each
    )
    z = 0.15 * query[0, 0] @ key[0, 0].T
    z = z.masked_fill(~torch.ones_like(z).tril().bool(), -torch.inf).double()
    weight = distribution(z, 2.0)
    tau = torch.where(weight > 0, z - weight.sqrt(), -torch.inf).amax(-1)
    assert bool((first <= tau).all())
    last = slice(-16, None)
    for higher in (risen, probed):
        assert bool((higher <= tau).all()) and bool((higher >= first).all())
        assert float((tau - higher)[last].mean()) < 0.5 * float((tau - first)[last].mean())


def test_bits_of_padding_are_those_of_products():
    valid = torch.zeros(1, 70, dtype=torch.bool)
    valid[0, [0, 9, 34, 69]] = True  # word w has columns 2 w and 2 w + 1 of every 8
    words = packed_bits(valid, 32).view(-1, 4)
    assert words.tolist() == [[0b1001, 0, 0, 0], [0, 0b1, 0, 0], [0, 0, 0b10, 0]]


def test_on_a_cpu_nothing_changes():
    tensors = [torch.randn(1, 1, 4, 8) for _ in range(3)]
    assert not takes_kernels(*tensors)
    if DEVICE == "cuda":
        assert takes_kernels(*(tensor.cuda() for tensor in tensors))
        assert not takes_kernels(*(tensor.cuda().double() for tensor in tensors))


def test_autocast_gives_tensors_one_dtype(monkeypatch):
    with FakeTensorMode():
        query, key, value = (torch.empty(1, 1, 4, 8, device="cuda", dtype=HALF) for _ in range(3))
        assert takes_kernels(query, key, value) and not takes_kernels(query.float(), key.float(), value)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert takes_kernels(query.float(), key.float(), value)
        assert not takes_kernels(query.double(), key.double(), value.double())


LISTS = {
    "a list for all heads": {"group": 3, "heads": 1},
    "a list per query and head": {"group": 2, "heads": 2, "rows": 1, "queries": 3, "keys": 19, "padding": True},
    "lists for KV heads": {"kv_heads": 2, "group": 2, "heads": 2, "rows": 4, "causal": False, "queries": 9},
    "one query": {"queries": 1, "keys": 30, "heads": 1},
    "first tile of queries begins before them": {"queries": 11, "keys": 30, "heads": 1, "alpha": "heads"},
}


@pytest.mark.parametrize("shape", LISTS.values(), ids=LISTS)
def test_listed_tiles(shape):
    assert_listed(shape)


def test_lists_of_more_keys_than_the_buffers_take():
    assert_listed({"group": 3, "heads": 1, "queries": size(90, 9), "keys": size(90, 37)}, kept=16)


# The sweep over listed tiles: its lists are of 16 queries and keys or more.
LARGE: dict[str, dict[str, Any]] = {
    "a list per head": {"group": 2, "heads": 2, "queries": size(300, 37)},
    "a list for all heads": {"group": 3, "heads": 1, "alpha": "heads", "scaling": "heads"},
    "fewer queries than keys": {"queries": 21, "keys": size(300, 60), "heads": 1},
    "fewer queries than keys in a tile": {"queries": 33, "keys": size(300, 70), "heads": 1, "rows": 16, "tile": 32},
    "a block of several tiles": {"queries": size(300, 40), "heads": 1, "tile": 32},
    "both directions": {"causal": False, "queries": size(150, 33), "heads": 1},
    "padding": {"padding": True, "batch": 3, "queries": size(170, 3), "keys": size(190, 19), "heads": 1},
    "sparsemax, half precision": {"alpha": 2.0, "dtype": HALF, "dim": 32, "heads": 1},
}


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_listed_large_tiles(shape):
    assert_listed({"tile": 16, **shape}, **SMALL)


@pytest.mark.parametrize("limit", ["capacity", "most", "kept"])
def test_large_tiles_of_more_candidates_than_the_buffers_take(limit):
    shape = {"tile": 16, "heads": 1, "group": 2, "queries": size(150, 37), "alpha": 1.3}
    assert_listed(shape, **{**SMALL, limit: 1 if limit == "capacity" else 16})


def test_no_group_is_left_over_where_all_listed_tiles_have_candidates(monkeypatch):
    """Blocks of listed tiles are smaller than those of all keys, and a group may have more of them."""
    marked, attend_groups = [], attention.attend_groups

    def attend_and_look(*arguments):
        attended = attend_groups(*arguments)
        marked.append(bool((attended.lengths < 0).any()))
        return attended

    monkeypatch.setattr(attention, "attend_groups", attend_and_look)
    monkeypatch.setattr(attention, "attend_tiles", lambda *arguments: marked.append("in vain"))
    query, key, value = Case(queries=60, dim=16).inputs
    tiles = Tiles.of_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 16)
    lists = lists_of(tiles, Inputs(query, key, 1.0, True, None, None))
    tensors = [tensor.to(DEVICE) for tensor in (query, key, value)]
    lists = replace(lists, index=lists.index.to(DEVICE), counts=lists.counts.to(DEVICE))
    attend(*tensors, alpha=1.5, scaling=0.01, causal=True, lists=lists)
    assert marked == [False]


def assert_listed(shape: dict, **sizes) -> None:
    shape = dict(shape)
    heads, rows, tile = shape.pop("heads"), shape.pop("rows", None), shape.pop("tile", 8)
    case = Case(**shape)
    listed, total = tile_counts(case.queries, case.keys, tile, rows)
    tiles = Tiles.of_mask(torch.rand(case.batch, heads, listed, total) < 0.5, tile, rows)
    tiles = Tiles(tiles.index.to(DEVICE), tile, rows)

    def kernels(query, key, value, **options):
        lists = lists_of(tiles, Inputs(query, key, 1.0, options["causal"], options["valid"], None))
        return attend(query, key, value, lists=lists, **options, **sizes)[0]

    def reference(*tensors, **options):
        return entmax_attention(*tensors, tiles=tiles, **options)

    assert_same(case, kernels, reference)


def test_autocast_chooses_the_dtype():
    tensors = [torch.randn(1, 1, 5, 16, device=DEVICE) for _ in range(3)]
    with torch.autocast(DEVICE, dtype=HALF):
        output = fused_attention(*tensors, 1.5, 0.3, True, None, None, None)
    assert output.dtype == HALF
    expected = entmax_attention(*(x.double() for x in tensors), alpha=1.5, scaling=0.3, causal=True)
    torch.testing.assert_close(output.double(), expected, rtol=3e-2, atol=3e-2)


def test_the_output_may_be_changed_in_place():
    def gated(attend):
        def attend_and_gate(*tensors, **options):
            output = attend(*tensors, **options)
            output *= torch.linspace(0, 2, output.shape[3], dtype=output.dtype, device=output.device)
            return output

        return attend_and_gate

    assert_same(Case(queries=18, group=2), gated(exact()), gated(entmax_attention))


def test_queries_somewhere_in_the_text():
    """Two texts of different lengths, padded at the end: positions behind the last key hold no query."""
    case = Case(batch=2, group=2, queries=size(40, 6), keys=size(60, 24))
    first = torch.tensor([3, case.keys - 4], device=DEVICE)
    assert_same(
        case,
        lambda *tensors, **options: attend(*tensors, first_query=first, **options, **SMALL)[0],
        lambda *tensors, **options: entmax_attention(*tensors, first_query=first, **options),
    )


@pytest.mark.parametrize("tile", [None, 16, 8], ids=["all keys", "large tiles", "small tiles"])
def test_what_stands_behind_a_text_changes_nothing(tile):
    """A recorded prompt is padded with what came before; queries behind the text choose no tiles."""
    length, padded = size(150, 57), size(192, 64)
    case = Case(group=2, queries=padded)
    case.inputs[:] = [torch.cat([x[:, :, :length], 100 * x[:, :, length:]], 2).to(DEVICE) for x in case.inputs]
    outputs = []
    for end in (length, padded):
        query, key, value = (tensor[:, :, :end] for tensor in case.inputs)
        lists = None
        if tile is not None:
            asked = query.masked_fill((torch.arange(end, device=DEVICE) >= length)[:, None], 0)
            graph = pooled_tiles(asked, key, size=tile, choices=1, pool=4, scaling=0.3, causal=True)
            lists = lists_of(graph, Inputs(query, key, 1.0, True, None, None))
        options = {"alpha": 1.5, "scaling": 0.3, "causal": True, "lists": lists}
        outputs.append(attend(query, key, value, **options, **SMALL)[0][:, :, :length])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-6)


RECORDED = {
    "all keys": {},
    "padding": {"padding": True},
    "buffers too small": {"most": 32, "kept": 16, "few": Few(16, 1)},
    "a list per head": {"tile": 16},
    "small tiles": {"tile": 8},
}


def recorded(function, tensors, settings):
    """Call a function as `replayed` does for the first time; returns its results and what was noted."""
    recorder = replay._state.recorder = replay._Recorder(tensors)
    try:
        return function(*tensors, *settings), recorder
    finally:
        replay._state.recorder = None


@pytest.mark.parametrize("shape", RECORDED.values(), ids=RECORDED)
@pytest.mark.parametrize("trains", [False, True])
def test_all_that_is_launched_can_run_again(shape, trains, monkeypatch):
    """Every address is that of an input or of a noted buffer. On a GPU a second call equals the reference."""
    noted = []

    def record(function, tensors, *settings):
        results, recorder = recorded(function, tensors, settings)
        noted.append((len(recorder.launches), recorder.program(results, tensors[0].device)))
        return results

    if DEVICE == "cpu":
        for module in (attention, pooled):
            monkeypatch.setattr(module, "replayed", record)
    tile, sizes = shape.get("tile"), {name: number for name, number in shape.items() if name in ("most", "kept", "few")}
    case = Case(queries=size(150, 37), dim=16, group=2, padding="padding" in shape, scaling="heads")

    def kernels(query, key, value, **options):
        lists = None
        if tile:
            layout = layout_of(Inputs(query, key, 1.0, True, None, None), 2, tile, tile)
            tiles = fused_pooled_tiles(query.detach(), key.detach(), 0.3, layout, True, 1, 4, 1, 1)
            lists = lists_of(tiles, Inputs(query, key, 1.0, True, None, None))
        return attend(query, key, value, lists=lists, **options, **sizes)[0]

    def reference(query, key, value, **options):
        tiles = None
        if tile:
            tiles = pooled_tiles(query.detach(), key.detach(), size=tile, choices=1, pool=4, scaling=0.3, causal=True)
        return entmax_attention(query, key, value, tiles=tiles, **options)

    for _ in range(2):
        assert_same(case, kernels, reference, trains)
    assert all(launches and program is not None for launches, program in noted)
    assert len(noted) == (0 if DEVICE == "cuda" else 2 * (1 + trains + bool(tile)))


@pytest.mark.parametrize("tile", [None, 16, 8], ids=["all keys", "large tiles", "small tiles"])
def test_launches_do_not_depend_on_values(tile, monkeypatch):
    """Launches that ran once serve all values of a layout: few candidates and ties, padding or none, any alpha."""
    noted: list[tuple[Any, ...]] = []

    def record(function, tensors, *settings):
        results, recorder = recorded(function, tensors, settings)
        for kernel, _, grid, arguments, constants in recorder.launches:
            given = ["a tensor" if isinstance(argument, Tensor) else argument for argument in arguments]
            noted.append((kernel, grid, given, constants))
        noted.append((settings, [(buffer.shape, zero) for buffer, zero in recorder.buffers]))
        return results

    monkeypatch.setattr(attention, "replayed", record)
    queries, all_noted = size(150, 37), []
    for spread, real, alpha in ((0.0, 0.0, 1.2), (1.0, 0.9, 1.5), (20.0, 1.1, 1.9)):
        query, key, value = (tensor.to(DEVICE) for tensor in Case(batch=2, group=2, queries=queries, dim=16).inputs)
        query = (query * spread).requires_grad_()
        valid = torch.rand(2, queries, device=DEVICE) < real
        lists = None
        if tile is not None:
            count = tile_counts(queries, queries, tile)[0]
            tiles = Tiles(torch.arange(count, device=DEVICE).expand(1, 1, count, count), tile)
            lists = lists_of(tiles, Inputs(query, key, 1.0, True, valid, None))
        alphas = torch.full((2,), alpha, device=DEVICE, requires_grad=True)
        output, *_ = attend(query, key, value, alpha=alphas, scaling=0.3, causal=True, valid=valid, lists=lists)
        output.sum().backward()
        all_noted.append(list(noted))
        noted.clear()
    assert len(all_noted[0]) >= 4 and all_noted[0] == all_noted[1] == all_noted[2]
