"""A step with few queries against entmax of all logits, by its definition."""

import pytest
import torch

from hf_sparse.ops.entmax import entmax, entmax_attention
from hf_sparse.ops.entmax.step import MOST_QUERIES, Scales, attend_few, is_step

ALPHAS = torch.tensor([1.3, 1.5, 2.0, 1.7])


def by_definition(query, key, value, alpha, scaling, seen):
    """`seen` `[B, Hq, Tq, Tk]`; a query without a key gets zeros."""
    key, value = (part.nan_to_num(0.0).repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scaling = scaling[:, None, None] if isinstance(scaling, torch.Tensor) else scaling
    alpha = alpha[:, None, None] if isinstance(alpha, torch.Tensor) else alpha
    logits = (query.nan_to_num(0.0) @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    return entmax(logits, alpha) @ value


def tensors(queries=1, keys=30, batch=2):
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, queries), (2, keys), (2, keys))
    return [torch.randn(batch, heads, n, 8, generator=generator, dtype=torch.float64) * 2 for heads, n in sizes]


@pytest.mark.parametrize("queries", [1, 3, MOST_QUERIES])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.2, ALPHAS.double()], ids=["1.5", "2", "1.2", "heads"])
def test_all_keys(queries, alpha):
    query, key, value = tensors(queries)
    seen = torch.ones(2, 4, queries, 30, dtype=torch.bool)
    for causal in (True, False):
        expected = by_definition(query, key, value, alpha, 0.3, seen.tril(30 - queries) if causal else seen)
        output = attend_few(query, key, value, Scales.of(alpha, 0.3, query), causal=causal)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            entmax_attention(query, key, value, alpha=alpha, scaling=0.3, causal=causal), output, rtol=0, atol=0
        )


@pytest.mark.parametrize("queries", [1, 3])
def test_a_batch_of_no_texts(queries):
    query, key, value = tensors(queries, batch=0)
    output = entmax_attention(query, key, value, alpha=1.5, scaling=0.3, causal=True)
    assert output.shape == (0, 4, queries, 8)


def test_positions_padding_and_lists_together():
    query, key, value = tensors()
    valid = torch.arange(30) % torch.tensor([31, 4])[:, None] != 1
    key, value = (part.masked_fill(~valid[:, None, :, None], torch.nan) for part in (key, value))
    first = torch.tensor([20, 11])
    index = torch.tensor([[[[0, -1, 2, 5]], [[3, 1, -1, 0]]]])  # for both texts, a list for each KV head
    column = torch.arange(30)
    listed = (index[..., None] == column // 5).any(3)  # [1, 2, 1, Tk]
    seen = valid[:, None, None] & (column <= first[:, None, None, None]) & listed.repeat_interleave(2, 1)
    expected = by_definition(query, key, value, 1.5, 0.3, seen)
    scales = Scales.of(1.5, 0.3, query)
    output = attend_few(query, key, value, scales, causal=True, valid=valid, first_query=first, index=index, size=5)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    at_padding = attend_few(query, key, value, scales, causal=True, valid=valid, first_query=torch.tensor([20, 13]))
    assert at_padding[0].any() and not at_padding[1].any()


def test_logarithms_of_scales():
    query, key, value = (part.float() for part in tensors())
    logarithm = torch.linspace(-1, 1, 4)
    for alpha in (1.5, 1.2):
        outputs = [
            attend_few(query, key, value, scales, causal=True)
            for scales in (Scales.of(alpha, 0.3 * logarithm.exp(), query), Scales.of_logarithm(alpha, 0.3, logarithm))
        ]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_what_a_step_is():
    def of(heads, queries):
        return is_step(torch.empty(1, heads, queries, 8), torch.empty(1, 2, 100, 8))

    assert of(2, 1) and of(16, 8) and of(2, MOST_QUERIES)
    assert not of(2, 0) and not of(2, MOST_QUERIES + 1) and not of(18, 8)


def test_gradients_take_another_way():
    query, key, value = tensors()
    query.requires_grad_()
    output = entmax_attention(query, key, value, alpha=1.5, scaling=0.3, causal=True)
    assert torch.autograd.grad(output.sum(), query)[0].any()


def test_a_compiled_function_holds_one_operator():
    query, key, value = (part.float() for part in tensors())
    scales = Scales.of(1.5, 0.3, query)
    compiled = torch.compile(lambda *x: attend_few(*x, scales, causal=True), backend="aot_eager", fullgraph=True)
    expected = attend_few(query, key, value, scales, causal=True)
    assert torch.equal(compiled(query, key, value), expected)
    torch.library.opcheck(
        torch.ops.hf_sparse.entmax_few,
        (query, key, value, scales.scale, None, 2, 1.0, False, True, None, None, None, 1),
        test_utils=("test_schema", "test_faketensor"),
    )
