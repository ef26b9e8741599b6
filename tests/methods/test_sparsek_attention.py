"""The attached module, without a model: padding, chunks and single tokens all give what one whole row alone gives."""

import copy
import pickle
from threading import Lock

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from hf_sparse import SparseKConfig
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.methods.sparsek.baselines import recency
from hf_sparse.ops import sparsek_attention

HIDDEN, HEADS, GROUP, DIM = 16, 2, 2, 4
BUDGET = {"k": 4, "window": 5, "sinks": 2}


def method(**settings) -> SparseKAttention:
    module = SparseKAttention(HIDDEN, HEADS, layer=0)
    module.add_adapter("default", SparseKConfig(**{**BUDGET, **settings}))
    return module.eval()


def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {
        "query": torch.randn(batch, HEADS * GROUP, length, DIM),
        "key": torch.randn(batch, HEADS, length, DIM),
        "value": torch.randn(batch, HEADS, length, DIM),
        "hidden_states": torch.randn(batch, length, HIDDEN),
    }


def take(tensors: dict[str, torch.Tensor], rows, tokens) -> dict[str, torch.Tensor]:
    at = {"query": 2, "key": 2, "value": 2, "hidden_states": 1}
    return {name: t[rows].movedim(at[name], 0)[tokens].movedim(0, at[name]) for name, t in tensors.items()}


def attend(module, tensors, valid=None, cache=None):
    if cache is not None:
        cache.begin_attention()
        cache.update(tensors["key"], tensors["value"])
    return module.attend(**tensors, valid=valid, cache=cache, scaling=0.7)


def alone(module, tensors, valid):
    """Each row by itself, without its padding; 0 at padding."""
    output = torch.zeros_like(tensors["query"])
    for row in range(len(valid)):
        real = valid[row].nonzero().squeeze(-1)
        if len(real):
            part = take(tensors, slice(row, row + 1), real)
            scores = module.score(part["hidden_states"], torch.arange(len(real))[None])
            q, k, v = part["query"], part["key"], part["value"]
            output[row, :, real] = sparsek_attention(
                q, k, v, scores, **BUDGET, scaling=0.7, implementation="dense"
            ).squeeze(0)
    return output


LENGTH = 40
VALID = {
    "left": torch.arange(LENGTH) >= torch.tensor([0, 6, 30])[:, None],
    "right": torch.arange(LENGTH) < torch.tensor([LENGTH, 25, 3])[:, None],
    "interior": torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7,
    "sparse": torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.2,
    "a row of padding": (torch.arange(3) > 0)[:, None].expand(3, LENGTH),
}
CHUNKS = {
    "one pass": [LENGTH],
    "two": [17, 23],
    "many": [1, 3, 9, 1, 1, 12, 13],
    "prefill and decode": [10] + [1] * 30,
    "token by token": [1] * LENGTH,
    "long prefill": [30, 1, 1, 8],
}


@pytest.mark.cross
@pytest.mark.parametrize("slope", [0.0, 0.05])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("padding", ["none", *VALID])
def test_any_chunks_and_any_padding_equal_each_row_alone(chunks, padding, slope):
    module = method(position_slope=slope)
    tensors = inputs(3, LENGTH)
    valid = VALID.get(padding)
    cache = module.cache_layer()
    outputs, begin = [], 0
    for length in CHUNKS[chunks]:
        tokens = torch.arange(begin, begin + length)
        begin += length
        part = None if valid is None else valid[:, tokens]
        outputs.append(attend(module, take(tensors, slice(None), tokens), part, cache))
    real = torch.ones(3, LENGTH, dtype=torch.bool) if valid is None else valid
    output = torch.cat(outputs, 2)
    assert torch.isfinite(output).all()
    mask = real[:, None, :, None]
    torch.testing.assert_close(output * mask, alone(module, tensors, real), rtol=0, atol=2e-6)


def test_without_a_cache():
    module, tensors, valid = method(), inputs(3, LENGTH), VALID["interior"]
    output = attend(module, tensors, valid) * valid[:, None, :, None]
    torch.testing.assert_close(output, alone(module, tensors, valid), rtol=0, atol=2e-6)


