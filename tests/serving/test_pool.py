"""The pool of rows: mixed requests give what `generate` gives, and no request sees another's state."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse import SparsefinderConfig, SparseKConfig, patch
from hf_sparse.core.prompt_chunks import Chunk, ChunkGroup
from hf_sparse.serving import pool as pool_module
from hf_sparse.serving.pool import Batch, RowPool, begin_rows, state_of_request

SETTINGS = {"k": 6, "window": 8, "sinks": 2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 3, 40, 16, 17, 90, 5, 61, 33, 120, 2, 75]  # below and above the 16 slots


@pytest.fixture
def model(tiny_llama):
    return make(tiny_llama)


def make(tiny_llama, **changes):
    torch.manual_seed(1)
    model = patch(tiny_llama(), SparseKConfig(**{**SETTINGS, **changes})).eval()
    for layer in model.model.layers:
        scorer = layer.self_attn.sparse_attention.sparsek_scorer["default"]
        if scorer.slope is not None:
            scorer.slope.data.normal_()
    return model.to(DEVICE)


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 64, (length,), generator=generator).tolist() for length in lengths]


def generated(model, prompt, tokens=12):
    with torch.no_grad():
        output = model.generate(torch.tensor([prompt], device=DEVICE), max_new_tokens=tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("rows, most_tokens", [
    (12, 400), (3, 37), (1, 19),
    *(pytest.param(*sizes, marks=pytest.mark.full) for sizes in ((12, 37), (3, 64), (2, 5))),
])  # fmt: skip
def test_mixed_requests_equal_generate(model, engine, request_of, rows, most_tokens):
    """All at once, in pieces, with more requests than rows, one at a time, and in pieces of a few tokens."""
    requests = [request_of(prompt, 12) for prompt in prompts()]
    runner = engine(model, rows, most_tokens)
    runner.run(requests)
    for request in requests:
        assert request.output == generated(model, request.prompt)
    assert runner.pool.free_rows == rows
    if 1 < rows < len(requests):
        assert any(steps and pieces for steps, pieces in runner.kinds)  # decoding beside reading


@pytest.mark.parametrize(
    "changes",
    [
        {"scorer": "mlp", "scorer_hidden_size": 8},
        {"layer_shares": [0.5, 1.5]},
        {"head_shares": [[0.5, 1.5], [1.67, 0.33]]},
        {"learn_slope": False},
        {"position_slope": 0.2, "slope_length": 9},
    ],
)
def test_kinds_of_adapters_equal_generate(tiny_llama, engine, request_of, changes):
    model = make(tiny_llama, **changes)
    requests = [request_of(prompt, 12) for prompt in prompts()]
    engine(model, 4, 50).run(requests)
    assert [request.output for request in requests] == [generated(model, request.prompt) for request in requests]


def test_the_slots_evict(model, tiny_llama):
    """The comparisons above would not notice a pool that keeps all keys, if dense attention gave the same."""
    prompt = prompts([90])[0]
    assert generated(model, prompt) != generated(tiny_llama().to(DEVICE), prompt)


def test_rows_of_others_are_neither_read_nor_written(model, engine, request_of):
    runner = engine(model, 5, 23)
    for _ in range(3):
        runner.pool.take()  # rows 0, 1 and 2 belong to others
    for states in runner.pool.layers:
        for state in states:
            state.fill_(float("nan") if state.is_floating_point() else 1 << 40)
    before = [[state[:3].clone() for state in states] for states in runner.pool.layers]
    requests = [request_of(prompt, 12) for prompt in prompts()]
    runner.run(requests)
    assert [request.output for request in requests] == [generated(model, request.prompt) for request in requests]
    for states, copies in zip(runner.pool.layers, before, strict=True):
        for state, copy in zip(states, copies, strict=True):
            assert torch.equal(state[:3].nan_to_num(nan=7), copy.nan_to_num(nan=7))


def test_a_request_that_was_given_up_leaves_nothing(model, engine, request_of):
    """Its row goes to the next request in the middle of its prompt, and in the middle of its text."""
    runner = engine(model, 2, 30)
    abandoned = [request_of(prompts([100])[0], 12), request_of(prompts([20])[0], 12)]
    runner.waiting += abandoned
    runner.step()
    runner.step()
    assert 0 < abandoned[0].computed < 100
    for request in abandoned:
        if request in runner.running:
            runner.end(request)
        else:
            runner.waiting.remove(request)
    requests = [request_of(prompt, 12) for prompt in prompts()]
    runner.run(requests)
    assert [request.output for request in requests] == [generated(model, request.prompt) for request in requests]


def test_a_snapshot_serves_all_texts_with_the_same_beginning(model, engine, request_of):
    beginning, *ends = prompts([50, 9, 1, 30])
    runner = engine(model, 3, 100)
    first = request_of([*beginning, 5], 1)
    first.prompt = beginning
    runner.run([first])  # its row is free, and holds the beginning until another request takes it
    snapshot = runner.pool.snapshot(first.row)
    requests = []
    for end in ends:
        request = request_of([*beginning, *end], 12, computed=len(beginning))
        request.row = runner.pool.take()
        runner.pool.restore(request.row, snapshot)
        runner.running.append(request)
        requests.append(request)
    runner.run([])
    assert [request.output for request in requests] == [generated(model, request.prompt) for request in requests]


class Operations(TorchDispatchMode):
    """Notes the names of all operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def packed_batch(pieces, rows, first_row=0):
    """Pieces of `(before, length)` in rows of a pool, and random tokens for them."""
    chunks, begin = [], 0
    for before, length in pieces:
        chunks.append(Chunk(begin, begin + length, before))
        begin += length
    generator = torch.Generator().manual_seed(begin)
    shapes = ((begin, 4, 8), (begin, 2, 8), (begin, 2, 8), (begin, 32))
    tokens = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    numbers = torch.arange(first_row, first_row + len(chunks), device=DEVICE)
    return Batch(numbers, 0, tuple(chunks)), tokens


