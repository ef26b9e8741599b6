"""SparseK attention: the dense reference against loops, the tiles against the dense reference, and the promises."""

from copy import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from entmax import budget_bisect
from torch import Tensor

from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.selection import api, slots, tiled
from hf_sparse.ops.selection.causal import causal_sparsek_attention
from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.reference import dense_sparsek_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Case:
    """Random inputs of one shape and budget."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = 37
    keys: int = 37
    dim: int = 8
    k: int = 5
    window: int = 4
    sinks: int = 2
    soft: bool = True
    support: int | None = None
    start: list[int] | None = None
    scale: float = 1.0  # of the scores
    ties: bool = False
    dtype: torch.dtype = torch.float64
    inputs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        q = torch.randn(self.batch, self.kv_heads * self.group, self.queries, self.dim, dtype=torch.float64)
        k = torch.randn(self.batch, self.kv_heads, self.keys, self.dim, dtype=torch.float64)
        v = torch.randn_like(k)
        z = torch.randn(self.batch, self.kv_heads, self.keys, dtype=torch.float64) * self.scale
        if self.ties:
            z = (z / 0.37).round() * 0.37
        wide = torch.promote_types(self.dtype, torch.float32)
        self.inputs = [q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), z.to(wide)]

    @property
    def first(self) -> Tensor | None:
        return None if self.start is None else torch.tensor(self.start)

    @property
    def real(self) -> Tensor:
        """`[B, 1, Tq, 1]` bool: queries that are no padding."""
        first = torch.zeros(self.batch, dtype=torch.int64) if self.first is None else self.first
        position = torch.arange(self.keys - self.queries, self.keys)
        return (position >= first[:, None])[:, None, :, None]

    def problem(self, *inputs: Tensor) -> Problem:
        support = self.support if self.soft else self.k
        return Problem(
            *inputs, self.k, self.window, self.sinks, self.dim**-0.5, self.soft, support, self.first, causal=True
        )

    def attend(self, implementation: str, inputs: list[Tensor] | None = None, **options) -> Tensor:
        options = {"k": self.k, "window": self.window, "sinks": self.sinks, "start": self.first, **options}
        return sparsek_attention(
            *(inputs or self.inputs),
            gates="soft" if self.soft else "hard",
            support=self.support,
            implementation=implementation,
            **options,
        )


def run(attend, case: Case) -> tuple[Tensor, list[Tensor]]:
    """Output at real queries and the gradients of all inputs, for a fixed random upstream gradient."""
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    output = attend(*inputs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype) * case.real
    used = inputs if case.soft else inputs[:3]
    gradients = torch.autograd.grad(output, used, upstream)
    return output * case.real, list(gradients)


def as_case(case: Case, inputs: list[Tensor]) -> Case:
    other = copy(case)
    other.inputs = inputs
    return other


def assert_same(case: Case, tolerance: float, tile: int | None = None) -> None:
    def dense(*inputs):
        return dense_sparsek_attention(case.problem(*inputs))

    def tiles(*inputs):
        return causal_sparsek_attention(case.problem(*inputs), tile=tile)

    expected, expected_gradients = run(dense, case)
    output, gradients = run(tiles, case)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    for name, ours, theirs in zip(("query", "key", "value", "scores"), gradients, expected_gradients, strict=False):
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"d {name}: {text}"
        )


@pytest.mark.parametrize(
    "offset, slope, scale", [(1e6, 0, 1), (1e7, 0, 1), (0, 10, 1), (0, 0, 1e8), (0, 0, 1e12), (-1e6, 1, 10)]
)
def test_large_scores_have_exact_gates(offset, slope, scale):
    # Gates of the same float32 scores, computed in float64.
    case = Case(kv_heads=2, queries=120, keys=150, k=20, support=60, dtype=torch.float32)
    scores = case.inputs[3] * scale + offset + slope * torch.arange(150.0)
    exact = [tensor.double() for tensor in (*case.inputs[:3], scores)]
    expected, expected_gradients = run(
        lambda *inputs: dense_sparsek_attention(case.problem(*inputs)), as_case(case, exact)
    )
    for attend in (dense_sparsek_attention, causal_sparsek_attention):
        output, gradients = run(
            lambda *inputs, attend=attend: attend(case.problem(*inputs)),
            as_case(case, [*case.inputs[:3], scores]),
        )
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


# The reference itself.


def loop_attention(case: Case) -> Tensor:
    """The definition, one query at a time, with entmax's projection."""
    q, k, v, z = case.inputs
    first = [0] * case.batch if case.start is None else case.start
    output = torch.zeros_like(q)
    for b in range(case.batch):
        for h in range(case.kv_heads * case.group):
            g = h // case.group
            for t in range(case.queries):
                p = case.keys - case.queries + t
                near = [j for j in range(first[b], p + 1) if j > p - case.window or j < first[b] + case.sinks]
                old = [j for j in range(first[b], p + 1) if j not in near]
                old.sort(key=lambda j, b=b, g=g: (-float(z[b, g, j]), j))
                if not case.soft:
                    kept, gate = old[: case.k], torch.ones(min(case.k, len(old)), dtype=torch.float64)
                else:
                    kept = old[: case.support]
                    scores = z[b, g, kept]
                    gate = torch.ones(len(kept), dtype=torch.float64)
                    if len(kept) > case.k:
                        gate = budget_bisect(scores, budget=float(case.k), dim=-1, n_iter=80)
                if near or kept:
                    index = near + kept
                    gate = torch.cat([torch.ones(len(near), dtype=torch.float64), gate])
                    weight = gate * torch.exp(k[b, g, index] @ q[b, h, t] * case.dim**-0.5)
                    output[b, h, t] = weight @ v[b, g, index] / weight.sum()
    return output


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, kv_heads=2, group=2, soft=False),
        Case(batch=2, kv_heads=2, group=2, soft=False, ties=True, scale=0.3),
        Case(kv_heads=2, group=2),
        Case(support=7, scale=0.1),
        Case(support=5, ties=True),
        Case(sinks=0, window=1, k=1),
        Case(batch=3, start=[0, 5, 37], queries=20, sinks=3),
        Case(batch=2, start=[3, 30], soft=False),
    ],
    ids=lambda case: ("soft" if case.soft else "hard") + f"-support{case.support}-start{case.start}-ties{case.ties}",
)
def test_the_dense_reference_is_the_definition(case):
    output = case.attend("dense")
    torch.testing.assert_close(output * case.real, loop_attention(case) * case.real, rtol=0, atol=1e-11)


