"""Compiling ahead: a call finds its kernels, and what goes wrong is told."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.selection import thresholds
from hf_sparse.ops.selection.triton import attention_backward, attention_forward, lists_kernels, scan
from hf_sparse.ops.triton import launch

compiles = pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter compiles nothing")


@pytest.fixture
def nothing_compiled(monkeypatch, tmp_path, nothing_noted):
    """Forgets what was compiled; returns the threads that compile from now on, by kernel."""
    for module in (attention_backward, attention_forward, lists_kernels, scan):  # they import what they launch
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    monkeypatch.setattr(launch, "_seen", set())
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    found = []
    monkeypatch.setattr(
        knobs.compilation,
        "listener",
        lambda *, metadata, **_: found.append((metadata["name"], threading.current_thread().name)),
    )
    return found


def test_meta_tensors_compile_and_others_run():
    called = []

    class Kernel:
        def warmup(self, *arguments, grid, **constants):
            called.append(("compiled", grid, constants))

        def __getitem__(self, grid):
            return lambda *arguments, **constants: called.append(("run", grid, constants))

    for device in ("meta", "cpu"):
        launch.launch(Kernel(), (3, 2))(torch.empty(1, device=device), 7, SIZE=4)
    assert called == [("compiled", (3, 2), {"SIZE": 4}), ("run", (3, 2), {"SIZE": 4})]


def test_ahead_of_a_call_all_is_meta(monkeypatch):
    """The same shapes, strides and dtypes, through the backward of what wants a gradient."""
    monkeypatch.setattr(triton, "AsyncCompileMode", lambda *_, **__: contextlib.nullcontext(), raising=False)
    query = torch.randn(2, 5, 3, 4, dtype=torch.float16).transpose(1, 2)
    key, met, gone = torch.randn(2, 3, 7, 4), [], []

    def attention(query, key, k):
        met.append(
            (query.device.type, query.shape, query.stride(), query.dtype, query.requires_grad, key.device.type, k)
        )
        query.register_hook(lambda grad: gone.append(grad.device.type))
        return query * key.shape[2]

    launch._compile(None, attention, (query, key, 9), [True, False])
    assert met == [("meta", query.shape, query.stride(), torch.float16, True, "meta", 9)] and gone == ["meta"]


def test_the_plain_scan_needs_no_numbers():
    """It is what exact soft gates over a long text run on; its tables have the shapes that kernels are compiled for."""
    options = {"size": 300, "queries": 290, "window": 3, "with_tau": True, "with_lists": True}
    shapes = []
    for device in ("meta", "cpu"):
        scores = torch.randn(2, 300, requires_grad=True).to(device)
        found = thresholds.scan_prefixes(scores, 5, **options)
        assert found.tau is not None
        torch.autograd.grad(found.tau.sum(), scores)
        shapes.append([found.rank.shape, found.floor.shape, found.tau.shape, found.lists.shape[:-1]])
    assert shapes[0] == shapes[1]


def test_nothing_is_ahead_without_a_gpu():
    launch.compile_ahead(lambda *_: pytest.fail("called"), *torch.empty(2, 1, 2, 3, 4))


class Named:
    """Take the place of a kernel, and note what is compiled and run."""

    def __init__(self, name, noted):
        self.name, self.noted = name, noted

    def warmup(self, *arguments, grid, **constants):
        self.noted.append(f"compiled {self.name}")

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.noted.append(f"ran {self.name}")


@pytest.fixture
def background(monkeypatch):
    """Lets kernels begin without a GPU."""
    monkeypatch.setattr(triton, "AsyncCompileMode", lambda *_, **__: contextlib.nullcontext(), raising=False)
    monkeypatch.setattr(launch, "_pool", lambda device: ThreadPoolExecutor(2))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return torch.device("cuda", 0)


def test_a_launch_waits_for_what_has_begun_of_its_kernel(background, monkeypatch):
    noted, gate, meta = [], threading.Event(), torch.empty(1, device="meta")
    kernel, other = Named("kernel", noted), Named("other", noted)
    waited = launch.wait
    monkeypatch.setattr(launch, "wait", lambda jobs: (gate.set(), waited(jobs))[1])

    def calls():
        assert gate.wait(60)
        launch.launch(kernel, (1,))(meta)

    launch.begin_compiling(kernel, calls, background)
    launch.launch(other, (1,))(torch.empty(1))
    launch.launch(kernel, (1,))(torch.empty(1))
    assert noted == ["ran other", "compiled kernel", "ran kernel"]
    assert not launch._begun[id(kernel)]


def test_a_failure_in_the_background_is_a_warning_of_the_launch(background):
    kernel = Named("kernel", [])

    def calls():
        raise NotImplementedError("of meta tensors")

    launch.begin_compiling(kernel, calls, background)
    with pytest.warns(UserWarning, match="of meta tensors"):
        launch.launch(kernel, (1,))(torch.empty(1))
    launch.launch(kernel, (1,))(torch.empty(1))
    assert kernel.noted == ["ran kernel"] * 2


def test_where_no_thread_can_start_the_launch_compiles(background, monkeypatch):
    """As in a thread that still generates when the main one has ended."""
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    monkeypatch.setattr(launch, "_pool", lambda device: pool)
    kernel = Named("kernel", [])
    launch.begin_compiling(kernel, lambda: pytest.fail("called"), background)
    with pytest.warns(UserWarning, match="after shutdown"):
        launch.launch(kernel, (1,))(torch.empty(1))
    key = type("Tensor", (torch.Tensor,), {"is_cuda": True})(1, 1, 1, 4)
    monkeypatch.setattr(launch, "_seen", set())
    with pytest.warns(UserWarning, match="after shutdown"):
        launch.compile_ahead(lambda *_: pytest.fail("called"), key, key)


@pytest.mark.parametrize("fails", [False, True])
def test_threads_of_the_background_end_with_their_work(fails, background, monkeypatch):
    """Check it with a launch and without; a process that ends waits for no thread but one that is at work."""
    pool, work = ThreadPoolExecutor(2), []
    monkeypatch.setattr(launch, "_pool", lambda device: pool)

    def calls():
        work.append(threading.current_thread())
        assert not fails

    launch.begin_compiling(Named("kernel", []), calls, background)
    (job,) = launch._begun.popitem()[1]
    assert isinstance(job.exception(60), AssertionError if fails else type(None))
    for thread in pool._threads:
        thread.join(60)
    assert work[0] in pool._threads and not any(thread.is_alive() for thread in pool._threads)


def test_nothing_begins_without_a_gpu_or_while_one_captures(background, monkeypatch):
    kernel = Named("kernel", [])
    launch.begin_compiling(kernel, lambda: pytest.fail("called"), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch.begin_compiling(kernel, lambda: pytest.fail("called"), background)
    assert id(kernel) not in launch._begun


@compiles
@pytest.mark.parametrize("gates", ["hard", "soft"])
def test_a_call_finds_its_kernels(nothing_compiled, gates):
    """Those of its backward included, whatever hooks and modes the caller has."""
    make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": gates == "hard"}
    query, key, value = (torch.randn(1, heads, 700, 32, **make) for heads in (4, 2, 2))
    scores = torch.randn(1, 2, 700, device="cuda", requires_grad=gates == "soft")
    with torch.autograd.graph.save_on_cpu():
        output = sparsek_attention(query, key, value, scores, k=64, window=64, sinks=2, gates=gates, support=128)
        output.sum().backward()
    names = [name for name, _ in nothing_compiled]
    assert names.count("_forward") == names.count("query_gradients") == 1
    assert names.count("key_gradients") == (2 if gates == "hard" else 0)
    assert all(thread.startswith("ThreadPoolExecutor") for _, thread in nothing_compiled)
    count = len(names)
    sparsek_attention(query, key, value, scores, k=64, window=64, sinks=2, gates=gates, support=128).sum().backward()
    assert len(nothing_compiled) == count


@compiles
def test_the_call_tells_an_error_of_the_compiler(nothing_compiled):
    @triton.jit
    def broken(X):
        tl.static_assert(False, "on purpose")

    def attention(query, key):
        launch.launch(broken, (1,))(query)
        return query

    pair = torch.randn(2, 1, 1, 2, 4, device="cuda")
    launch.compile_ahead(attention, *pair)
    with pytest.raises(triton.CompilationError, match="on purpose"):
        attention(*pair)


@compiles
def test_a_failure_ahead_is_a_warning(nothing_compiled):
    def attention(query, key):
        raise NotImplementedError("of meta tensors")

    with pytest.warns(UserWarning, match="of meta tensors"):
        launch.compile_ahead(attention, *torch.randn(2, 1, 1, 2, 4, device="cuda"))