@pytest.mark.parametrize("copied", [False, True], ids=["in their rows", "from rows of others"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"head_shares": [[0.5, 1.5], [1.67, 0.33]]}, {"scorer": "mlp", "scorer_hidden_size": 8, "pin_prompt": 4}],
    ids=["linear", "shares of heads", "mlp"],
)
def test_pieces_side_by_side_are_those_one_by_one(tiny_llama, monkeypatch, changes, copied):
    """Texts that begin and go on, within the 16 slots and beyond, from rows that hold NaN."""
    attention = make(tiny_llama, **changes).model.layers[0].self_attn.sparse_attention
    beginnings = [3, 5, 1, 6, 4, 5, 40, 41, 19, 20, 21, 7, 9, 8]
    more = [4, 4, 1, 1, 12, 40, 5, 5, 1, 1, 6, 9, 5, 2]
    results = []
    for together in (True, False):
        pool = RowPool([attention], 8, 40, torch.float32, DEVICE)
        for state in pool.layers[0]:
            state.fill_(float("nan") if state.is_floating_point() else 1 << 40)
        sizes = []
        with monkeypatch.context() as patched:
            if not together:
                patched.setattr(pool_module, "groups_of", lambda chunks, *options: [[n] for n in range(len(chunks))])
            batch, tokens = packed_batch([(0, length) for length in beginnings], 14)
            outputs = [pool.attend(0, batch, *tokens, 0.3)]
            for number in range(2):
                before = [sum(lengths) for lengths in zip(beginnings, *[more] * number, strict=True)]
                batch, tokens = packed_batch(list(zip(before, more, strict=True)), 14, 20 * copied * (1 - number))
                if copied:
                    sources = torch.arange(14, device=DEVICE) + 20 * number
                    batch = Batch(batch.rows, 0, batch.chunks, sources)
                outputs.append(pool.attend(0, batch, *tokens, 0.3))
                groups = batch.groups(attention.dense_tokens)
                sizes += [len(group.lengths) for group in groups if isinstance(group, ChunkGroup)]
        assert (max(sizes, default=0) > 1) == together
        step = Batch(batch.rows, 14)
        outputs.append(pool.attend(0, step, *(tensor[:14] for tensor in tokens), 0.3))
        results.append((outputs, pool.layers[0][0][batch.rows].flatten(1).sort(-1).values))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(results[0][1], results[1][1])


def test_more_prompts_take_no_more_operations_and_none_waits(model):
    """A GPU is waited for where a number of its memory is read; the host makes its tables once for all layers."""
    attention = model.model.layers[0].self_attn.sparse_attention
    pool = RowPool([attention], 8, 64, torch.float32, DEVICE)
    counts = []
    for texts in (3, 50):
        pieces = [(0, 12)] * texts + [(0, 30)] * texts, [(12, 3)] * texts + [(30, 5)] * texts
        for batch, tokens in (packed_batch(part[:64], 64) for part in pieces):
            batch.groups(attention.dense_tokens)
            with Operations() as operations:
                pool.attend(0, batch, *tokens, 0.3)
            counts.append(len(operations.names))
            waiting = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "item"}
            assert not waiting & {name.removeprefix("aten::").partition(".")[0] for name in operations.names}
    assert all(many <= few for few, many in zip(counts[:2], counts[2:], strict=True))


