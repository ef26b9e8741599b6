"""The kernels of a decoding step where heads have different numbers of slots, against every head alone in PyTorch."""

import pytest
import torch

from hf_sparse.ops.selection import linear_scores as linear
from hf_sparse.ops.selection import ragged
from hf_sparse.ops.selection import slots as reference
from hf_sparse.ops.selection.triton import slot_filling, step
from hf_sparse.ops.selection.triton import slots as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16
WINDOW, SINKS, COLUMNS = 5, 2, 40


@pytest.fixture
def plain(monkeypatch):
    """Makes the reference use PyTorch, on a GPU too."""
    monkeypatch.setattr(reference, "_TRITON", False)
    monkeypatch.setattr(linear, "_TRITON", False)


def buffers(batch: int, counts, dim: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Empty keys, values, scores, positions and seen."""
    total = sum(counts)
    keys, values = torch.zeros(2, batch, total, dim, dtype=dtype, device=DEVICE)
    positions = torch.full((batch, total), -1, device=DEVICE)
    return [keys, values, torch.zeros(batch, total, device=DEVICE), positions, positions.new_zeros(batch)]


@pytest.mark.cross("values")
@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("counts", [(8, 17, 11), (40, 8)])
def test_the_same_slots_are_replaced(plain, counts, kind, padded):
    batch, heads, dim, length = 3, len(counts), 6, 50
    ours, theirs = buffers(batch, counts, dim), buffers(batch, counts, dim)
    key, value = torch.randn(2, batch, length, heads, dim, device=DEVICE).transpose(2, 3)
    scores = torch.randn(batch, heads, length, device=DEVICE)
    scores = scores.round() if kind == "ties" else scores
    valid = torch.rand(batch, length, device=DEVICE) < 0.8
    layout = {"counts": counts, "offsets": ragged.offsets_of(counts, torch.device(DEVICE))}
    for t in range(length):
        new = [tensor[:, :, t : t + 1] for tensor in (key, value, scores)]
        real = valid[:, t] if padded else None
        for insert, state in ((kernels.insert_token, ours), (ragged.insert_token, theirs)):
            insert(*state, *new, real, window=WINDOW, sinks=SINKS, **layout)
            state[-1] += 1 if real is None else real.long()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), t
    assert padded or (ours[3] >= 0).all(), "the slots never filled up"


@pytest.mark.cross("values")
@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("length", [1, 9, 17, 18, 70])
def test_a_whole_text_fills_the_same_slots(plain, kind, length, monkeypatch, poisoned_memory):
    monkeypatch.setattr(slot_filling, "_KEYS", 32)  # a text of several parts
    batch, counts, dim = 2, (8, 17, 40, 11), 6
    ours, theirs = buffers(batch, counts, dim), buffers(batch, counts, dim)
    key, value = torch.randn(2, batch, length, len(counts), dim, device=DEVICE).transpose(2, 3)
    scores = torch.randn(batch, len(counts), length, device=DEVICE)
    scores = scores.round() if kind == "ties" else scores
    offsets = ragged.offsets_of(counts, torch.device(DEVICE))
    options = {"offsets": offsets, "window": WINDOW, "sinks": SINKS}
    slot_filling.fill_slots(*ours, key, value, scores, most=max(counts), **options)
    ragged.fill_slots(*theirs, key, value, scores, counts=counts, **options)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


# batch, slots of each KV head, query heads per KV head, head size, programs
SHAPES = [
    (2, (11, 30), 1, 32, 1),
    (1, (130, 20, 64), 3, 64, 256),  # split over programs
    (2, (16, 193), 8, 96, 5),
]


@pytest.mark.cross("values")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("batch, counts, group, dim, programs", SHAPES)
def test_attention(plain, monkeypatch, poisoned_memory, batch, counts, group, dim, programs, dtype):
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    keys, values, _, positions, _ = buffers(batch, counts, dim, dtype)
    keys.normal_(), values.normal_()
    for row in range(batch):
        for head in ragged.of_heads(positions, counts):
            filled = min(head.shape[2], 9 + 40 * row)
            head[row, 0, :filled] = torch.arange(filled, device=DEVICE)
    query = torch.randn(batch, 1, len(counts) * group, dim, device=DEVICE).to(dtype).transpose(1, 2)
    layout = {"counts": counts, "offsets": ragged.offsets_of(counts, torch.device(DEVICE))}
    output = kernels.attend_slots(query, keys, values, positions, scaling=0.3, **layout)
    doubles = (query.double(), keys.double(), values.double())
    expected = ragged.attend_slots(*doubles, positions, scaling=0.3, **layout)
    error = (output.double() - expected).norm() / expected.norm()
    assert output.shape == query.shape and error < (2e-6 if dtype == torch.float32 else 1e-2)


# batch, slots of each KV head, query heads per KV head, head size, programs, those of the longest, tokens read before
STEPS = [
    (2, (10, 24, 17), 2, 16, 1, 1, 0),
    (1, (34, 9), 3, 6, 7, 3, 0),
    (1, (150, 20, 40), 3, 6, 256, 10, 140),
    (1, (128, 16, 70), 1, 6, 256, 8, 124),
    (2, (9, 300), 2, 6, 22, 10, 297),  # two blocks of slots each
]


@pytest.mark.cross("values")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("batch, counts, group, dim, programs, splits, read", STEPS)
def test_a_step_in_one_kernel(
    plain, monkeypatch, poisoned_memory, batch, counts, group, dim, programs, splits, read, dtype, padded
):
    monkeypatch.setattr(step, "_BYTES", 1)  # blocks of 16 slots
    monkeypatch.setattr(step, "_PROGRAMS", programs)
    monkeypatch.setattr(step, "_CHUNK", 16)
    heads, length = len(counts), max(counts) + 5 - read
    ours = buffers(batch, counts, dim, dtype)
    for tensor in ours[:3]:
        tensor.normal_()
    ours[-1].fill_(read)
    for head in ragged.of_heads(ours[3], counts):
        some = min(head.shape[2], read)
        head[:, :, :some] = torch.arange(read - some, read, device=DEVICE)
    theirs = [tensor.clone() for tensor in ours]
    counted = [torch.zeros(batch, dtype=torch.bool, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)]
    query = torch.randn(batch, length, heads * group, dim, device=DEVICE).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, length, heads, dim, device=DEVICE).to(dtype).transpose(2, 3)
    states = torch.randn(batch, length, COLUMNS, device=DEVICE).to(dtype)
    weight, slope = torch.randn(heads, COLUMNS, device=DEVICE), torch.randn(heads, device=DEVICE)
    valid = torch.rand(batch, length, device=DEVICE) < 0.9
    layout = {"counts": counts, "offsets": ragged.offsets_of(counts, torch.device(DEVICE))}
    kernel = None
    for t in range(length):
        q, k, v = new = [tensor[:, :, t : t + 1] for tensor in (query, key, value)]
        real = valid[:, t] if padded else None
        if kernel is None:
            kernel = step.StepKernel(
                [*ours, *counted], *new, weight, slope, slopes=linear.Slopes(0.01, 256, 0),
                masked=padded, window=WINDOW, sinks=SINKS, scaling=0.3, **layout,
            )  # fmt: skip
            assert kernel.grid[0] == splits + 1  # one scores the token
        output = kernel(*new, states[:, t : t + 1], weight, slope, real)
        scores = linear.linear_scores(states[:, t : t + 1], weight)
        scores = (scores + theirs[-1][:, None, None].double() * (0.01 + slope.double()[:, None] / 256)).float()
        ragged.insert_token(*theirs, k, v, scores, real, window=WINDOW, sinks=SINKS, **layout)
        theirs[-1] += 1 if real is None else real.long()
        doubles = (q.double(), theirs[0].double(), theirs[1].double())
        expected = ragged.attend_slots(*doubles, theirs[3], scaling=0.3, **layout)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), t
        error = (output.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < (2e-6 if dtype == torch.float32 else 1e-2), t
    assert not kernel.scratch[2].any(), "the counters did not return to zero"
    assert counted[1] == length


def test_layers_share_a_kernel():
    """Each would compile one of its own, for seconds: that of a model has layers with tens of different numbers."""
    found = set()
    for longest in range(520, 1020, 25):
        counts, dim = (300, longest), 64
        ours = [*buffers(1, counts, dim), torch.zeros(1, dtype=torch.bool), torch.zeros((), dtype=torch.int64)]
        new = [torch.zeros(1, heads, 1, dim, device=DEVICE) for heads in (6, 2, 2)]
        weight = torch.zeros(2, COLUMNS, device=DEVICE)
        kernel = step.StepKernel(
            ours, *new, weight, None, slopes=linear.Slopes(0.0, 1, 0), masked=False, window=WINDOW, sinks=SINKS,
            scaling=0.3, counts=counts, offsets=ragged.offsets_of(counts, torch.device(DEVICE)),
        )  # fmt: skip
        found.add(tuple(kernel.constants.items()))
    assert len(found) == 1


def test_programs_have_an_equal_share_of_the_slots():
    """Unequal heads have as many steps as equal ones with the same slots in all."""
    assert kernels.steps_of_program([1024] * 8, 32, 8, 512) == 4
    assert kernels.steps_of_program([719, 806, 893, 980, 1068, 1155, 1242, 1329], 32, 8, 512) == 4
    assert kernels.steps_of_program([719, 1024, 1329], 64, 1, 512) == 1
    assert kernels.steps_of_program([1000, 1], 16, 512, 512) == 32  # one program a head, on average
