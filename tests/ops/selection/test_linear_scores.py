import torch

from hf_sparse.ops.selection.linear_scores import linear_scores, normalised


def test_gradients():
    torch.manual_seed(0)
    states, weight = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(linear_scores, (states.requires_grad_(), weight.requires_grad_()))


def test_one_token_is_scored_as_among_others():
    states, weight = torch.randn(2, 9, 33), torch.randn(3, 33)
    alone = torch.cat([linear_scores(token, weight) for token in states.split(1, 1)], 2)
    torch.testing.assert_close(alone, linear_scores(states, weight), rtol=0, atol=1e-13)


def test_it_is_the_layer_norm_and_a_product():
    states, weight = torch.randn(2, 9, 33), torch.randn(3, 33)
    centred = states.double() - states.double().mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normalised(states), expected, rtol=0, atol=1e-13)
    expected = torch.einsum("btc,hc->bht", expected, weight.double())
    torch.testing.assert_close(linear_scores(states, weight), expected, rtol=0, atol=1e-13)
