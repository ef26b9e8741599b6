"""SparseK attention of encoders: the reference against loops, the tiles against the reference, and the promises."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from entmax import budget_bisect
from torch import Tensor

from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.selection import tiled
from hf_sparse.ops.selection.bidirectional import bidirectional_sparsek_attention
from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.reference import dense_sparsek_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Case:
    """Random inputs of one shape and budget."""

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    length: int = 37
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
        q = torch.randn(self.batch, self.kv_heads * self.group, self.length, self.dim, dtype=torch.float64)
        k = torch.randn(self.batch, self.kv_heads, self.length, self.dim, dtype=torch.float64)
        v = torch.randn_like(k)
        z = torch.randn(self.batch, self.kv_heads, self.length, dtype=torch.float64) * self.scale
        if self.ties:
            z = (z / 0.37).round() * 0.37
        self.inputs = [q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), z.to(self.dtype)]

    @property
    def first(self) -> Tensor | None:
        return None if self.start is None else torch.tensor(self.start)

    @property
    def real(self) -> Tensor:
        """`[B, 1, T, 1]` bool: tokens that are no padding."""
        first = torch.zeros(self.batch, dtype=torch.int64) if self.first is None else self.first
        return (torch.arange(self.length) >= first[:, None])[:, None, :, None]

    def attend(self, implementation: str, inputs: list[Tensor] | None = None, **options) -> Tensor:
        options = {"k": self.k, "window": self.window, "sinks": self.sinks, "start": self.first, **options}
        return sparsek_attention(
            *(inputs or self.inputs),
            gates="soft" if self.soft else "hard",
            support=self.support,
            implementation=implementation,
            **{"causal": False, **options},
        )

    def direct(self, implementation, *inputs, **options) -> Tensor:
        """Without the checks, and with the options that only the implementation has."""
        support = self.support if self.soft else self.k
        budget = (self.k, self.window, self.sinks, self.dim**-0.5, self.soft, support, self.first)
        return implementation(Problem(*inputs, *budget, causal=False), **options)


def run(attend, case: Case) -> tuple[Tensor, list[Tensor]]:
    """Output at real queries and the gradients of all inputs, for a fixed random upstream gradient."""
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    output = attend(*inputs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype) * case.real
    used = inputs if case.soft else inputs[:3]
    return output * case.real, list(torch.autograd.grad(output, used, upstream))


def assert_same(case: Case, tolerance: float, tile: int | None = None) -> None:
    expected, expected_gradients = run(lambda *inputs: case.direct(dense_sparsek_attention, *inputs), case)
    output, gradients = run(lambda *inputs: case.direct(bidirectional_sparsek_attention, *inputs, tile=tile), case)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    for name, ours, theirs in zip(("query", "key", "value", "scores"), gradients, expected_gradients, strict=False):
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"d {name}: {text}"
        )


# The reference itself.


def selection(scores: Tensor, case: Case) -> dict[int, float]:
    """Gates of the keys of one row, whose tokens all are real, by index; keys without a gate are not there."""
    length = len(scores)
    if length <= case.k + case.window + case.sinks:
        return dict.fromkeys(range(length), 1.0)
    others = sorted(range(case.sinks, length), key=lambda j: (-float(scores[j]), j))
    gates = dict.fromkeys(range(case.sinks), 1.0)
    if not case.soft:
        return gates | dict.fromkeys(others[: case.k], 1.0)
    others = others[: case.support]
    soft = torch.ones(len(others), dtype=torch.float64)
    if len(others) > case.k:
        soft = budget_bisect(scores[others], budget=float(case.k), dim=-1, n_iter=80)
    return gates | dict(zip(others, soft.tolist(), strict=True))


def loop_attention(case: Case) -> Tensor:
    """The definition, one query at a time, with entmax's projection; 0 at padding."""
    q, k, v, z = case.inputs
    output = torch.zeros_like(q)
    for b in range(case.batch):
        first = 0 if case.start is None else case.start[b]
        for h in range(case.kv_heads * case.group):
            g = h // case.group
            chosen = selection(z[b, g, first:], case)
            for i in range(case.length - first):
                begin = i - case.window // 2
                window = range(max(0, begin), min(case.length - first, begin + case.window))
                gates = chosen | dict.fromkeys(window, 1.0)
                index = torch.tensor(list(gates)) + first
                logits = k[b, g, index] @ q[b, h, first + i] * case.dim**-0.5
                weight = torch.tensor(list(gates.values()), dtype=torch.float64) * logits.exp()
                output[b, h, first + i] = weight @ v[b, g, index] / weight.sum()
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
        Case(window=7, soft=False),
        Case(k=0, soft=False),
        Case(batch=3, start=[0, 5, 37], sinks=3),
        Case(batch=4, start=[25, 26, 27, 36], soft=False),
        Case(batch=4, start=[25, 26, 27, 36]),
        Case(length=3, sinks=5, k=1, window=1),
        Case(sinks=50, soft=False),
        Case(window=90),
    ],
    ids=lambda case: (
        f"{'soft' if case.soft else 'hard'}-k{case.k}-w{case.window}-s{case.sinks}-support{case.support}-{case.start}"
    ),
)
def test_the_reference_is_the_definition(case):
    output = case.attend("dense")
    torch.testing.assert_close(output * case.real, loop_attention(case), rtol=0, atol=1e-11)