# The tiles.

CASES = {
    "plain": {},
    "odd length": {"queries": 131, "keys": 131},
    "one more than a tile": {"queries": 65, "keys": 65},
    **{f"{group} query heads per KV head": {"batch": 2, "kv_heads": 2, "group": group} for group in range(1, 9)},
    "no sinks": {"sinks": 0},
    "smallest budget": {"sinks": 0, "window": 1, "k": 1},
    "wide window": {"window": 30, "queries": 90, "keys": 90},
    "budget beyond the length": {"k": 50, "window": 20},
    "many sinks": {"sinks": 50},
    "fewer queries than keys": {"queries": 21, "keys": 90},
    "one query": {"queries": 1, "keys": 60},
    "one token": {"queries": 1, "keys": 1},
    "padding": {"batch": 3, "start": [0, 7, 36]},
    "padding and fewer queries": {"batch": 4, "start": [0, 7, 55, 59], "queries": 12, "keys": 60},
    "a row of padding": {"batch": 2, "start": [37, 2]},
    "ties": {"ties": True, "queries": 90, "keys": 90},
    "equal scores": {"scale": 0.0},
    "flat scores": {"scale": 0.02, "queries": 90, "keys": 90},
    "steep scores": {"scale": 20.0, "queries": 90, "keys": 90},
}
PRECISIONS = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.cross("values")
@pytest.mark.parametrize("support", [None, 1, 2, 4], ids=lambda times: f"support-{times}k")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_soft_tiles_equal_the_reference(name, support, dtype):
    case = Case(**CASES[name], dtype=dtype)
    case.support = None if support is None else support * case.k
    assert_same(case, PRECISIONS[dtype])


