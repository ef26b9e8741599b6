"""Frozen baselines: what each selects, and that a score is the same however its token came."""

import pytest
import torch
import torch.nn.functional as F

from hf_sparse import SparseKConfig
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.methods.sparsek.baselines import BASELINES, Arrivals, KeyDifference, KeyNorm, Oracle, random, recency
from hf_sparse.ops import sparsek_attention

HIDDEN, HEADS, GROUP, DIM = 16, 2, 2, 4
BUDGET = {"k": 4, "window": 5, "sinks": 2}
LENGTH = 40
FROZEN = [name for name, baseline in BASELINES.items() if baseline.block is None]
CAUSAL = [name for name in FROZEN if name not in ("oracle", "prompt_random")]  # which reads a prompt in one piece
VALID = {
    "left": torch.arange(LENGTH) >= torch.tensor([0, 6, 30])[:, None],
    "right": torch.arange(LENGTH) < torch.tensor([LENGTH, 25, 3])[:, None],
    "interior": torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7,
    "a row of padding": (torch.arange(3) > 0)[:, None].expand(3, LENGTH),
}


def arrivals(index=None, heads=HEADS, layer=0, query=None, key=None, valid=None, cache=None):
    index = torch.arange(key.shape[2])[None] if index is None else index
    key = torch.zeros(*index.shape, DIM)[:, None].expand(-1, heads, -1, -1) if key is None else key
    query = key if query is None else query
    return Arrivals(query, key, index, valid, 0.7, BUDGET["k"] + BUDGET["sinks"], BUDGET["window"], layer, cache)


def method(baseline) -> SparseKAttention:
    module = SparseKAttention(HIDDEN, HEADS, layer=0)
    module.add_adapter("default", SparseKConfig(**BUDGET))
    module.baseline = baseline
    return module.eval()


def inputs(batch: int = 3) -> dict[str, torch.Tensor]:
    return {
        "query": torch.randn(batch, HEADS * GROUP, LENGTH, DIM),
        "key": torch.randn(batch, HEADS, LENGTH, DIM),
        "value": torch.randn(batch, HEADS, LENGTH, DIM),
        "hidden_states": torch.randn(batch, LENGTH, HIDDEN),
    }


def attend(module, tensors, valid=None, cache=None, tokens=slice(None)):
    part = {name: t[:, tokens] if name == "hidden_states" else t[:, :, tokens] for name, t in tensors.items()}
    if cache is not None:
        cache.begin_attention()
        cache.update(part["key"], part["value"])
    return module.attend(**part, valid=None if valid is None else valid[:, tokens], cache=cache, scaling=0.7)


def in_pieces(module, tensors, pieces, valid=None, cache=None):
    cache = module.cache_layer() if cache is None else cache
    outputs, begin = [], 0
    for length in pieces:
        outputs.append(attend(module, tensors, valid, cache, slice(begin, begin + length)))
        begin += length
    return torch.cat(outputs, 2), cache


@pytest.mark.parametrize("name", FROZEN)
def test_scores_are_float32_and_finite(name):
    scores = BASELINES[name](arrivals(key=torch.randn(3, 2, 20, DIM), index=torch.arange(20).expand(3, -1), layer=5))
    assert scores.shape == (3, 2, 20) and scores.dtype == torch.float32 and torch.isfinite(scores).all()


def test_recency_is_a_wider_window():
    q, k, v = torch.randn(3, 1, 2, 60, 4)
    scores = recency(arrivals(key=k))
    t, j = torch.arange(60)[:, None], torch.arange(60)
    mask = (j <= t) & ((j > t - 12) | (j < 3))
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    output = sparsek_attention(q, k, v, scores, k=7, window=5, sinks=3)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("baseline", [recency, random])
def test_a_score_depends_on_the_position_alone(baseline):
    """So it is frozen on arrival, and the same in one pass, in chunks, in a padded row and while decoding."""
    whole = baseline(arrivals(torch.arange(1000)[None], 3, 4))
    parts = [baseline(arrivals(torch.arange(a, b)[None], 3, 4)) for a, b in ((0, 1), (1, 400), (400, 1000))]
    assert torch.equal(torch.cat(parts, -1), whole)
    rows = baseline(arrivals(torch.stack([torch.arange(10), torch.arange(90, 100)]), 3, 4))
    assert torch.equal(rows[1], whole[0, :, 90:100])


def test_random_differs_between_layers_heads_and_positions():
    scores = torch.stack([random(arrivals(torch.arange(500)[None], 4, layer))[0] for layer in range(6)])
    assert scores.unique().numel() > 0.99 * scores.numel()
    rows = scores.flatten(0, 1)
    rows = rows - rows.mean(-1, keepdim=True)
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 500**0.5


@pytest.mark.parametrize("first", [0, 10_000_000])
def test_random_is_uniform(first):
    scores = random(arrivals(torch.arange(first, first + 20_000)[None], 2, 7)).flatten().double().sort().values
    uniform = torch.linspace(0, 1, scores.numel(), dtype=torch.float64)
    assert (scores - uniform).abs().max() < 2 / scores.numel() ** 0.5  # Kolmogorov-Smirnov, far out


