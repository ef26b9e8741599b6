"""Whole texts through adaptive baselines, against the general way, which takes padding and texts that go on."""

import pytest
import torch

from hf_sparse import SparseKConfig, patch
from hf_sparse.evaluation import using
from hf_sparse.methods.sparsek import SparseKAttention, in_blocks
from hf_sparse.methods.sparsek.baselines import BASELINES, H2O, TOVA, AdaptiveBaseline, SnapKV
from hf_sparse.methods.sparsek.baselines.blocks import attend_in_blocks
from hf_sparse.methods.sparsek.budget import Budget

HIDDEN, HEADS, GROUP, DIM, SCALING = 16, 2, 3, 8, 0.7


class Nearest(AdaptiveBaseline):
    """Scores that tie: rounded weights of all queries."""

    def update(self, scores, weights, positions):
        return (10 * weights.amax(2)).round()


def make_layer(baseline: AdaptiveBaseline, budget: Budget) -> SparseKAttention:
    layer = SparseKAttention(HIDDEN, HEADS, layer=0)
    layer.add_adapter("default", SparseKConfig(**budget._asdict()))
    layer.baseline = baseline
    return layer.eval()


def make_inputs(length: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {
        "query": torch.randn(2, HEADS * GROUP, length, DIM, dtype=dtype),
        "key": torch.randn(2, HEADS, length, DIM, dtype=dtype),
        "value": torch.randn(2, HEADS, length, DIM, dtype=dtype),
        "hidden_states": torch.randn(2, length, HIDDEN, dtype=dtype),
    }


def general(layer, tensors, cache=None):
    """The attention where a mask is given: with nothing padded, it says the same."""
    valid = torch.ones(tensors["hidden_states"].shape[:2], dtype=torch.bool)
    return layer.attend(**tensors, valid=valid, cache=cache, scaling=SCALING)


def plain(layer, tensors, cache=None):
    return layer.attend(**tensors, valid=None, cache=cache, scaling=SCALING)


def filled(layer, tensors, attend):
    cache = layer.cache_layer()
    cache.begin_attention()
    cache.update(tensors["key"], tensors["value"])
    output = attend(layer, tensors, cache)
    cache.end_attention()
    return output, cache


RULES = [
    H2O(),
    TOVA(),
    SnapKV(),
    H2O(block=5),
    TOVA(block=1),
    SnapKV(block=4, observation=2, kernel=3),
    Nearest(block=6),
]
BUDGETS = [Budget(6, 8, 2), Budget(1, 1, 0), Budget(20, 3, 0), Budget(5, 32, 1), Budget(3, 4, 9), Budget(200, 20, 4)]


@pytest.mark.cross("values")
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: "-".join(map(str, budget)))
@pytest.mark.parametrize("baseline", RULES, ids=repr)
def test_the_short_way_keeps_the_keys_of_the_general_one(baseline, budget):
    layer = make_layer(baseline, budget)
    for length in (1, 7, 64, 101):
        tensors = make_inputs(length)
        torch.testing.assert_close(plain(layer, tensors), general(layer, tensors), rtol=0, atol=2e-6)
        (output, cache), (expected, other) = (filled(layer, tensors, attend) for attend in (plain, general))
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
        assert torch.equal(cache.seen, other.seen)
        assert torch.equal(cache.ordered()[3], other.ordered()[3])
        count = min(length, budget.slots)  # what an empty slot holds has no meaning
        for kept, expected in zip(cache.ordered(), other.ordered(), strict=True):
            torch.testing.assert_close(kept[:, :, -count:], expected[:, :, -count:], rtol=0, atol=1e-5)


def test_equal_keys_leave_in_the_order_of_the_general_way():
    layer, tensors = make_layer(H2O(block=3), Budget(6, 4, 2)), make_inputs(80)
    for name in ("query", "key"):  # few different tokens, and queries that cannot tell some apart
        tensors[name] = tensors[name][:, :, :4].repeat(1, 1, 20, 1).round()
    torch.testing.assert_close(plain(layer, tensors), general(layer, tensors), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    layer, tensors = make_layer(TOVA(), Budget(6, 8, 2)), make_inputs(64, dtype)
    output, expected = plain(layer, tensors), general(layer, tensors)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=0.01 if dtype == torch.bfloat16 else 0, atol=1e-6)


def test_gradients_reach_queries_and_every_key_and_value():
    tensors = make_inputs(14, torch.float64)
    leaves = [tensors[name][:1].requires_grad_() for name in ("query", "key", "value")]

    def attend(*leaves):
        return attend_in_blocks(*leaves, H2O(block=3), Budget(2, 4, 1), scaling=SCALING)[0]

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_scores_and_indices_of_what_is_left():
    """By hand: one query head, uniform weights, a window of 1 token and 2 selected keys; the newest have least."""
    query, key = torch.zeros(1, 1, 6, DIM), torch.randn(1, 1, 6, DIM)
    value = torch.eye(6, DIM)[None, None]
    output, kept = attend_in_blocks(query, key, value, H2O(), Budget(2, 1, 0), scaling=SCALING)
    assert kept.index.tolist() == [[[0, 1, 5]]]
    # Key 0: 1 + 1/2 + 1/3 + ..., each later query sees three keys; key 1 the same but for the first query.
    torch.testing.assert_close(kept.scores, torch.tensor([[[1 + 1 / 2 + 4 / 3, 1 / 2 + 4 / 3, 1 / 3]]]))
    torch.testing.assert_close(output[0, 0, 4], (value[0, 0, [0, 1, 4]]).mean(0))


@pytest.mark.parametrize("name", [name for name, baseline in BASELINES.items() if baseline.block is not None])
def test_a_model_predicts_the_same(tiny_llama, name, monkeypatch):
    model = patch(tiny_llama(), SparseKConfig(k=6, window=8, sinks=2))
    tokens = torch.randint(2, 64, (3, 90))
    taken, short = [], in_blocks.attend_in_blocks
    monkeypatch.setattr(
        in_blocks, "attend_in_blocks", lambda *args, **options: taken.append(1) or short(*args, **options)
    )
    with torch.no_grad(), using(model, name):
        logits = model(tokens, use_cache=False).logits
        assert len(taken) == model.config.num_hidden_layers
        monkeypatch.setattr(in_blocks, "_is_plain_text", lambda *_: False)
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, rtol=0, atol=1e-4)
    assert len(taken) == model.config.num_hidden_layers


def test_autocast_takes_the_general_way():
    layer, tensors = make_layer(H2O(), Budget(6, 8, 2)), make_inputs(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = plain(layer, tensors), general(layer, tensors)
    assert torch.equal(output, expected)
