"""The pool of rows: mixed requests give what `generate` gives, and no request sees another's state."""

from pathlib import Path

import pytest
import torch

from hf_sparse import SparsefinderConfig, SparseKConfig, patch
from hf_sparse.serving.pool import Batch, Chunk, RowPool, begin_rows, state_of_request

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
    batches = [Batch(row, 0, (Chunk(0, 30, True),)), Batch(row, 1)]
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
    expected = pool.attend(0, Batch(rows, 0, (Chunk(0, 1, True),)), *tokens, 0.3)
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
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    runner = engine(model, 64, 256)
    memory, nbytes = [], sum(state.nbytes for states in runner.pool.layers for state in states)
    for _ in range(10):
        runner.run([request_of(prompt, 2) for prompt in prompts([1 + number % 23 for number in range(200)])])
        memory.append(resident())
        assert runner.pool.free_rows == 64
    assert memory[-1] - memory[1] < 4 << 20
    assert sum(state.nbytes for states in runner.pool.layers for state in states) == nbytes
