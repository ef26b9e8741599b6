"""The attention kernels against the tiles of plain PyTorch."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.selection.bidirectional import bidirectional_sparsek_attention as tiled_bidirectional
from hf_sparse.ops.selection.causal import causal_sparsek_attention as tiled_causal
from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.reference import dense_sparsek_attention
from hf_sparse.ops.selection.triton import attention as kernels
from hf_sparse.ops.selection.triton import attention_backward, attention_backward_kernels, attention_forward
from hf_sparse.ops.selection.triton.lists import Tables, by_lifetime
from hf_sparse.ops.selection.triton.program_sizes import ProgramSizes
from hf_sparse.ops.triton import replay

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ProgramSizes(16, 16, 4, 1)  # several programs and blocks of keys even at the lengths of these tests


def size(on_a_gpu: int, interpreted: int) -> int:
    """The interpreter takes time by the pair of a query and a key."""
    return on_a_gpu if DEVICE == "cuda" else interpreted


pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter", "nothing_noted")


@pytest.fixture
def scan_of_torch(monkeypatch):
    """Interpreted, the kernels of the scan would take most of the time; they have tests of their own."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels.scan, "supports", lambda *_, **__: False)


@dataclass
class Case:
    """Random inputs of one shape and budget."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = size(37, 21)
    keys: int | None = None
    dim: int = 8
    k: int = 5
    window: int = 4
    sinks: int = 2
    soft: bool = False
    support: int | None = None
    start: list[int] | None = None
    scale: float = 1.0  # of the scores
    offset: float = 0.0  # of the scores too
    ties: bool = False
    causal: bool = True
    dtype: torch.dtype = torch.float32
    inputs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.keys = self.keys or self.queries
        q = torch.randn(self.batch, self.kv_heads * self.group, self.queries, self.dim)
        k = torch.randn(self.batch, self.kv_heads, self.keys, self.dim)
        v = torch.randn_like(k)
        z = torch.randn(self.batch, self.kv_heads, self.keys) * self.scale + self.offset
        if self.ties:
            z = (z / 0.37).round() * 0.37
        self.inputs = [q.to(DEVICE, self.dtype), k.to(DEVICE, self.dtype), v.to(DEVICE, self.dtype), z.to(DEVICE)]

    @property
    def first(self) -> Tensor | None:
        return None if self.start is None else torch.tensor(self.start, device=DEVICE)

    @property
    def real(self) -> Tensor:
        """`[B, 1, Tq, 1]` bool: queries that are no padding."""
        position = torch.arange(self.keys - self.queries, self.keys, device=DEVICE)
        first = position.new_zeros(self.batch) if self.first is None else self.first
        return (position >= first[:, None])[:, None, :, None]

    def problem(self, *inputs: Tensor, scaling: float | None = None) -> Problem:
        support = self.support if self.soft else self.k
        scaling = self.dim**-0.5 if scaling is None else scaling
        return Problem(
            *inputs, self.k, self.window, self.sinks, scaling, self.soft, support, self.first, causal=self.causal
        )

    def tiled(self, *inputs: Tensor) -> Tensor:
        return (tiled_causal if self.causal else tiled_bidirectional)(self.problem(*inputs))

    def fused(self, *inputs: Tensor, blocks: ProgramSizes | None = SMALL, tile: int = 16) -> Tensor:
        if self.causal:
            return kernels.causal_sparsek_attention(self.problem(*inputs), blocks=blocks, tile=tile)
        return kernels.bidirectional_sparsek_attention(self.problem(*inputs), blocks=blocks)


def run(attend, case: Case, wanted: str = "qkvz") -> dict[str, Tensor]:
    """Output at real queries and the wanted gradients, for a fixed random upstream gradient."""
    inputs = dict(zip("qkvz", (tensor.clone() for tensor in case.inputs), strict=True))
    used = [name for name in wanted if case.soft or name != "z"]
    for name in used:
        inputs[name].requires_grad_()
    output = attend(*inputs.values())
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output) * case.real
    gradients = torch.autograd.grad(output, [inputs[name] for name in used], upstream)
    output = torch.where(case.real, output.detach(), 0.0)
    return {"output": output, **{f"d {name}": found for name, found in zip(used, gradients, strict=True)}}


def assert_same(case: Case, wanted: str = "qkvz", tolerance: float = 1e-5, **options) -> None:
    expected = run(case.tiled, case, wanted)
    found = run(lambda *inputs: case.fused(*inputs, **options), case, wanted)
    for name, reference in expected.items():
        # Sums of as many terms as queries attend to a key grow with their number.
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(
            found[name],
            reference,
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


SHAPES = {
    "plain": {},
    "one query head": {"queries": size(35, 23), "dim": 32},
    "three query heads": {"batch": 2, "kv_heads": 2, "group": 3, "queries": size(33, 13), "dim": 16},
    "four query heads": {"group": 4, "queries": size(21, 15), "dim": 64},
    "eight query heads": {"group": 8, "queries": size(19, 13), "dim": 20},
    "seventeen query heads": {"group": 17, "queries": size(9, 5), "k": 2, "window": 2},
    "head size 80": {"queries": size(27, 19), "dim": 80},
    "wide window": {"window": 30, "queries": size(70, 57), "k": 20},
    "no sinks": {"sinks": 0},
    "smallest budget": {"sinks": 0, "window": 1, "k": 1},
    "budget beyond the length": {"k": 50, "window": 20},
    "many sinks": {"sinks": 50},
    "one token": {"queries": 1},
    "padding": {"batch": 4, "start": [0, 7, size(36, 20), size(37, 21)], "group": 2},
    "ties": {"ties": True, "queries": size(50, 27), "support": 7},
    "equal scores": {"scale": 0.0, "queries": size(50, 27)},
    "flat scores": {"scale": 0.02, "queries": size(50, 27), "support": 20},
    "large scores": {"offset": 1e6, "queries": size(50, 27)},
    "steep scores": {"scale": 20.0, "queries": size(50, 27)},
}
CAUSAL_ONLY = {
    "fewer queries than keys": {"queries": 21, "keys": 70, "group": 2},
    "one query": {"queries": 1, "keys": 60, "group": 4},
    "padding and fewer queries": {
        "batch": 4,
        "start": [0, 7, size(55, 29), size(59, 33)],
        "queries": 12,
        "keys": size(60, 34),
    },
}
GATES = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
ORDER = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


@pytest.mark.cross("values")
@pytest.mark.usefixtures("scan_of_torch")
@GATES
@pytest.mark.parametrize("name", [*SHAPES, *CAUSAL_ONLY])
def test_causal_kernels_equal_the_tiles(name, soft):
    assert_same(Case(**{**SHAPES, **CAUSAL_ONLY}[name], soft=soft))


@pytest.mark.cross("values")
@pytest.mark.parametrize("name", [*SHAPES, *CAUSAL_ONLY])
def test_what_the_selection_counts_is_what_a_kernel_counts(name, monkeypatch):
    """Bit for bit: the same keys with and without a mask, in the same order."""
    case = Case(**{**SHAPES, **CAUSAL_ONLY}[name])
    found = run(case.fused, case, "q")
    tables_of = kernels.selection_tables
    counted = []

    def without_bounds(*arguments, **options):
        tables = tables_of(*arguments, **options)
        counted.append(tables.bounds)
        return tables._replace(bounds=None)

    monkeypatch.setattr(kernels, "selection_tables", without_bounds)
    replay._programs.clear()  # launches that were noted would run again, with the counts
    expected = run(case.fused, case, "q")
    assert [bounds.shape[-1] for bounds in counted] == [16]
    assert all(torch.equal(found[name], reference) for name, reference in expected.items())


@pytest.mark.cross("values")
@GATES
@pytest.mark.parametrize("name", SHAPES)
def test_bidirectional_kernels_equal_the_tiles(name, soft):
    case = Case(**SHAPES[name], soft=soft, causal=False)
    assert_same(case, tolerance=3e-5 if soft else 1e-5)  # the gates' own backward cancels


@pytest.mark.cross("values")
@pytest.mark.usefixtures("scan_of_torch")
@pytest.mark.parametrize("tile", [16, 32, 64])
@pytest.mark.parametrize("blocks", [ProgramSizes(32, 16, 4, 1), ProgramSizes(16, 64, 4, 2)], ids=str)
def test_sizes_change_nothing(tile, blocks, monkeypatch):
    monkeypatch.setattr(attention_backward, "_TILES_AT_ONCE", 1)  # several sums of d key and d value for each key
    for soft in (False, True):
        assert_same(
            Case(queries=size(83, tile + 15), group=size(3, 2), window=9, k=7, soft=soft), tile=tile, blocks=blocks
        )


@pytest.mark.parametrize("rows, group", [(64, 1), (32, 3)])
def test_programs_that_go_on_in_the_next_tile(rows, group):
    """The counts of a tile do not include what leaves its list in the next one."""
    case = Case(queries=46, keys=100, group=group, k=39, window=1, sinks=1)
    assert_same(case, "q", blocks=ProgramSizes(rows, 16, 4, 1))


@pytest.mark.cross("values")
@GATES
@ORDER
def test_the_sizes_that_run(soft, causal):
    assert_same(Case(queries=70, group=2, dim=64, k=20, window=16, soft=soft, causal=causal), blocks=None, tile=128)


@pytest.mark.cross("values")
@pytest.mark.usefixtures("scan_of_torch")
@ORDER
@pytest.mark.parametrize("wanted", ["z", "qz", "kz", "q", "v"])
def test_only_what_is_wanted(wanted, causal):
    case = Case(batch=2, group=2, queries=size(45, 23), window=7, soft=True, causal=causal)
    assert_same(case, wanted, tolerance=3e-5)


@pytest.mark.usefixtures("scan_of_torch")
@pytest.mark.parametrize("wanted", ["z", "qkvz"])
def test_no_kernel_for_what_nobody_wants(wanted, monkeypatch):
    launched = []
    for name in ("query_gradients", "key_gradients"):
        kernel = getattr(attention_backward, name)

        class Spy:
            arg_names = kernel.arg_names

            def __getitem__(self, grid, kernel=kernel, name=name):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(attention_backward, name, Spy())
    run(Case(soft=True).fused, Case(soft=True), wanted)
    assert launched == (["query_gradients"] if wanted == "z" else ["query_gradients", "key_gradients", "key_gradients"])


@pytest.mark.cross("values")
@pytest.mark.usefixtures("scan_of_torch")
@ORDER
@pytest.mark.parametrize("wanted", ["z", "qkvz"])
def test_sums_in_a_fixed_order(wanted, causal, monkeypatch):
    case = Case(batch=2, group=2, queries=size(45, 23), window=7, k=6, soft=True, causal=causal, start=[0, 5])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    if DEVICE == "cpu":  # not one atomic addition: it would fail here
        monkeypatch.setattr(attention_backward_kernels.tl, "atomic_add", None)
    assert_same(case, wanted, tolerance=3e-5)
    first, second = run(case.fused, case, wanted), run(case.fused, case, wanted)
    assert all(torch.equal(found, second[name]) for name, found in first.items())


@pytest.mark.cross("values")
@pytest.mark.usefixtures("scan_of_torch")
@GATES
@ORDER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_its_inputs(dtype, soft, causal):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    sizes = {"group": 2, "queries": size(45, 25), "dim": 32, "k": 9, "window": 8}
    case = Case(**sizes, soft=soft, causal=causal, dtype=dtype)
    exact = Case(**sizes, soft=soft, causal=causal)
    exact.inputs = [tensor.float() for tensor in case.inputs]
    found, reference = run(case.fused, case), run(exact.tiled, exact)
    for name, value in reference.items():
        error = (found[name].float() - value).norm() / value.norm()
        assert error < 4 * torch.finfo(dtype).eps, f"{name}: {error}"
        assert found[name].dtype == (torch.float32 if name == "d z" else dtype)


@GATES
def test_the_reference_agrees(soft):
    case = Case(batch=2, group=2, queries=size(45, 22), window=6, k=6, soft=soft, support=9)
    expected = run(lambda *inputs: dense_sparsek_attention(case.problem(*inputs)), case)
    torch.testing.assert_close(run(case.fused, case), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("scan_of_torch")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both directions"])
def test_checkpointing_reads_what_was_saved_once(causal):
    """A second reading raises, since `torch.utils.checkpoint` computes what was saved anew and hands it out once."""
    case = Case(soft=True, support=11, causal=causal)
    expected = run(case.fused, case)
    found = run(lambda *inputs: checkpoint(case.fused, *inputs, use_reentrant=False), case)
    for name, reference in expected.items():
        torch.testing.assert_close(found[name], reference, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("scan_of_torch")  # the scan reads scores alone, which have the strides of any test
def test_strided_inputs_and_outputs():
    """Models hold `[B, T, H, D]`; the output has the strides of the query, so that no copy follows."""
    case = Case(batch=2, kv_heads=2, group=2, queries=size(40, 19))
    expected = run(case.fused, case)
    case.inputs[:3] = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in case.inputs[:3]]
    torch.testing.assert_close(run(case.fused, case), expected, rtol=0, atol=1e-6)
    assert case.fused(*case.inputs).stride() == case.inputs[0].stride()
    wide = torch.randn(2, 4, size(40, 19), 16, device=DEVICE)[..., ::2]
    torch.testing.assert_close(
        case.fused(wide, *case.inputs[1:]), case.fused(wide.contiguous(), *case.inputs[1:]), rtol=0, atol=0
    )


@pytest.mark.usefixtures("scan_of_torch")
def test_rows_that_lie_far_apart(monkeypatch):
    """Offsets of rows take 64 bits where a head spans 2^31 elements or more, and are the same."""
    near, distant = (torch.empty_strided((1, 2, 1024, 64), (1, 64, row, 1), device="meta") for row in (128, 1 << 21))
    assert not attention_forward.far(near, near)
    assert attention_forward.far(near, distant)
    case = Case(group=2, queries=size(83, 40), k=20, window=9)
    expected = run(case.fused, case, "q")
    for module in (attention_forward, attention_backward):
        monkeypatch.setattr(module, "far", lambda *_: True)
    torch.testing.assert_close(run(case.fused, case, "q"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("window", [1, 16, 23])
def test_blocks_at_the_ends_of_a_window(window):
    """Blocks of keys that begin and end with the window, in its middle, and that hold all of it."""
    case = Case(queries=size(150, 60), keys=size(210, 90), k=11, window=window, sinks=1)
    assert_same(case, "q", blocks=ProgramSizes(32, 16, 4, 2))


@ORDER
def test_padding_may_hold_anything(causal):
    options = {"k": 5, "window": 4, "sinks": 2, "causal": causal, "implementation": "triton"}
    case = Case(batch=2, group=2, queries=size(40, 23), start=[0, 17], causal=causal)
    expected = sparsek_attention(*case.inputs, start=case.first, **options)
    dirty = [tensor.clone() for tensor in case.inputs]
    for tensor in dirty:
        tensor[1, :, :17] = torch.nan
    found = sparsek_attention(*dirty, start=case.first, **options)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.cross("values")
@pytest.mark.usefixtures("scan_of_torch")
@GATES
@pytest.mark.parametrize("scaling", [-0.7, 0.0])
def test_any_factor_scales_the_logits(scaling, soft):
    case = Case(group=2, queries=size(40, 23), soft=soft)

    def problem(*inputs):
        return case.problem(*inputs, scaling=scaling)

    expected = run(lambda *inputs: tiled_causal(problem(*inputs)), case)
    found = run(lambda *inputs: kernels.causal_sparsek_attention(problem(*inputs), blocks=SMALL, tile=16), case)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.cross("values")
@GATES
@ORDER
def test_a_window_beyond_the_row(soft, causal):
    """Positions are int32 in the kernels."""
    case = Case(group=2, queries=size(40, 19), soft=soft, causal=causal)
    options = {"k": 5, "gates": "soft" if soft else "hard", "causal": causal, "implementation": "triton"}
    near, far = (
        run(lambda *inputs, window=window: sparsek_attention(*inputs, window=window, sinks=2, **options), case)
        for window in (2 * case.queries, 2**40)
    )
    for name, expected in near.items():
        torch.testing.assert_close(far[name], expected, rtol=1e-6, atol=1e-6)


def test_a_query_without_a_key_gets_zero():
    case = Case(batch=2, start=[size(37, 21), 18], sinks=0)
    output = case.fused(*case.inputs)
    assert not output[0].any() and not output[1, :, :18].any() and output[1, :, 18:].all()


def test_a_table_of_intervals_is_all_a_kernel_knows():
    """Intervals of any kind, with a list that holds what the window does not reach, against a mask."""
    torch.manual_seed(0)
    queries, size = 50, 50
    q, k, v = (torch.randn(1, 1, size, 16, device=DEVICE) for _ in range(3))
    index = torch.arange(size, device=DEVICE)
    until = (index + 5).where(index % 3 > 0, index + 5 + index % 23)
    tile = 16
    lists = torch.full((1, 1, 4, size), -1, dtype=torch.int32, device=DEVICE)
    for number in range(4):
        old = index[(index <= number * tile - 5) & (until > number * tile)]
        lists[0, 0, number, : len(old)] = old
    tables = Tables(None, until.int().view(1, 1, -1), lists, tile, 4, 0, 0, index.new_zeros(1))
    at = torch.arange(queries, device=DEVICE)[:, None]
    mask = (index <= at) & (at < until)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    found = kernels.attend_listed(q, k, v, None, None, tables, 0.25, SMALL)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    order = by_lifetime(tables)
    assert (order.sort(-1).values == index).all()
    life = (until - index)[order[0, 0]]
    assert (life[1:] <= 1.5 * life[:-1]).all()  # half octaves, longest first


def test_one_kernel_serves_every_length():
    if DEVICE == "cpu":
        pytest.skip("the interpreter compiles nothing")
    attention_forward._forward.device_caches.clear()
    for queries in (100, 101, 128, 1000, 1024):
        case = Case(queries=queries, dim=32, k=9, window=8)
        case.fused(*case.inputs, blocks=None, tile=128)
    caches = [cache[0] for cache in attention_forward._forward.device_caches.values()]
    assert sum(map(len, caches)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.float64, "key": torch.float64, "value": torch.float64}, r"needs query in float32.*float64"),
        ({"scores": torch.float64}, r"scores in float32, .* torch.float64"),
    ],
)
def test_what_the_kernels_do_not_take(changes, message):
    case = Case()
    named = dict(zip(("query", "key", "value", "scores"), case.inputs, strict=True))
    named.update({name: named[name].to(dtype) for name, dtype in changes.items()})
    with pytest.raises(ValueError, match=message):
        sparsek_attention(**named, k=5, window=4, sinks=2, implementation="triton")


def test_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [tensor.cpu() for tensor in Case().inputs]
    with pytest.raises(ValueError, match="needs Triton and a CUDA device, got cpu"):
        sparsek_attention(*inputs, k=5, window=4, sinks=2, implementation="triton")


def test_a_head_that_is_too_large():
    case = Case(dim=264)
    with pytest.raises(ValueError, match=r"D of at most 256 and .*, 264 and 1"):
        sparsek_attention(*case.inputs, k=5, window=4, sinks=2, implementation="triton")


def test_auto_takes_the_kernels_on_a_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(kernels, "causal_sparsek_attention", lambda problem: taken.append(1) or problem.query)
    case = Case()
    sparsek_attention(*case.inputs, k=5, window=4, sinks=2)
    assert bool(taken) == (DEVICE == "cuda")
    sparsek_attention(*case.inputs, k=5, window=4, sinks=2, implementation="triton")
    assert taken
