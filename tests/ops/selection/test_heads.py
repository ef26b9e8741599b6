"""Attention whose KV heads select different numbers of keys is that of each head alone."""

import pytest
import torch

from hf_sparse.ops import sparsek_attention

BATCH, HEADS, GROUP, LENGTH, DIM = 2, 4, 2, 60, 8
K, WINDOW, SINKS = (3, 11, 11, 5), 6, 2


def inputs(dtype=torch.float64):
    query = torch.randn(BATCH, HEADS * GROUP, LENGTH, DIM, dtype=dtype)
    key, value = torch.randn(2, BATCH, HEADS, LENGTH, DIM, dtype=dtype)
    scores = torch.randn(BATCH, HEADS, LENGTH, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (query, key, value, scores)]


def head_by_head(tensors, supports, **options):
    query, *others = tensors
    outputs = []
    for head, (k, support) in enumerate(zip(K, supports, strict=True)):
        one = [tensor[:, head : head + 1] for tensor in others]
        group = query[:, head * GROUP : (head + 1) * GROUP]
        outputs.append(sparsek_attention(group, *one, k=k, support=support, implementation="dense", **options))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("implementation", ["auto", "tiled", "dense"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gates, support", [("hard", None), ("soft", None), ("soft", tuple(2 * k for k in K))])
def test_outputs_and_gradients(implementation, causal, gates, support):
    tensors, start = inputs(), torch.tensor([0, 9])
    options = {"window": WINDOW, "sinks": SINKS, "gates": gates, "causal": causal, "start": start}
    output = sparsek_attention(*tensors, k=list(K), support=support, implementation=implementation, **options)
    expected = head_by_head(tensors, support or [None] * HEADS, **options)
    real = (torch.arange(LENGTH) >= start[:, None])[:, None, :, None]
    torch.testing.assert_close(output * real, expected * real, rtol=0, atol=1e-9)
    learned = tensors if gates == "soft" else tensors[:3]
    weights = torch.randn_like(output) * real
    found, wanted = (torch.autograd.grad((out * weights).sum(), learned) for out in (output, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)


def test_a_support_for_every_head_goes_with_one_k():
    tensors = inputs()
    options = {"k": 3, "window": WINDOW, "sinks": SINKS, "gates": "soft"}
    output = sparsek_attention(*tensors, support=[6] * HEADS, **options)
    assert torch.equal(output, sparsek_attention(*tensors, support=6, **options))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"k": [1, 2]}, "k must be a number, or one for each of 4 KV heads, got 2 numbers"),
        ({"k": 2, "support": [4]}, "support must be a number, or one for each of 4 KV heads, got 1 numbers"),
        ({"k": [1, 2, 0, 4]}, "k must be at least 1, got 0"),
        ({"k": [1, 2, 3, 4], "support": [4, 4, 4, 3], "gates": "soft"}, "support must be at least k = 4, got 3"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        sparsek_attention(*inputs(), window=WINDOW, sinks=SINKS, **settings)