def test_rows_may_be_views_of_pages(model):
    """An engine keeps all tensors of a row in one page, so that rows lie far apart."""
    attention = model.model.layers[0].self_attn.sparse_attention
    state = state_of_request(attention, 8, torch.float32)
    page = sum(part.nbytes for part in state) + 24
    pages = torch.full((4, page), 255, dtype=torch.uint8, device=DEVICE)
    views, offset = [], 0
    for part in state:
        views.append(pages[:, offset : offset + part.nbytes].view(part.dtype).view(4, *part.shape))
        offset += part.nbytes
    pool = RowPool([attention], 8, 4, torch.float32, DEVICE)
    tokens = [torch.randn(30, *shape, device=DEVICE) for shape in ((4, 8), (2, 8), (2, 8), (32,))]
    row = torch.tensor([2], device=DEVICE)
    batches = [Batch(row, 0, (Chunk(0, 30),)), Batch(row, 1)]
    for batch in batches:
        expected = pool.attend(0, batch, *tokens, 0.3)
        pool.layers[0], kept = views, pool.layers[0]
        actual = pool.attend(0, batch, *tokens, 0.3)
        pool.layers[0] = kept
        assert torch.equal(expected, actual)
    assert bool((pages[[0, 1, 3]] == 255).all()) and bool((pages[:, offset:] == 255).all())


def test_a_text_may_begin_with_a_step(model):
    """An engine that replays the graph of steps for single tokens needs no other one for a prompt of one token."""
    attention = model.model.layers[0].self_attn.sparse_attention
    pool = RowPool([attention], 8, 3, torch.float32, DEVICE)
    tokens = [torch.randn(1, *shape, device=DEVICE) for shape in ((4, 8), (2, 8), (2, 8), (32,))]
    rows = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    expected = pool.attend(0, Batch(rows, 0, (Chunk(0, 1),)), *tokens, 0.3)
    copies = [state.clone() for state in pool.layers[0]]
    for state in pool.layers[0]:
        state.fill_(float("nan") if state.is_floating_point() else 1 << 40)
    begin_rows(pool.state[0], pool.layers[0], rows)
    torch.testing.assert_close(pool.attend(0, Batch(rows, 1), *tokens, 0.3), expected)
    for part, state, copy in zip(pool.state[0], pool.layers[0], copies, strict=True):
        held = (copies[0][1] >= 0).nonzero(as_tuple=True)  # the slot of the token
        ours, theirs = (x[1] if part.name == "seen" else x[1][held] for x in (state, copy))
        torch.testing.assert_close(ours, theirs)


def test_memory_of_a_row(model):
    """130 MiB a request of an 8B with 1,024 slots: keys and values, a score and a position for each."""
    pool = RowPool([layer.self_attn.sparse_attention for layer in model.model.layers], 8, 2, torch.float32)
    slots, heads = 16, 2
    assert pool.nbytes_of_row == 2 * (slots * heads * (2 * 8 * 4 + 4 + 8) + 8)
    assert sum(state.nbytes for states in pool.layers for state in states) == 2 * pool.nbytes_of_row


def test_refusals(model, tiny_llama):
    pool = RowPool([model.model.layers[0].self_attn.sparse_attention], 8, 1, torch.float32)
    assert pool.take() == 0
    with pytest.raises(RuntimeError, match="all 1 rows of the pool are taken"):
        pool.take()
    pool.free(0)
    with pytest.raises(ValueError, match="row 0 of 1 was not taken"):
        pool.free(0)
    with pytest.raises(ValueError, match="at least one row, got 0"):
        RowPool([], 8, 0, torch.float32)
    growing = patch(tiny_llama(), SparsefinderConfig()).model.layers[0].self_attn.sparse_attention
    with pytest.raises(ValueError, match="Sparsefinder keeps every key, so the state of a request grows"):
        RowPool([growing], 8, 1, torch.float32)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read as on Linux")
def test_memory_stays_over_2000_requests(model, engine, request_of):
    """All rows are free again, and the process has no more memory than after the first requests."""

    def resident():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and the allocator still holds is another amount each time
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    runner = engine(model, 64, 256)
    memory, nbytes = [], sum(state.nbytes for states in runner.pool.layers for state in states)
    for _ in range(10):
        runner.run([request_of(prompt, 2) for prompt in prompts([1 + number % 23 for number in range(200)])])
        memory.append(resident())
        assert runner.pool.free_rows == 64
    assert memory[-1] - memory[1] < 2 << 20, memory
    assert sum(state.nbytes for states in runner.pool.layers for state in states) == nbytes
