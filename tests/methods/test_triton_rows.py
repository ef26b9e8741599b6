"""Decoding steps in the rows of a pool, by the kernel that finds its rows itself, against gathered rows."""

import gc
import weakref

import pytest
import torch

from hf_sparse import SparseKConfig
from hf_sparse.core.layer import AttentionShape
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.core.overrides import override
from hf_sparse.core.request_state import StateRows
from hf_sparse.methods.sparsek import SparseKAttention, rows, step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16
HIDDEN, HEADS, DIM, ROWS = 40, 2, 16, 7
pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture
def kernel_everywhere(monkeypatch):
    """Lets the interpreter take the kernel too."""
    if DEVICE == "cpu":
        monkeypatch.setattr(step, "is_on_gpu", lambda query: True)
        monkeypatch.setattr(step, "has_kernels", lambda *tensors: all(t.is_contiguous() for t in tensors))


def make(**settings):
    layer = SparseKAttention.for_shape(AttentionShape(HIDDEN, 4, HEADS, DIM, 0))
    layer.add_adapter("default", SparseKConfig(k=3, window=4, sinks=1, **settings))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer.to(DEVICE).eval()


def pages(layer, dtype):
    """The rows of a pool as an engine keeps them, and all of the memory, which is poisoned."""
    parts = layer.request_state(DIM, dtype)
    size = sum(part.nbytes for part in parts) + 48
    memory = torch.full((ROWS, size), 0x7F, dtype=torch.uint8, device=DEVICE)
    views, offset = [], 0
    for part in parts:
        views.append(memory[:, offset : offset + part.nbytes].view(part.dtype).view(ROWS, *part.shape))
        offset += part.nbytes
    return memory, views


def tokens(count, length, dtype):
    query = torch.randn(count, length, 4, DIM, device=DEVICE).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, count, length, HEADS, DIM, device=DEVICE).to(dtype).transpose(2, 3)
    hidden_states = torch.randn(count, length, HIDDEN, device=DEVICE).to(dtype)
    return NewTokens(query, key, value, hidden_states, None, 0.3)


def at(states, index):
    """Rows that are read and written."""
    return StateRows(states, index, index)