# The tiles.

CASES = {
    "plain": {},
    "odd length": {"length": 131},
    "one more than a tile": {"length": 65},
    **{f"{group} query heads per KV head": {"batch": 2, "kv_heads": 2, "group": group} for group in range(1, 9)},
    "no sinks": {"sinks": 0},
    "smallest budget": {"sinks": 0, "window": 1, "k": 1},
    "odd window": {"window": 7, "length": 90},
    "wide window": {"window": 30, "length": 90},
    "window beyond the length": {"window": 100},
    "budget beyond the length": {"k": 50, "window": 20},
    "budget of the length": {"k": 29, "window": 4, "sinks": 4},
    "budget of one less": {"k": 29, "window": 4, "sinks": 3},
    "sinks beyond the length": {"sinks": 50},
    "one token": {"length": 1},
    "one token, smallest budget": {"length": 1, "sinks": 0, "window": 1, "k": 1},
    "two tokens": {"length": 2, "sinks": 0, "window": 1, "k": 1},
    "padding": {"batch": 3, "start": [0, 7, 36]},
    "short rows": {"batch": 5, "start": [0, 25, 26, 27, 36]},
    "short rows alone": {"batch": 2, "start": [28, 30], "window": 12},
    "a row of padding": {"batch": 2, "start": [37, 2]},
    "ties": {"ties": True, "length": 90},
    "equal scores": {"scale": 0.0},
    "flat scores": {"scale": 0.02, "length": 90},
    "steep scores": {"scale": 20.0, "length": 90},
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
@pytest.mark.parametrize("name", [*CASES, "steep ties", "window only", "window only and padding", "nothing but itself"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_hard_tiles_equal_the_reference(name, dtype):
    only_hard = {
        # The soft gradient is not unique where scores tie at an end of the free interval.
        "steep ties": {"scale": 20.0, "ties": True, "length": 90},
        "window only": {"k": 0, "length": 90, "window": 9},
        "window only and padding": {"k": 0, "batch": 3, "start": [0, 30, 37]},
        "nothing but itself": {"k": 0, "window": 1, "sinks": 0},
    }
    shape = CASES.get(name) or only_hard.get(name, {})
    assert_same(Case(**shape, soft=False, dtype=dtype), PRECISIONS[dtype])


@pytest.mark.cross
@pytest.mark.parametrize("tile", [1, 2, 7, 37, 200])
@pytest.mark.parametrize("buffer", [1, 1 << 21], ids=["a tile at once", "all tiles at once"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_tile_size_changes_nothing(tile, buffer, soft, monkeypatch):
    monkeypatch.setitem(tiled._BUFFER, "cpu", buffer)
    for case in (
        Case(batch=2, kv_heads=2, group=2, start=[0, 9], soft=soft, support=11),
        Case(length=61, window=9, soft=soft),
    ):
        assert_same(case, 1e-10, tile=tile)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"kv_heads": 2, "group": 2, "length": 10, "dim": 2},
        {"batch": 2, "start": [0, 6], "length": 11},
        {"window": 40},
    ],
)
def test_gradcheck(shape):
    case = Case(**{"length": 12, "dim": 2, "k": 2, "window": 3, "sinks": 1, "support": 6, **shape})
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]

    def tiles(*tensors):
        return case.direct(bidirectional_sparsek_attention, *tensors, tile=5) * case.real

    def dense(*tensors):
        return case.direct(dense_sparsek_attention, *tensors) * case.real

    for attend in (tiles, dense):
        assert torch.autograd.gradcheck(attend, inputs, eps=1e-7, atol=1e-6, fast_mode=True)


def test_gradients_only_where_asked():
    case = Case(support=9)
    for wanted in range(4):
        inputs = [tensor.clone().requires_grad_(i == wanted) for i, tensor in enumerate(case.inputs)]
        case.attend("tiled", inputs).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [i == wanted for i in range(4)]


def test_scores_get_a_gradient_of_zero_where_everything_is_selected():
    """A batch of short sequences must not stop a training run for want of a gradient."""
    case = Case(k=100)
    scores = case.inputs[3].requires_grad_()
    case.attend("auto").sum().backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("gates", [{"soft": False}, {"k": 0}], ids=["hard", "window only"])
def test_the_scores_get_no_gradient_where_none_is_trained(gates):
    case = Case(**gates)
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    case.attend("tiled", inputs).sum().backward()
    assert inputs[0].grad is not None and inputs[3].grad is None


@pytest.mark.parametrize("implementation", ["auto", "tiled", "dense"])
@pytest.mark.parametrize("shape", [{"batch": 0}, {"length": 0}])
def test_empty(shape, implementation):
    case = Case(**shape)
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    output = case.attend(implementation, inputs)
    assert output.shape == inputs[0].shape
    output.sum().backward()
    assert inputs[0].grad is not None


# The promises.


@pytest.mark.cross
@pytest.mark.parametrize("implementation", ["auto", "tiled", "dense"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    "causal, budget",
    [(causal, budget) for causal in (True, False) for budget in ({}, {"k": 30}, {"sinks": 0})] + [(False, {"k": 0})],
    ids=str,
)
def test_padding_never_leaks(implementation, soft, causal, budget):
    """Whatever stands there, NaN and infinity included, outputs and gradients of real tokens stay as they are."""
    case = Case(batch=3, kv_heads=2, group=2, start=[0, 9, 30], soft=soft, support=30, **budget)
    trained = 4 if soft and case.k else 3

    def attend(filling: float) -> list[Tensor]:
        pad = ~case.real
        filled = [
            tensor.masked_fill(pad if tensor.ndim == 4 else pad[..., 0], filling).requires_grad_()
            for tensor in case.inputs
        ]
        output = case.attend(implementation, filled, causal=causal)
        assert torch.isfinite(output).all()
        return [output * case.real, *torch.autograd.grad((output * case.real).square().sum(), filled[:trained])]

    expected = attend(0.5)
    for filling in (torch.nan, torch.inf, -1e30):
        for ours, theirs in zip(attend(filling), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("implementation", ["auto", "tiled", "dense"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_padded_row_equals_the_row_alone(implementation, soft):
    case = Case(batch=4, kv_heads=2, group=2, start=[0, 12, 27, 36], soft=soft, support=9)
    batch = case.attend(implementation)
    for row, first in enumerate(case.start):
        alone = [tensor[row : row + 1, :, first:] for tensor in case.inputs]
        output = case.attend(implementation, alone, start=None)
        torch.testing.assert_close(batch[row : row + 1, :, first:], output, rtol=0, atol=1e-12)


@pytest.mark.cross
@pytest.mark.parametrize("implementation", ["auto", "tiled", "dense"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", [{}, {"group": 3, "kv_heads": 2}, {"batch": 3, "start": [0, 11, 36]}])
@pytest.mark.parametrize("budget", [(36, 1, 0), (1, 36, 0), (1, 1, 35), (20, 10, 7), (100, 100, 100)], ids=str)
def test_budget_of_the_length_is_dense_attention(implementation, soft, shape, budget):
    case = Case(**shape, soft=soft)
    k, window, sinks = budget
    q, key, value, _ = case.inputs
    mask = case.real.transpose(-1, -2)
    expected = F.scaled_dot_product_attention(q, key, value, mask, enable_gqa=True)
    output = case.attend(implementation, k=k, window=window, sinks=sinks)
    torch.testing.assert_close(output * case.real, expected * case.real, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["tiled", "dense"])
def test_soft_gates_of_far_apart_scores_are_hard(implementation):
    case = Case(batch=2, kv_heads=2, group=2, length=90, scale=1e5)
    soft = case.attend(implementation)
    case.soft = False
    torch.testing.assert_close(soft, case.attend(implementation), rtol=0, atol=1e-9)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_every_token_counts(soft):
    """An early query sees a late selected key: nothing here is causal."""
    case = Case(soft=soft)
    values = case.inputs[2].clone().requires_grad_()
    case.attend("tiled", [*case.inputs[:2], values, case.inputs[3]])[:, :, 0].sum().backward()
    reached = values.grad[0, 0].abs().sum(-1) > 0
    assert reached[20:].any()
    if not soft:
        assert set(case.inputs[3][0, 0, 2:].topk(case.k).indices.tolist()) <= set(
            (reached[2:]).nonzero()[:, 0].tolist()
        )


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_no_buffer_of_length_times_length(soft, largest_tensor, monkeypatch):
    monkeypatch.setitem(tiled._BUFFER, "cpu", 1 << 18)
    length = 8192
    case = Case(length=length, k=16, window=16, support=32, soft=soft, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    with largest_tensor() as largest:
        case.attend("auto", inputs).sum().backward()
    assert inputs[1].grad is not None
    assert largest.numel < length * length / 64


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_bfloat16_is_as_close_as_the_dense_path(soft):
    case = Case(kv_heads=2, group=3, length=200, dim=32, k=24, window=16, support=64, soft=soft)
    case.inputs = [tensor.to(torch.bfloat16).double() for tensor in case.inputs]
    expected, expected_gradients = run(lambda *t: case.attend("dense", list(t)), case)
    case.inputs = [tensor.to(torch.bfloat16) for tensor in case.inputs[:3]] + [case.inputs[3].float()]
    dense, dense_gradients = run(lambda *t: case.attend("dense", list(t)), case)
    ours, gradients = run(lambda *t: case.attend("tiled", list(t)), case)
    assert ours.dtype == torch.bfloat16
    for exact, reference, tensor in zip(
        [expected, *expected_gradients], [dense, *dense_gradients], [ours, *gradients], strict=True
    ):
        error, allowed = (tensor.double() - exact).square().mean(), (reference.double() - exact).square().mean()
        assert error.sqrt() <= 1.3 * allowed.sqrt()


# Messages.


def test_bad_input_is_refused():
    case = Case()
    fewer = [case.inputs[0][:, :, :20], *case.inputs[1:]]
    with pytest.raises(ValueError, match=r"without causal order every token .* Tq must be Tk, got 20 and 37"):
        case.attend("auto", fewer)
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        case.attend("auto", k=-1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        case.attend("auto", k=0, causal=True)
