"""The kernels of a layer whose KV heads select different numbers of keys, against every head alone in float64."""

import pytest
import torch

from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.selection.heads import numbers_per_head
from hf_sparse.ops.selection.problem import Problem
from hf_sparse.ops.selection.triton import attention as kernels
from hf_sparse.ops.selection.triton import attention_forward
from hf_sparse.ops.selection.triton.program_sizes import ProgramSizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ProgramSizes(16, 16, 4, 1)  # several programs and blocks of keys even at the lengths of these tests
LENGTH = 150 if DEVICE == "cuda" else 37
pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter", "nothing_noted")

CASES = {
    "three heads": {"k": (3, 17, 8)},
    "query heads that share": {"k": (9, 2), "group": 3, "batch": 2, "dim": 16},
    "lists longer than a block of chunks": {"k": (70, 3), "window": 5, "length": LENGTH + 46},
    "fewer queries than keys": {"k": (3, 17), "queries": 21},
    "one token": {"k": (3, 5), "length": 1},
    "one query": {"k": (30, 5, 1), "queries": 1, "group": 4},
    "padding": {"k": (2, 9), "batch": 3, "start": [0, 7, LENGTH]},
    "budgets on both sides of the length": {"k": (4, 200, 40)},
    "smallest": {"k": (1, 2), "window": 1, "sinks": 0},
    "ties": {"k": (3, 17, 8), "ties": True},
    "odd head size": {"k": (3, 17), "dim": 20},
}


def inputs(batch: int, heads: int, group: int, queries: int, length: int, dim: int, ties: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads * group, queries, dim, generator=generator)
    key, value = torch.randn(2, batch, heads, length, dim, generator=generator)
    scores = torch.randn(batch, heads, length, generator=generator)
    return [x.to(DEVICE) for x in (query, key, value, (scores * 2).round() / 2 if ties else scores)]


def outcome(attend, tensors, real, soft: bool) -> list[torch.Tensor]:
    """Output at real queries, and the gradients for a fixed random upstream gradient."""
    learned = [tensor.clone().requires_grad_(soft or number < 3) for number, tensor in enumerate(tensors)]
    output = attend(*learned)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output) * real
    gradients = torch.autograd.grad(output, learned if soft else learned[:3], upstream)
    return [torch.where(real, output.detach(), 0.0), *gradients]


@pytest.mark.cross("values")
@pytest.mark.parametrize("gates", ["hard", "soft", "soft without a bound"])
@pytest.mark.parametrize("name", CASES)
def test_every_head_is_that_head_alone(name, gates, monkeypatch):
    case = {"batch": 1, "group": 1, "length": LENGTH, "window": 4, "sinks": 2, "dim": 8, "start": None} | CASES[name]
    k, length, heads = case["k"], case["length"], len(case["k"])
    queries, soft = case.get("queries", length), gates != "hard"
    support = tuple(2 * count for count in k) if gates == "soft" else None if soft else k
    tensors = inputs(case["batch"], heads, case["group"], queries, length, case["dim"], case.get("ties", False))
    start = None if case["start"] is None else torch.tensor(case["start"], device=DEVICE)
    first = torch.zeros(case["batch"], device=DEVICE) if start is None else start
    real = (torch.arange(length - queries, length, device=DEVICE) >= first[:, None])[:, None, :, None]
    largest = numbers_per_head(k, support, heads)
    budget = (largest[0], case["window"], case["sinks"], 0.4, soft, largest[1], start, True, largest[2])
    launched = []
    run = attention_forward.launch
    monkeypatch.setattr(attention_forward, "launch", lambda *args: launched.append(1) or run(*args))
    found = outcome(
        lambda *x: kernels.causal_sparsek_attention(Problem(*x, *budget), tile=16, blocks=SMALL), tensors, real, soft
    )
    assert len(launched) == 1

    def alone(query, *others):
        outputs = []
        for head in range(heads):
            group = query[:, head * case["group"] : (head + 1) * case["group"]]
            options = {"window": case["window"], "sinks": case["sinks"], "scaling": 0.4, "start": start}
            options |= {"k": k[head], "gates": "soft" if soft else "hard", "implementation": "dense"}
            options["support"] = support[head] if gates == "soft" else None
            outputs.append(sparsek_attention(group, *(x[:, head : head + 1] for x in others), **options))
        return torch.cat(outputs, 1)

    expected = outcome(alone, [tensor.double() for tensor in tensors], real, soft)
    for what, mine, theirs in zip(("output", "d q", "d k", "d v", "d z"), found, expected, strict=False):
        scale = max(1.0, float(theirs.abs().max()))
        difference = float((mine.double() - theirs).abs().max())
        assert difference < 3e-5 * scale, (what, difference)


def test_lists_beyond_the_kernels(monkeypatch):
    """A head that reaches more keys than a list of the kernels holds; the other goes through them all the same."""
    monkeypatch.setattr(kernels.scan.reference, "MOST_LISTED", 20)
    tensors = inputs(1, 2, 1, 40, 40, 8, False)
    options = {"k": (5, 25), "window": 4, "sinks": 2}
    found = sparsek_attention(*tensors, **options, implementation="triton")
    expected = sparsek_attention(*(tensor.double() for tensor in tensors), **options, implementation="dense")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gates", ["hard", "soft"])
def test_the_largest_numbers_for_all_are_equal_heads(gates):
    """A table of equal numbers selects as no table does, to the bit."""
    tensors = inputs(1, 2, 2, 60, 60, 8, False)
    problem = Problem(*tensors, 7, 4, 2, 0.3, gates == "soft", 14 if gates == "soft" else 7, None, True)
    of_heads = ((7, problem.support),) * 2
    expected = kernels.causal_sparsek_attention(problem, tile=16, blocks=SMALL)
    found = kernels.causal_sparsek_attention(problem._replace(of_heads=of_heads), tile=16, blocks=SMALL)
    assert torch.equal(found, expected)
