"""Attention to blocks and first tokens against the same with a mask of all pairs, written out."""

import pytest
import torch

from hf_sparse.ops.local_attention import FIRST, local_attention


def pairs(length, window, first=FIRST):
    """`[T, T]` bool: which key each query attends to."""
    token = torch.arange(length)
    query, key = token[:, None], token[None]
    return (key <= query) & ((key // window >= query // window - 1) | (key < first))


def inputs(length, heads=4, key_heads=2, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, number, length, 8, generator=generator, dtype=torch.float64)
        for number in (heads, key_heads, key_heads)
    ]


def expected(query, key, value, mask, scaling):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = (scaling * query @ key.mT).masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ value


@pytest.mark.parametrize("first", [0, 1, FIRST, 40])
@pytest.mark.parametrize("window", [1, 2, 7, 16])
@pytest.mark.parametrize("length", [1, 13, 32, 61])
def test_it_is_attention_under_a_mask(length, window, first):
    """Lengths that are no multiple of the window, windows smaller than the first tokens, and more of these than fit."""
    tensors = inputs(length)
    found = local_attention(*tensors, window=window, scaling=0.3, first=first)
    torch.testing.assert_close(found, expected(*tensors, pairs(length, window, first), 0.3))


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 1)])
def test_heads_share_keys(heads, key_heads):
    tensors = inputs(29, heads, key_heads)
    found = local_attention(*tensors, window=4, scaling=0.5)
    torch.testing.assert_close(found, expected(*tensors, pairs(29, 4), 0.5))


def test_each_token_sees_at_least_a_window_and_short_texts_are_seen_as_a_whole():
    seen = pairs(50, 8, first=0).sum(1)
    assert torch.equal(seen[:16], torch.arange(1, 17)) and seen[16:].min() == 9 and seen.max() == 16
    query, key, value = inputs(16)
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    whole = torch.nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=0.3)
    assert torch.equal(local_attention(query, key, value, window=8, scaling=0.3), whole)


def test_memory_grows_with_the_length_and_not_with_its_square(largest_tensor):
    with largest_tensor() as short:
        local_attention(*inputs(256), window=8, scaling=1.0)
    with largest_tensor() as long:
        local_attention(*inputs(1024), window=8, scaling=1.0)
    assert long.numel == 4 * short.numel
