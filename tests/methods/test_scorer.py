import pytest
import torch

from hf_sparse import SparseKConfig
from hf_sparse.methods.sparsek.scorer import make_scorer
from hf_sparse.ops import sparsek, sparsek_attention

KINDS = ["linear", "mlp"]


def scorer(kind, hidden_size=16, causal=True, **settings):
    config = SparseKConfig(scorer=kind, scorer_hidden_size=24, **settings)
    made = make_scorer(config, hidden_size=hidden_size, num_key_value_heads=3, causal=causal)
    if made.slope is not None:
        torch.nn.init.normal_(made.slope)
    return made


def score(module, inputs, begin=0):
    return module(inputs, torch.arange(begin, begin + inputs.shape[1]).expand(len(inputs), -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_float32_whatever_the_dtype(kind, weights, states):
    module = scorer(kind).to(weights)
    inputs = torch.randn(2, 7, 16).to(states)
    scores = score(module, inputs)
    assert scores.shape == (2, 3, 7) and scores.dtype == torch.float32 and scores.is_contiguous()
    assert torch.equal(scores, score(module.float(), inputs.float()))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_reach_the_scores(kind):
    module, inputs = scorer(kind), torch.randn(2, 7, 16)
    expected = score(module, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(inputs[0], inputs[0].T).dtype == torch.bfloat16
        assert torch.equal(score(module, inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_and_the_mean_of_the_input_do_not_matter(kind):
    module, inputs = scorer(kind), torch.randn(2, 7, 16)
    torch.testing.assert_close(score(module, inputs * 100 + 5), score(module, inputs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_scored_alone(kind):
    module, inputs = scorer(kind), torch.randn(2, 7, 16)
    parts = [score(module, inputs[:, :3]), score(module, inputs[:, 3:4], 3), score(module, inputs[:, 4:], 4)]
    torch.testing.assert_close(torch.cat(parts, -1), score(module, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_token_has_the_same_score_to_the_last_bit(kind):
    """However many others are scored with it: the tie between its occurrences is broken by their order alone."""
    module = scorer(kind, hidden_size=576, learn_slope=False)
    token, others = torch.randn(576), torch.randn(1, 300, 576)
    for length in (1, 2, 3, 7, 64, 255, 300):
        states = others[:, :length].clone()
        states[:, length // 2] = states[:, -1] = token
        scores = score(module, states)
        assert torch.equal(scores[:, :, length // 2], score(module, token[None, None])[:, :, 0])
        assert torch.equal(scores[:, :, -1], scores[:, :, length // 2])


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_scored_piece_by_piece(kind, monkeypatch):
    module, inputs = scorer(kind), torch.randn(2, 23, 16, requires_grad=True)
    wanted, upstream = [inputs, *module.parameters()], torch.randn(2, 3, 23)
    whole = score(module, inputs)
    gradients = torch.autograd.grad(whole, wanted, upstream)
    monkeypatch.setattr("hf_sparse.methods.sparsek.scorer._PIECE", 2 * 16 * 5)
    pieces = score(module, inputs)
    assert torch.equal(pieces, whole)
    for gradient, expected in zip(torch.autograd.grad(pieces, wanted, upstream), gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_needs_the_input_only(kind, states, monkeypatch):
    """Against autograd's own backward of the same, which keeps the input in two precisions."""
    module, inputs = scorer(kind), torch.randn(2, 7, 16).to(states).requires_grad_()
    wanted, upstream = [inputs, *module.parameters()], torch.randn(2, 3, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        scores = score(module, inputs)
    assert [t.dtype for t in kept if t.shape == inputs.shape] == [states] and all(t.numel() <= 24 * 16 for t in kept)
    gradients = torch.autograd.grad(scores, wanted, upstream)
    monkeypatch.setattr(module, "_score_piece", module.score)
    expected = score(module, inputs)
    assert torch.equal(scores, expected)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, wanted, upstream), strict=True):
        assert torch.equal(gradient, other)


def test_a_weight_that_changed_before_the_backward_is_noticed():
    module, inputs = scorer("linear"), torch.randn(2, 7, 16)
    scores = score(module, inputs)
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


def test_linear_is_a_weight_per_feature_and_head_on_the_normalised_input():
    module, inputs = scorer("linear", learn_slope=False), torch.randn(2, 7, 16, dtype=torch.float64).float()
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"weight": (3, 16)}
    centred = inputs - inputs.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = torch.einsum("btc,hc->bht", normal, module.weight)
    torch.testing.assert_close(score(module, inputs), expected, rtol=0, atol=1e-6)


def test_mlp_parameters():
    shapes = {name: tuple(p.shape) for name, p in scorer("mlp").named_parameters()}
    assert shapes == {"up": (24, 16), "up_bias": (24,), "down": (3, 24), "slope": (3,)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed, length", [(0.0, None), (0.03, None), (0.03, 64)])
def test_slopes_are_those_of_the_heads_and_the_fixed_one_together(kind, fixed, length):
    module, inputs = scorer(kind, position_slope=fixed, slope_length=length), torch.randn(2, 7, 16)
    flat = scorer(kind, learn_slope=False)
    assert not flat.load_state_dict(module.state_dict(), strict=False).missing_keys
    slopes = fixed + module.slope.double() / 256
    index = torch.tensor([5, 6, 7, 8, 100, 2000, 10**5])
    risen = index if length is None else length * torch.log1p(index.double() / length)
    expected = flat(inputs, index.expand(2, -1)).double() + slopes[:, None] * risen
    torch.testing.assert_close(module(inputs, index.expand(2, -1)).double(), expected, rtol=1e-6, atol=1e-6)


def test_an_encoder_has_no_slopes():
    assert scorer("linear", causal=False).slope is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    module = scorer(kind)
    score(module, torch.randn(2, 7, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize("k", [8000, 8192, 9000])
def test_soft_gates_have_a_gradient_whatever_the_budget(k):
    scores = torch.randn(1, 3 * k, requires_grad=True)
    gates = sparsek(scores.topk(SparseKConfig().soft_support(k)).values, k)
    (gates * torch.randn_like(gates)).sum().backward()
    assert scores.grad.any()


@pytest.mark.parametrize("gates", ["hard", "soft"])
def test_a_bias_would_change_nothing(gates):
    q, k, v = torch.randn(3, 1, 1, 40, 4, dtype=torch.float64)
    scores = torch.randn(1, 1, 40, dtype=torch.float64)
    outputs = [sparsek_attention(q, k, v, scores + bias, k=4, window=3, sinks=1, gates=gates) for bias in (0.0, 17.0)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
