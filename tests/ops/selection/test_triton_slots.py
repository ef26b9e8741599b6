"""The kernels of a decoding step against PyTorch: the same slots bit by bit, the same attention."""

import pytest
import torch

from hf_sparse.ops.selection import slots as reference
from hf_sparse.ops.selection.triton import slot_filling
from hf_sparse.ops.selection.triton import slots as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16
WINDOW, SINKS = 5, 2


@pytest.fixture
def plain(monkeypatch):
    """Makes the functions of `ops.selection.slots` use PyTorch, on a GPU too."""
    monkeypatch.setattr(reference, "_TRITON", False)


def slots(batch: int, heads: int, number: int, dim: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Empty keys, values, scores, positions and seen."""
    keys, values = torch.zeros(2, batch, heads, number, dim, dtype=dtype, device=DEVICE)
    positions = torch.full((batch, heads, number), -1, device=DEVICE)
    return [keys, values, torch.zeros(batch, heads, number, device=DEVICE), positions, positions.new_zeros(batch)]


@pytest.mark.cross("values")
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "rising"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_same_slots_are_replaced(plain, kind, padded):
    batch, heads, number, dim, length = 3, 2, 11, 6, 40
    ours, theirs = slots(batch, heads, number, dim), slots(batch, heads, number, dim)
    # As a model hands them over: a view with heads and tokens swapped.
    key, value = torch.randn(2, batch, length, heads, dim, device=DEVICE).transpose(2, 3)
    scores = torch.randn(batch, heads, length, device=DEVICE)
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "rising":
        scores += torch.arange(length, device=DEVICE) * 0.2
    valid = torch.rand(batch, length, device=DEVICE) < 0.7
    for t in range(length):
        new = [tensor[:, :, t : t + 1] for tensor in (key, value, scores)]
        real = valid[:, t] if padded else None
        for step, state in ((kernels.insert_token, ours), (reference.insert_token, theirs)):
            step(*state, *new, real, window=WINDOW, sinks=SINKS)
            state[-1] += 1 if real is None else real.long()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), t
    assert (ours[3] >= 0).all(), "the slots never filled up"


@pytest.mark.cross("values")
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "signs"])
@pytest.mark.parametrize("length", [1, 10, 11, 12, 70])
def test_a_whole_text_fills_the_same_slots(plain, kind, length, monkeypatch, poisoned_memory):
    monkeypatch.setattr(slot_filling, "_KEYS", 32)  # a text of several parts
    batch, heads, number, dim = 2, 3, 11, 6
    ours, theirs = slots(batch, heads, number, dim), slots(batch, heads, number, dim)
    key, value = torch.randn(2, batch, length, heads, dim, device=DEVICE).transpose(2, 3)
    scores = torch.randn(batch, heads, length, device=DEVICE)
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "signs":
        scores = scores.sign() * 0.0
    slot_filling.fill_slots(*ours, key, value, scores, window=WINDOW, sinks=SINKS)
    reference.fill_slots(*theirs, key, value, scores, window=WINDOW, sinks=SINKS)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_a_padded_row_writes_nothing():
    state = [tensor.fill_(7) for tensor in slots(2, 1, 8, 4)]
    before = [tensor.clone() for tensor in state]
    new = [torch.full(shape, torch.nan, device=DEVICE) for shape in ((2, 1, 1, 4), (2, 1, 1, 4), (2, 1, 1))]
    real = torch.zeros(2, dtype=torch.bool, device=DEVICE)
    kernels.insert_token(*state, *new, real, window=WINDOW, sinks=SINKS)
    for tensor, old in zip(state, before, strict=True):
        assert torch.equal(tensor, old)


# batch, KV heads, query heads per KV head, slots, head size, programs
SHAPES = [
    (2, 2, 1, 11, 32, 1),
    (2, 1, 4, 130, 80, 1),
    (1, 2, 3, 200, 64, 256),  # split over programs
    (1, 1, 8, 193, 96, 3),
    (1, 1, 20, 70, 16, 256),
]


@pytest.mark.cross("values")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("batch, heads, group, number, dim, programs", SHAPES)
def test_attention(plain, monkeypatch, poisoned_memory, batch, heads, group, number, dim, programs, dtype):
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    keys, values, _, positions, _ = slots(batch, heads, number, dim, dtype)
    count = torch.tensor([number, 1 + number // 3], device=DEVICE)[:batch]  # rows of different lengths
    filled = torch.arange(number, device=DEVICE) < count[:, None, None]
    positions[filled.expand_as(positions)] = 5
    keys[:], values[:] = torch.randn(2, *keys.shape, device=DEVICE).to(dtype)
    query = torch.randn(batch, 1, heads * group, dim, device=DEVICE).to(dtype).transpose(1, 2)
    expected = reference.attend_slots(query.double(), keys.double(), values.double(), positions, scaling=0.3)
    poison = ~filled.expand_as(positions)
    keys[poison], values[poison] = torch.nan, torch.nan  # what an empty slot holds does not matter
    output = kernels.attend_slots(query, keys, values, positions, scaling=0.3)
    assert output.dtype == dtype and output.shape == query.shape
    error = (output.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)


def test_without_any_key_the_output_is_finite():
    keys, values, _, positions, _ = slots(1, 1, 130, 16)
    query = torch.randn(1, 2, 1, 16, device=DEVICE)
    assert torch.equal(kernels.attend_slots(query, keys, values, positions, scaling=1.0), torch.zeros_like(query))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_step_is_captured_in_a_cuda_graph(plain):
    state, twin = slots(2, 2, 300, 64, torch.bfloat16), slots(2, 2, 300, 64, torch.bfloat16)
    query = torch.randn(2, 8, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    new = [torch.randn(2, 2, 1, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    new.append(torch.randn(2, 2, 1, device=DEVICE))

    def step(owner, tensors):
        owner.insert_token(*tensors, *new, None, window=WINDOW, sinks=SINKS)
        tensors[-1] += 1
        return owner.attend_slots(query, tensors[0], tensors[1], tensors[3], scaling=0.1)

    for _ in range(3):  # compiles the kernels
        step(kernels, state)
        expected = step(reference, twin)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(kernels, state)
    for _ in range(310):
        for tensor in new:
            tensor.normal_()
        graph.replay()
        expected = step(reference, twin)
    for mine, other in zip(state, twin, strict=True):
        assert torch.equal(mine, other)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
