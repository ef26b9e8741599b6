"""SparseK attached to an attention module of an encoder: padding, training, baselines, the observer, no cache."""

import pytest
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

from hf_sparse import SparseKConfig
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.methods.sparsek.baselines import BASELINES, Arrivals, random, recency
from hf_sparse.ops import sparsek_attention

HIDDEN, HEADS, GROUP, DIM = 16, 2, 2, 4
BUDGET = {"k": 4, "window": 5, "sinks": 2}
LENGTH = 40
VALID = {
    "left": torch.arange(LENGTH) >= torch.tensor([0, 6, 30])[:, None],
    "right": torch.arange(LENGTH) < torch.tensor([LENGTH, 25, 3])[:, None],
    "interior": torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7,
    "sparse": torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.2,
    "a row of padding": (torch.arange(3) > 0)[:, None].expand(3, LENGTH),
}


def method(**settings) -> SparseKAttention:
    module = SparseKAttention(HIDDEN, HEADS, layer=0, causal=False)
    module.add_adapter("default", SparseKConfig(**{**BUDGET, **settings}))
    return module.eval()


def inputs() -> dict[str, torch.Tensor]:
    return {
        "query": torch.randn(3, HEADS * GROUP, LENGTH, DIM),
        "key": torch.randn(3, HEADS, LENGTH, DIM),
        "value": torch.randn(3, HEADS, LENGTH, DIM),
        "hidden_states": torch.randn(3, LENGTH, HIDDEN),
    }


def attend(module, tensors, valid=None, cache=None):
    return module.attend(**tensors, valid=valid, cache=cache, scaling=0.7)


def alone(module, tensors, valid, **options):
    """Each row by itself, without its padding, from the reference; 0 at padding."""
    output = torch.zeros_like(tensors["query"])
    for row in range(len(valid)):
        real = valid[row].nonzero().squeeze(-1)
        if len(real):
            scores = module.score(tensors["hidden_states"][row : row + 1, real], torch.arange(len(real))[None])
            part = [tensors[name][row : row + 1, :, real] for name in ("query", "key", "value")]
            settings = {**BUDGET, "scaling": 0.7, "causal": False, "implementation": "dense", **options}
            output[row, :, real] = sparsek_attention(*part, scores, **settings)[0]
    return output


@pytest.mark.parametrize("slope", [0.0, 0.05])
@pytest.mark.parametrize("padding", ["none", *VALID])
def test_any_padding_equals_each_row_alone(padding, slope):
    module, tensors = method(position_slope=slope), inputs()
    valid = VALID.get(padding)
    output = attend(module, tensors, valid)
    real = torch.ones(3, LENGTH, dtype=torch.bool) if valid is None else valid
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output * real[:, None, :, None], alone(module, tensors, real), rtol=0, atol=2e-6)


@pytest.mark.parametrize("padding", ["none", "right", "interior"])
def test_training_uses_soft_gates_within_the_support(padding):
    module, tensors = method(support=2).train(), inputs()
    valid = VALID.get(padding)
    real = torch.ones(3, LENGTH, dtype=torch.bool) if valid is None else valid
    output = attend(module, tensors, valid) * real[:, None, :, None]
    expected = alone(module, tensors, real, gates="soft", support=8)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    weight = module.sparsek_scorer["default"].weight
    (gradient,) = torch.autograd.grad(output.square().mean(), weight)
    (reference,) = torch.autograd.grad(expected.square().mean(), weight)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-8)


def test_recency_is_a_window_as_large_as_all_slots_but_the_sinks():
    module, tensors = method(), inputs()
    module.baseline = recency
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    mask = (j < 2) | ((j >= i - 4) & (j <= i + 4))  # 9 = window + k
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.7, enable_gqa=True)
    output = attend(module, tensors)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    assert torch.equal(attend(module.train(), tensors), output)


def test_random_keeps_window_and_k():
    module, tensors = method(), inputs()
    module.baseline = random
    output = attend(module, tensors)
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    scores = random(Arrivals(query, key, torch.arange(LENGTH).expand(3, -1), None, 0.7, 7, 5, layer=0, cache=None))
    settings = {**BUDGET, "scaling": 0.7, "causal": False, "implementation": "dense"}
    expected = sparsek_attention(query, key, value, scores, **settings)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    assert torch.equal(attend(module.train(), tensors), output)


@pytest.mark.parametrize("name", sorted(BASELINES.keys() - {"recency", "random"}))
def test_other_baselines_are_refused(name):
    module = method()
    module.baseline = BASELINES[name]
    with pytest.raises(ValueError, match="the baselines of encoders are recency \\(a window\\) and random"):
        attend(module, inputs())


@pytest.mark.parametrize("padding", ["none", "left", "interior"])
def test_an_observer_sees_everything_and_the_output_is_dense(padding):
    module, tensors = method().train(), inputs()
    valid = VALID.get(padding)
    seen = []
    module.observer = lambda *arguments: seen.append(arguments)
    output = attend(module, tensors, valid)
    ((query, key, scores, scaling),) = seen
    assert query is tensors["query"] and key is tensors["key"] and scaling == 0.7
    assert scores.shape == (3, HEADS, LENGTH) and scores.requires_grad
    real = torch.ones(3, LENGTH, dtype=torch.bool) if valid is None else valid
    mask = real[:, None, None, :]
    expected = F.scaled_dot_product_attention(query, key, tensors["value"], mask, scale=0.7, enable_gqa=True)
    shown = real[:, None, :, None]
    torch.testing.assert_close(output * shown, expected * shown, rtol=0, atol=2e-6)


def test_there_is_no_cache():
    module = method()
    with pytest.raises(ValueError, match="bidirectional attention module sees all tokens at once and has no KV cache"):
        module.cache_layer()
    with pytest.raises(ValueError, match="bidirectional attention module sees all tokens at once and has no KV cache"):
        attend(module, inputs(), cache=DynamicLayer())