def test_key_norm_prefers_short_keys():
    key = F.normalize(torch.randn(2, 3, 50, DIM), dim=-1)
    norms = torch.stack([torch.randperm(50) for _ in range(6)]).view(2, 3, 50) / 7 + 0.1
    scores = KeyNorm()(arrivals(key=key * norms[..., None], index=torch.arange(50).expand(2, -1)))
    assert torch.equal(scores.argsort(descending=True), norms.argsort())


def test_key_norm_does_not_tell_rotations_of_one_key_apart():
    key, angle = torch.randn(64, 1, 2), torch.arange(200.0)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    turned = torch.einsum("xyt,kzy->kztx", turn, key)
    assert turned.norm(dim=-1).unique().numel() > 1.5 * 64, "the norms themselves differ in their last bits"
    scores = KeyNorm()(arrivals(key=turned, index=torch.arange(200).expand(64, -1)))
    assert ((scores == scores[..., :1]).all(-1)).float().mean() > 0.95
    torch.testing.assert_close(-scores, turned.norm(dim=-1), rtol=2**-12, atol=0)


def test_key_difference_is_the_cosine_to_the_mean_of_the_keys_so_far():
    key = torch.randn(1, HEADS, 30, DIM)
    scores = KeyDifference()(arrivals(key=key))
    for head in range(HEADS):
        for t in range(30):
            unit = [k / k.norm() for k in key[0, head, : t + 1]]
            anchor = sum(unit) / len(unit)
            expected = -F.cosine_similarity(key[0, head, t], anchor, dim=0)
            torch.testing.assert_close(scores[0, head, t], expected, rtol=0, atol=1e-5)


def test_the_oracle_is_the_mean_attention_of_far_queries():
    tensors = inputs(1)
    query, key = tensors["query"], tensors["key"]
    scores = Oracle()(arrivals(query=query, key=key))
    weights = torch.zeros(HEADS * GROUP, LENGTH, LENGTH)
    for t in range(LENGTH):
        for head in range(HEADS * GROUP):
            weights[head, t, : t + 1] = (key[0, head // GROUP, : t + 1] @ query[0, head, t] * 0.7).softmax(0)
    for head in range(HEADS):
        for j in range(LENGTH):
            far = weights[GROUP * head : GROUP * (head + 1), j + BUDGET["window"] :, j].sum(0)
            expected = far.mean() if len(far) else torch.tensor(0.0)
            torch.testing.assert_close(scores[0, head, j], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", VALID)
def test_the_oracle_sees_each_row_without_its_padding(padding):
    module, tensors, valid = method(Oracle()), inputs(), VALID[padding]
    output = attend(module, tensors, valid)
    for row in range(3):
        real = valid[row].nonzero().squeeze(-1)
        if len(real):
            part = {name: t[row : row + 1] for name, t in tensors.items()}
            expected = attend(module, part, tokens=real)
            torch.testing.assert_close(output[row : row + 1, :, real], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("length", [1, LENGTH])
def test_the_oracle_refuses_a_cache(length):
    module, tensors = method(Oracle()), inputs()
    with pytest.raises(ValueError, match=r"whole texts without a cache \(use_cache=False\) and cannot generate"):
        attend(module, tensors, cache=module.cache_layer(), tokens=slice(length))


@pytest.mark.cross
@pytest.mark.parametrize("pieces", [[17, 23], [1, 3, 9, 1, 1, 12, 13], [10] + [1] * 30], ids=len)
@pytest.mark.parametrize("padding", ["none", *VALID])
@pytest.mark.parametrize("name", CAUSAL)
def test_any_pieces_and_any_padding_equal_each_row_alone(name, padding, pieces):
    module, tensors = method(BASELINES[name]), inputs()
    valid = VALID.get(padding)
    output, cache = in_pieces(module, tensors, pieces, valid)
    real = torch.ones(3, LENGTH, dtype=torch.bool) if valid is None else valid
    for row in range(3):
        at = real[row].nonzero().squeeze(-1)
        if len(at):
            part = {name: t[row : row + 1] for name, t in tensors.items()}
            alone = attend(module, part, tokens=at)
            torch.testing.assert_close(output[row : row + 1, :, at], alone, rtol=0, atol=2e-6)
    # The cache goes on as a whole: rows change places with their keys.
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    more = inputs()
    swapped = attend(module, {name: t[[2, 0, 0]] for name, t in more.items()}, cache=cache, tokens=slice(1))
    _, again = in_pieces(module, tensors, pieces, valid)
    expected = attend(module, more, cache=again, tokens=slice(1))
    assert torch.equal(swapped, expected[[2, 0, 0]])


@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_that_was_reset_begins_anew(name):
    module, tensors = method(BASELINES[name]), inputs()
    expected, cache = in_pieces(module, tensors, [20, 20])
    cache.reset()
    again, _ = in_pieces(module, tensors, [20, 20], cache=cache)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", CAUSAL)
def test_cropping_is_exact_or_refused(name):
    module, tensors = method(BASELINES[name]), inputs()
    _, cache = in_pieces(module, tensors, [6, 1, 1])
    if BASELINES[name].depends_on_text:
        with pytest.raises(RuntimeError, match="the scores in this cache depend on all tokens so far"):
            cache.crop(-3)
        return
    cache.crop(-3)
    expected, _ = in_pieces(module, tensors, [5, 10])
    assert torch.equal(attend(module, tensors, cache=cache, tokens=slice(5, 15)), expected[:, :, 5:])
