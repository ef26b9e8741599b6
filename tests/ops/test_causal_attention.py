"""Dense causal attention of whole texts, where there is no kernel for it."""

import pytest
import torch

from hf_sparse.ops.causal_attention import causal_attention, is_short


@pytest.mark.parametrize("heads, kv_heads, length", [(4, 4, 1), (4, 2, 9), (6, 1, 33)])
def test_values_and_gradients(heads, kv_heads, length):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, number, length, 8, dtype=torch.float64, requires_grad=True)
        for number in (heads, kv_heads, kv_heads)
    )
    output = causal_attention(query, key, value, scaling=0.3)
    keys, values = (tensor.repeat_interleave(heads // kv_heads, 1) for tensor in (key, value))
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    expected = (0.3 * query @ keys.mT).masked_fill(~sees, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), (query, key, value)) for x in (output, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("batch, heads, length, dim, short", [(1, 32, 512, 128, True), (1, 32, 1024, 128, False)])
def test_length_alone_does_not_make_a_text_short(batch, heads, length, dim, short):
    assert is_short(torch.empty(batch, heads, length, dim, device="meta")) == short