@pytest.mark.cross("values")
@pytest.mark.parametrize("name", [*CASES, "steep ties"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_hard_tiles_equal_the_reference(name, dtype):
    # Steep ties are here alone: the soft gradient is not unique where scores tie at an end of the free interval.
    shape = CASES.get(name, {"scale": 20.0, "ties": True, "queries": 90, "keys": 90})
    assert_same(Case(**shape, soft=False, dtype=dtype), PRECISIONS[dtype])


@pytest.mark.cross
@pytest.mark.parametrize("tile", [1, 2, 7, 37, 200])
@pytest.mark.parametrize("buffer", [1, 1 << 21], ids=["a tile at once", "all tiles at once"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_tile_size_changes_nothing(tile, buffer, soft, monkeypatch):
    monkeypatch.setitem(tiled._BUFFER, "cpu", buffer)
    for case in (
        Case(batch=2, kv_heads=2, group=2, start=[0, 9], soft=soft, support=11),
        Case(queries=23, keys=61, soft=soft),
    ):
        assert_same(case, 1e-10, tile=tile)


def test_inputs_that_are_not_contiguous():
    case = Case(batch=2, kv_heads=2, group=2, support=9)
    expected = case.attend("tiled")
    views = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in case.inputs]
    assert not views[0].is_contiguous()
    assert torch.equal(case.attend("tiled", views), expected)


def test_gradients_only_where_asked():
    case = Case(support=9)
    for wanted in range(4):
        inputs = [tensor.clone().requires_grad_(i == wanted) for i, tensor in enumerate(case.inputs)]
        case.attend("tiled", inputs).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [i == wanted for i in range(4)]


def test_gradcheck():
    case = Case(queries=12, keys=16, dim=3, k=2, window=2, sinks=1, support=6)
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    assert torch.autograd.gradcheck(
        lambda *tensors: causal_sparsek_attention(case.problem(*tensors), tile=5),
        inputs,
        eps=1e-7,
        atol=1e-6,
        fast_mode=True,
    )


def test_scores_get_a_gradient_of_zero_where_everything_is_selected(monkeypatch):
    """A batch of short sequences must not stop a training run for want of a gradient; torch's own attention does it."""
    monkeypatch.setattr(api, "causal_sparsek_attention", None)
    case = Case(k=100)
    scores = case.inputs[3].requires_grad_()
    case.attend("auto").sum().backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_hard_selection_gives_the_scores_no_gradient():
    case = Case(soft=False)
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    case.attend("tiled", inputs).sum().backward()
    assert inputs[0].grad is not None and inputs[3].grad is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gates", ["hard", "soft"])
def test_a_window_or_sinks_beyond_the_row(gates, causal):
    inputs = [torch.randn(1, heads, 9, 4) for heads in (2, 1, 1)]
    scores = torch.randn(1, 1, 9, requires_grad=gates == "soft")
    options = {"k": 2, "gates": gates, "causal": causal, "implementation": "tiled"}
    for near, far in (({"window": 18, "sinks": 1}, {"window": 2**40, "sinks": 1}), ({"sinks": 9}, {"sinks": 2**40})):
        expected, found = (
            sparsek_attention(*inputs, scores, **{"window": 2, **size, **options}) for size in (near, far)
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["auto", "tiled", "dense"])
@pytest.mark.parametrize("shape", [{"batch": 0}, {"queries": 0}, {"queries": 0, "keys": 0}])
def test_empty(shape, implementation):
    case = Case(**shape)
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    output = case.attend(implementation, inputs)
    assert output.shape == inputs[0].shape
    output.sum().backward()
    assert inputs[0].grad is not None


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_padded_queries_stay_finite(soft):
    for sinks in (0, 2):
        case = Case(batch=2, start=[10, 37], soft=soft, sinks=sinks, support=9)
        for implementation in ("auto", "tiled"):
            inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
            output = case.attend(implementation, inputs)
            output.mul(100).sum().backward()
            assert torch.isfinite(output).all()
            assert all(torch.isfinite(t.grad).all() for t in inputs if t.grad is not None)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_bfloat16_is_as_close_as_the_dense_path(soft):
    case = Case(kv_heads=2, group=3, queries=200, keys=200, dim=32, k=24, window=16, support=64, soft=soft)
    case.inputs = [tensor.to(torch.bfloat16).double() for tensor in case.inputs]
    expected, expected_gradients = run(lambda *t: dense_sparsek_attention(case.problem(*t)), case)
    case.inputs = [tensor.to(torch.bfloat16) for tensor in case.inputs[:3]] + [case.inputs[3].float()]
    dense, dense_gradients = run(lambda *t: dense_sparsek_attention(case.problem(*t)), case)
    ours, gradients = run(lambda *t: causal_sparsek_attention(case.problem(*t)), case)
    assert ours.dtype == torch.bfloat16
    for exact, reference, tensor in zip(
        [expected, *expected_gradients], [dense, *dense_gradients], [ours, *gradients], strict=True
    ):
        error, allowed = (tensor.double() - exact).square().mean(), (reference.double() - exact).square().mean()
        assert error.sqrt() <= 1.3 * allowed.sqrt()


# The promises.


@pytest.mark.cross
@pytest.mark.parametrize("implementation", ["auto", "tiled", "dense"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", [{}, {"group": 3, "kv_heads": 2}, {"queries": 9}, {"batch": 2, "start": [0, 11]}])
@pytest.mark.parametrize("budget", [(37, 1, 0), (1, 37, 0), (1, 1, 35), (20, 10, 7), (100, 100, 100)], ids=str)
def test_budget_of_the_length_is_dense_attention(implementation, soft, shape, budget):
    case = Case(**shape, soft=soft)
    k, window, sinks = budget
    q, key, value, _ = case.inputs
    position = torch.arange(case.keys - case.queries, case.keys)[:, None]
    index = torch.arange(case.keys)
    first = torch.zeros(case.batch, dtype=torch.int64) if case.first is None else case.first
    mask = (index <= position) & ((index >= first[:, None, None, None]) | (index == position))
    expected = F.scaled_dot_product_attention(q, key, value, mask, enable_gqa=True)
    output = case.attend(implementation, k=k, window=window, sinks=sinks)
    torch.testing.assert_close(output * case.real, expected * case.real, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["tiled", "dense"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_future_is_not_seen(implementation, soft):
    case = Case(batch=2, kv_heads=2, group=2, queries=90, keys=90, soft=soft)
    before = case.attend(implementation)
    for t in (1, 40, 63, 64, 89):
        changed = [tensor.clone() for tensor in case.inputs]
        for tensor in changed:
            tensor[:, :, t:] = torch.randn_like(tensor[:, :, t:]) * 3
        after = case.attend(implementation, changed)
        if soft:  # thresholds of a tile are found together: the last bit may differ
            torch.testing.assert_close(after[:, :, :t], before[:, :, :t], rtol=0, atol=1e-13)
        else:
            assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.allclose(after[:, :, t:], before[:, :, t:])


@pytest.mark.parametrize("implementation", ["tiled", "dense"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_keys_that_fell_out_can_be_forgotten(implementation, soft, ties):
    queries = 25
    case = Case(queries=queries, keys=100, soft=soft, ties=ties)
    whole = case.attend(implementation)
    # What the first of these queries can reach, by which keys its output depends on.
    p = case.keys - queries
    values = case.inputs[2].clone().requires_grad_()
    q, key, _, z = case.inputs
    first = case.attend("dense", [q[:, :, :1], key[:, :, : p + 1], values[:, :, : p + 1], z[:, :, : p + 1]])
    first.sum().backward()
    kept = (values.grad[0, 0].abs().sum(-1) > 0) | (torch.arange(case.keys) > p)
    assert kept.sum() < case.keys - 20
    if not soft:
        assert kept[: p + 1].sum() == case.k + case.window + case.sinks
    fewer = [q, *(tensor[:, :, kept] for tensor in case.inputs[1:])]
    torch.testing.assert_close(case.attend(implementation, fewer), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["tiled", "dense"])
def test_soft_gates_of_far_apart_scores_are_hard(implementation):
    case = Case(batch=2, kv_heads=2, group=2, queries=90, keys=90, scale=1e5)
    soft = case.attend(implementation)
    case.soft = False
    torch.testing.assert_close(soft, case.attend(implementation), rtol=0, atol=1e-9)


def test_a_long_sequence_in_chunks_equals_one_pass():
    case = Case(kv_heads=2, group=2, queries=200, keys=200, soft=False)
    q, k, v, z = case.inputs
    whole = case.attend("tiled")
    for begin, end in ((0, 1), (1, 50), (50, 51), (51, 200)):
        part = case.attend("tiled", [q[:, :, begin:end], k[:, :, :end], v[:, :, :end], z[:, :, :end]])
        torch.testing.assert_close(part, whole[:, :, begin:end], rtol=0, atol=1e-13)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_no_buffer_of_length_times_length(soft, largest_tensor, monkeypatch):
    monkeypatch.setitem(tiled._BUFFER, "cpu", 1 << 18)
    length = 8192
    case = Case(queries=length, keys=length, k=16, window=16, support=32, soft=soft, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    with largest_tensor() as largest:
        case.attend("auto", inputs).sum().backward()
    assert inputs[1].grad is not None
    assert largest.numel < length * length / 64


# Messages.


def bad(message: str, **changes):
    return pytest.param(changes, message, id=message[:40])


@pytest.mark.parametrize(
    "changes, message",
    [
        bad(r"expected query \[B, Hq, Tq, D\].* got query \(4, 6, 8\), key", query=torch.randn(4, 6, 8)),
        bad(r"expected query .* value \(1, 2, 5, 8\)", value=torch.randn(1, 2, 5, 8)),
        bad(r"Hq must be a multiple of Hkv .* got query \(1, 3, 6, 8\) and key \(1, 2, 6, 8\)", query=(1, 3, 6, 8)),
        bad(r"Tq at most Tk, got query \(1, 4, 7, 8\)", query=torch.randn(1, 4, 7, 8)),
        bad(r"must share B and D.* got query \(1, 4, 6, 4\)", query=torch.randn(1, 4, 6, 4)),
        bad(r"must share B and D.* got query \(2, 4, 6, 8\)", query=torch.randn(2, 4, 6, 8)),
        bad(r"scores must be \[B, Hkv, Tk\] = \(1, 2, 6\), got \(1, 4, 6\)", scores=torch.randn(1, 4, 6)),
        bad(r"scores must be float32 or float64 .* got torch.bfloat16", scores=torch.randn(1, 2, 6).bfloat16()),
        bad(r"start must be \[B\] = \(1,\), got \(2,\)", start=torch.zeros(2, dtype=torch.int64)),
        bad("k must be at least 1, got 0", k=0),
        bad("window must be at least 1, got 0", window=0),
        bad("sinks must be at least 0, got -1", sinks=-1),
        bad("support must be at least k = 2, got 1", support=1),
        bad("gates must be one of 'hard', 'soft', got 'warm'", gates="warm"),
        bad("implementation must be one of 'auto', 'triton', 'tiled', 'dense', got 'flash'", implementation="flash"),
    ],
)
def test_bad_input_is_refused(changes, message):
    arguments = {
        "query": torch.randn(1, 4, 6, 8),
        "key": torch.randn(1, 2, 6, 8),
        "value": torch.randn(1, 2, 6, 8),
        "scores": torch.randn(1, 2, 6),
        **{name: torch.randn(value) if isinstance(value, tuple) else value for name, value in changes.items()},
    }
    with pytest.raises(ValueError, match=message):
        sparsek_attention(**{"k": 2, "window": 1, "sinks": 1, **arguments})


@pytest.mark.parametrize("more", [0, 1])
def test_the_kernels_get_no_more_rows_than_a_grid_has(more, monkeypatch):
    """What is above runs in PyTorch, where it was not the kernels that were asked for."""
    monkeypatch.setattr(api, "available", lambda device: True)
    query, scores = (torch.empty(5, 13_107 + more, 1, *end, device="meta") for end in ((8,), ()))
    if more:
        with pytest.raises(ValueError, match=r"B \* Hkv of at most 65535, got .* 8 and 65540"):
            api._takes_kernels("triton", query, scores)
    else:
        assert api._takes_kernels("triton", query, scores)
    keys = SimpleNamespace(
        is_cuda=True, device=SimpleNamespace(index=0), dtype=torch.float32, shape=(65_535 + more, 1, 4, 8)
    )
    keys.is_contiguous = lambda: True
    monkeypatch.setattr(slots, "_TRITON", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert slots.has_kernels(keys) == (not more)
