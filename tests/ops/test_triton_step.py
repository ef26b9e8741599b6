"""A decoding step in one kernel against the steps that it is made of: the same slots bit by bit, the same attention."""

import pytest
import torch

from hf_sparse.ops import decode
from hf_sparse.ops import scores as linear
from hf_sparse.ops.triton import step as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16
WINDOW, SINKS, COLUMNS = 5, 2, 70


@pytest.fixture
def plain(monkeypatch):
    """Makes the reference use PyTorch, on a GPU too."""
    monkeypatch.setattr(decode, "_TRITON", False)
    monkeypatch.setattr(linear, "_TRITON", False)


class Slots:
    """The state of a cache layer, and one step of it as the reference takes it."""

    def __init__(self, batch: int, heads: int, number: int, dim: int, dtype: torch.dtype) -> None:
        self.keys, self.values = torch.zeros(2, batch, heads, number, dim, dtype=dtype, device=DEVICE)
        self.positions = torch.full((batch, heads, number), -1, device=DEVICE)
        self.scores = torch.zeros(batch, heads, number, device=DEVICE)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        self.padded_late = torch.zeros(batch, dtype=torch.bool, device=DEVICE)
        self.total = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values, self.scores, self.positions, self.seen, self.padded_late, self.total]

    def step(self, query, key, value, states, weight, slope, valid, *, position_slope, scaling):
        scores = states.double() if weight is None else linear.linear_scores(states, weight)
        slopes = position_slope + (0 if slope is None else slope.double()[:, None] / 256)
        scores = (scores + self.seen[:, None, None].double() * slopes).float()
        if valid is not None:
            self.padded_late |= ~valid & (self.seen > 0)
        state = (self.keys, self.values, self.scores, self.positions, self.seen)
        decode.insert_token(*state, key, value, scores, valid, window=WINDOW, sinks=SINKS)
        self.seen += 1 if valid is None else valid.long()
        self.total += 1
        doubles = (query.double(), self.keys.double(), self.values.double())
        return decode.attend_slots(*doubles, self.positions, scaling=scaling)


# batch, KV heads, query heads per KV head, slots, head size, programs, slots searched at a time
SHAPES = [
    (3, 2, 1, 11, 6, 1, 1024),
    (2, 1, 4, 40, 80, 1, 16),
    (1, 2, 3, 50, 64, 256, 32),  # split over programs
    (2, 1, 8, 33, 16, 6, 16),
    (1, 1, 20, 17, 32, 256, 1024),
]


@pytest.mark.parametrize("kind", ["normal", "ties", "rising", "given"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_is_that_of_the_reference(plain, monkeypatch, poisoned_memory, shape, dtype, padded, kind):
    batch, heads, group, number, dim, programs, chunk = shape
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    monkeypatch.setattr(kernels, "_CHUNK", chunk)
    monkeypatch.setattr(kernels, "_COLUMNS", 32)
    length = number + 12
    ours, theirs = Slots(batch, heads, number, dim, dtype), Slots(batch, heads, number, dim, dtype)
    # As a model hands them over: a view with heads and tokens swapped.
    query = torch.randn(batch, length, heads * group, dim, device=DEVICE).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, length, heads, dim, device=DEVICE).to(dtype).transpose(2, 3)
    states = torch.randn(batch, length, COLUMNS, device=DEVICE).to(dtype) * 3 + 1
    if kind == "ties":
        states = states[:, :3].repeat(1, length // 3 + 1, 1)[:, :length].contiguous()
    weight = None if kind == "given" else torch.randn(heads, COLUMNS, device=DEVICE)
    given = torch.randn(batch, heads, length, device=DEVICE).round()
    slope = torch.randn(heads, device=DEVICE) if kind == "rising" else None
    valid = torch.rand(batch, length, device=DEVICE) < 0.8
    options = {"position_slope": 0.013 if kind == "rising" else 0.0, "scaling": 0.3}
    kernel = None
    for t in range(length):
        new = [tensor[:, :, t : t + 1] for tensor in (query, key, value)]
        new.append(given[:, :, t : t + 1].contiguous() if weight is None else states[:, t : t + 1])
        real = valid[:, t] if padded else None
        if kernel is None:
            more = {"slope_tokens": 256, "masked": padded, "window": WINDOW, "sinks": SINKS}
            kernel = kernels.StepKernel(ours.tensors(), *new[:3], weight, slope, **more, **options)
        output = kernel(*new, weight, slope, real)
        expected = theirs.step(*new, weight, slope, real, **options)
        for mine, other in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(mine, other), t
        assert output.dtype == dtype and output.shape == new[0].shape and output.is_contiguous()
        error = (output.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < (2e-6 if dtype == torch.float32 else 1e-2), t
    assert not kernel.scratch[2].any(), "the counters did not return to zero"
    assert padded or (ours.positions >= 0).all(), "the slots never filled up"