@pytest.mark.cross("values")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("settings", [{"position_slope": 0.01}, {"scorer": "mlp", "scorer_hidden_size": 8}])
def test_steps_in_rows_are_those_of_gathered_rows(kernel_everywhere, monkeypatch, settings, dtype):
    layer = make(**settings)
    taken = []
    in_rows = rows.step_in_rows

    def counted(*arguments):
        output = in_rows(*arguments)
        taken.append(output is not None)
        return output

    results = []
    for kernel in (True, False):
        torch.manual_seed(1)
        monkeypatch.setattr(rows, "step_in_rows", counted if kernel else lambda *arguments: None)
        memory, states = pages(layer, dtype)
        steps = []
        for row, length in ((5, 3), (1, 12), (2, 8)):
            index = torch.tensor([row], device=DEVICE)
            rows.attend_chunk(layer, at(states, index), True, tokens(1, length, dtype))
        for number in range(12):
            index = torch.tensor([[5, 1, 2], [2, 5, 1], [1, 2, 5]][number % 3], dtype=torch.int32, device=DEVICE)
            steps.append(rows.attend_steps(layer, at(states, index), tokens(3, 1, dtype)))
        results.append((memory, states, torch.stack(steps)))
    assert taken == 12 * [True] and len(layer.row_kernels) == 1
    (memory, states, outputs), (_, expected, expected_outputs) = results
    for ours, theirs, part in zip(states, expected, layer.request_state(DIM, dtype), strict=True):
        if part.name == "scores":  # the first tokens are scored by another kernel
            torch.testing.assert_close(ours[[1, 2, 5]], theirs[[1, 2, 5]], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(ours[[1, 2, 5]], theirs[[1, 2, 5]]), part.name
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    outputs, expected_outputs = (output.double() for output in (outputs, expected_outputs))
    assert (outputs - expected_outputs).norm() < tolerance * expected_outputs.norm()
    assert bool((memory[[0, 3, 4, 6]] == 0x7F).all()) and bool((memory[:, -48:] == 0x7F).all())


def test_kernels_for_other_numbers_of_requests_need_no_more_memory(kernel_everywhere):
    """A server that lives on meets every number; each layer has one memory for all of them."""
    layer = make()
    _, states = pages(layer, torch.float32)
    for row in range(4):
        index = torch.tensor([row], device=DEVICE)
        rows.attend_chunk(layer, at(states, index), True, tokens(1, 10, torch.float32))
    for count in (1, 4, 2):
        index = torch.arange(count, device=DEVICE)
        rows.attend_steps(layer, at(states, index), tokens(count, 1, torch.float32))
    memories = {kernel.scratch[0].untyped_storage().data_ptr() for kernel in layer.row_kernels.values()}
    assert len(layer.row_kernels) == 3 and memories == {layer.row_scratch.untyped_storage().data_ptr()}


def test_a_budget_of_as_many_slots_has_a_kernel_of_its_own(kernel_everywhere, monkeypatch):
    layer = make(position_slope=0.01)
    index, results = torch.arange(3, device=DEVICE), []
    for in_rows in (rows.step_in_rows, lambda *arguments: None):
        monkeypatch.setattr(rows, "step_in_rows", in_rows)
        torch.manual_seed(1)
        _, states = pages(layer, torch.float32)
        for row in index.split(1):
            rows.attend_chunk(layer, at(states, row), True, tokens(1, 10, torch.float32))
        rows.attend_steps(layer, at(states, index), tokens(3, 1, torch.float32))
        with override([layer.config], k=4, window=3):
            steps = [rows.attend_steps(layer, at(states, index), tokens(3, 1, torch.float32)) for _ in "1234"]
        results.append((torch.stack(steps), states[0].flatten(1).sort(-1).values))
    torch.testing.assert_close(results[0], results[1])
    assert len(layer.row_kernels) == 2


def test_kernels_do_not_keep_the_memory_of_a_pool(kernel_everywhere):
    """An engine makes a pool to measure with, frees it, and expects its memory back."""
    layer = make()
    memory, states = pages(layer, torch.float32)
    index = torch.tensor([2], device=DEVICE)
    rows.attend_chunk(layer, at(states, index), True, tokens(1, 10, torch.float32))
    rows.attend_steps(layer, at(states, index), tokens(1, 1, torch.float32))
    assert len(layer.row_kernels) == 1
    kept = [weakref.ref(tensor) for tensor in (memory, *states)]
    del memory, states
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


def test_a_row_below_0_is_none(kernel_everywhere):
    """A captured graph of more requests than there are is replayed with such rows."""
    layer = make()
    memory, states = pages(layer, torch.float32)
    for row in (0, 3):
        index = torch.tensor([row], device=DEVICE)
        rows.attend_chunk(layer, at(states, index), True, tokens(1, 10, torch.float32))
    before = memory.clone()
    new = tokens(4, 1, torch.float32)
    index = torch.tensor([3, -1, -1, -1], device=DEVICE)
    output = rows.attend_steps(layer, at(states, index), new)
    assert bool((memory[[0, 1, 2, 4, 5, 6]] == before[[0, 1, 2, 4, 5, 6]]).all())
    assert int(states[1][3]) == 11
    memory.copy_(before)
    alone = NewTokens(*(tensor[:1] for tensor in new[:4]), None, 0.3)
    torch.testing.assert_close(rows.attend_steps(layer, at(states, index[:1]), alone), output[:1])


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU; the interpreter runs what they record above")
def test_a_replayed_graph_reads_the_rows_that_are_there_then():
    layer = make()
    _, states = pages(layer, torch.bfloat16)
    for row in range(ROWS):
        index = torch.tensor([row], device=DEVICE)
        rows.attend_chunk(layer, at(states, index), True, tokens(1, 6 + row, torch.bfloat16))
    new, index = tokens(3, 1, torch.bfloat16), torch.tensor([0, 1, 2], device=DEVICE, dtype=torch.int32)
    rows.attend_steps(layer, at(states, index), new)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = rows.attend_steps(layer, at(states, index), new)
    for order in ([6, 2, 4], [1, 6, -1], [5, 0, 3]):
        index.copy_(torch.tensor(order))
        for tensor in new[:4]:
            tensor.normal_()
        memory = states[0].untyped_storage()
        before = torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(memory).clone()
        graph.replay()
        replayed = torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(memory).clone()
        result = output.clone()
        torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(memory).copy_(before)
        expected = rows.attend_steps(layer, at(states, index), new)
        assert torch.equal(replayed, torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(memory))
        assert torch.equal(result[index >= 0], expected[index >= 0])
