"""Launches that run again, without the function that noted them."""

from types import SimpleNamespace

import pytest
import torch

from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.triton import replay

pytestmark = pytest.mark.usefixtures("nothing_noted")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has no binaries to launch")


class Kernel:
    """Takes the place of a kernel and of its binary, which keeps the arguments of every launch."""

    arg_names = ("source", "scratch", "target", "count", "SIZE")

    def __init__(self) -> None:
        self.launched: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.launched.append((grid, stream, arguments))


class Direct(Kernel):
    """Has what `_direct_launch` looks for."""

    function, packed_metadata = "function", "metadata"
    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    @property
    def run(self):
        return self

    def launch(self, x, y, z, stream, function, cooperative, pdl, scratch, profile, metadata, *rest):
        assert (function, cooperative, pdl, scratch, profile, metadata) == (
            "function",
            False,
            False,
            None,
            None,
            "metadata",
        )
        assert (metadata, *rest[:3]) == ("metadata", None, None, None)  # no hooks
        self.launched.append(((x, y, z), stream, rest[3:]))


def recorded(kernel, results=lambda target, scratch, source: (target,), arguments=None):
    """Note one launch of a function that allocates a scratch buffer and a result."""
    source = torch.arange(4.0)
    recorder = replay._state.recorder = replay._Recorder((source, None))
    try:
        scratch = replay.empty((3, 2), torch.float64, source.device)
        target = replay.empty_like(source)
        given = arguments(source) if arguments else source
        replay.note_launch(kernel, kernel, (5,), (given, scratch[1:], target, 7), {"SIZE": 16})
    finally:
        replay._state.recorder = None
    return recorder.program(results(target, scratch, source), source.device)


@pytest.mark.parametrize("kind", [Kernel, Direct])
def test_a_program_launches_with_the_addresses_of_new_tensors(kind, monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 3, raising=False)
    kernel, source = kind(), torch.arange(4.0)
    (target,) = recorded(kernel).run((source, None))
    ((grid, stream, arguments),) = kernel.launched
    assert grid == (5, 1, 1) and stream == 3 and arguments[0] == source.data_ptr() and arguments[2] == target.data_ptr()
    assert arguments[3:] == (7, 16) and target.shape == source.shape and target.dtype == source.dtype
    assert arguments[1] % 16 == 0 and arguments[1] not in (arguments[0], arguments[2])


@pytest.mark.parametrize("unknown", ["argument", "result"])
def test_what_nobody_knows_is_not_run_again(unknown):
    if unknown == "argument":
        assert recorded(Kernel(), arguments=lambda source: source + 1) is None
    else:
        assert recorded(Kernel(), results=lambda target, scratch, source: (source + 1,)) is None


def test_elsewhere_the_function_is_called():
    calls = []

    def function(tensor, number):
        calls.append(number)
        return (tensor,)

    tensor = torch.ones(2)
    assert all(replay.replayed(function, (tensor,), number)[0] is tensor for number in (1, 1, 2))
    assert calls == [1, 1, 2] and not replay._programs


def test_what_runs_within_another_function_is_noted_with_it(monkeypatch):
    """Also where it ran alone before."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 3, raising=False)
    monkeypatch.setattr(replay, "_key", lambda function, *_: function)
    kernel, cpu = Kernel(), torch.device("cpu")
    source = SimpleNamespace(is_cuda=True, device=cpu, data_ptr=lambda: 16)

    def inner(source):
        target = replay.empty((4,), torch.float32, cpu)
        replay.note_launch(kernel, kernel, (5,), (source, target, target, 7), {"SIZE": 16})
        return (target,)

    def outer(source):
        return replay.replayed(inner, (source,))

    for function in (inner, outer):
        replay.replayed(function, (source,))
    program = replay._programs[outer]
    assert program is not None and len(program.launches) == 1


@on_a_gpu
@pytest.mark.parametrize("gates", ["hard", "soft"])
def test_a_second_call_of_a_layout_equals_the_first_and_the_reference(gates, poisoned_memory):
    budget = {"k": 40, "window": 30, "sinks": 4, "gates": gates, "support": 100}

    def run(seed, implementation):
        torch.manual_seed(seed)
        inputs = [torch.randn(1, heads, 700, 32, device="cuda", requires_grad=True) for heads in (4, 2, 2)]
        inputs.append(torch.randn(1, 2, 700, device="cuda", requires_grad=gates == "soft"))
        output = sparsek_attention(*inputs, **budget, implementation=implementation)
        learned = [tensor for tensor in inputs if tensor.requires_grad]
        return output, *torch.autograd.grad(output, learned, torch.ones_like(output))

    run(0, "triton")
    assert replay._programs and all(program is not None for program in replay._programs.values())
    count = len(replay._programs)
    for found, expected in zip(run(1, "triton"), run(1, "tiled"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(replay._programs) == count


@on_a_gpu
def test_launches_run_again_in_the_capture_of_a_graph():
    tensors = [torch.randn(1, heads, 300, 32, device="cuda") for heads in (4, 2, 2)]
    scores, budget = torch.randn(1, 2, 300, device="cuda"), {"k": 20, "window": 30, "sinks": 4}
    expected = sparsek_attention(*tensors, scores, **budget)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sparsek_attention(*tensors, scores, **budget)
    graph.replay()
    assert torch.equal(output, expected)