@pytest.mark.parametrize("valid", [None, VALID["interior"]], ids=["whole", "padded"])
def test_training_uses_soft_gates_within_the_support(valid):
    module, tensors = method(support=2).train(), inputs(3, LENGTH)
    output = attend(module, tensors, valid)
    row = 1
    real = torch.arange(LENGTH) if valid is None else valid[row].nonzero().squeeze(-1)
    part = take(tensors, slice(row, row + 1), real)
    scores = module.score(part.pop("hidden_states"), torch.arange(len(real))[None])
    expected = sparsek_attention(
        **part, scores=scores, **BUDGET, scaling=0.7, gates="soft", support=8, implementation="dense"
    )
    torch.testing.assert_close(output[row : row + 1, :, real], expected, rtol=0, atol=2e-6)
    (output.square().mean()).backward()
    weight = module.sparsek_scorer["default"].weight
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_a_baseline_is_hard_in_training_too():
    module, tensors = method(), inputs(2, LENGTH)
    module.baseline = recency
    expected = attend(module, tensors)
    assert torch.equal(attend(module.train(), tensors), expected)


def test_a_baseline_decodes_through_the_same_cache():
    module, tensors = method(), inputs(2, LENGTH)
    module.baseline = recency
    whole, cache = attend(module, tensors), module.cache_layer()
    steps = [attend(module, take(tensors, slice(None), torch.tensor([t])), cache=cache) for t in range(LENGTH)]
    torch.testing.assert_close(torch.cat(steps, 2), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("valid", [None, VALID["left"], VALID["interior"]], ids=["whole", "left", "interior"])
def test_an_observer_sees_everything_and_the_output_is_dense(valid):
    module, tensors = method().train(), inputs(3, LENGTH)
    seen = []
    module.observer = lambda *arguments: seen.append(arguments)
    output = attend(module, tensors, valid)
    ((query, key, scores, scaling),) = seen
    assert query is tensors["query"] and key is tensors["key"] and scaling == 0.7
    assert scores.shape == (3, HEADS, LENGTH) and scores.requires_grad
    real = torch.ones(3, LENGTH, dtype=torch.bool) if valid is None else valid
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = causal & real[:, None, None] | torch.eye(LENGTH, dtype=torch.bool)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, tensors["value"], mask, scale=0.7, enable_gqa=True
    )
    shown = real[:, None, :, None]
    torch.testing.assert_close(output * shown, expected * shown, rtol=0, atol=2e-6)


def test_decoding_while_training_is_refused():
    module, tensors = method().train(), inputs(1, 3)
    cache = module.cache_layer()
    attend(module, tensors, cache=cache)
    with pytest.raises(ValueError, match=r"call model.eval\(\) or use torch.no_grad\(\) before generating"):
        attend(module, inputs(1, 1), cache=cache)


def test_another_cache_is_refused():
    with pytest.raises(TypeError, match="SparseK needs a SparseKCacheLayer as its cache layer, got DynamicLayer"):
        method().attend(**inputs(1, 3), valid=None, cache=DynamicLayer(), scaling=1.0)


@pytest.mark.parametrize("window", [BUDGET["window"], 6], ids=["same budget", "other budget"])
def test_a_cache_of_another_adapter_is_refused(window):
    module = method()
    cache = module.cache_layer()
    attend(module, inputs(1, 3), cache=cache)
    module.add_adapter("other", SparseKConfig(**{**BUDGET, "window": window}))
    module.set_adapter("other")
    with pytest.raises(
        ValueError, match=r"holds what another adapter chose, or this one before .* start a new cache after switching"
    ):
        attend(module, inputs(1, 1), cache=cache)


def test_two_active_adapters_are_refused():
    module = method()
    module.add_adapter("other", SparseKConfig(k=1, window=1))
    assert module.active == "default" and module.config.k == 4
    module.set_adapter("other")
    assert module.config.k == 1
    module.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"exactly one active adapter, got \['default', 'other'\]"):
        attend(module, inputs(1, 3))


def test_merging_is_refused():
    with pytest.raises(ValueError, match="there are no weights that it could be merged into"):
        method().merge()
    with pytest.raises(ValueError, match="never merged"):
        method().unmerge()


def test_a_copy_makes_kernels_of_its_own():
    module = method()
    module.row_kernels["layout"] = Lock()  # a compiled kernel cannot be copied either
    module.row_scratch = torch.zeros(10**6)
    assert len(pickle.dumps(module)) < 10**5
    copied = copy.deepcopy(module)
    assert copied.row_kernels == {} and copied.row_scratch is None and "layout" in module.row_kernels
    assert torch.equal(copied.sparsek_scorer["default"].weight, module.sparsek_scorer["default"].weight)
