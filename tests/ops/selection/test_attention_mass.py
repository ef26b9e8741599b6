"""Far-attention mass against the dense attention matrix."""

import pytest
import torch

import hf_sparse.ops.selection.attention_mass as mass_module
from hf_sparse.ops.selection.attention_mass import far_attention_mass


@pytest.mark.parametrize("buffer", [1, 200, 1 << 26], ids=["row-by-row", "some-rows", "at-once"])
@pytest.mark.parametrize("group", [1, 3])
def test_equals_the_dense_matrix(monkeypatch, buffer, group):
    monkeypatch.setattr(mass_module, "_BUFFER", buffer)
    length, window = 37, 5
    query, key = torch.randn(2, 2 * group, length, 8), torch.randn(2, 2, length, 8)
    logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * 0.3
    index = torch.arange(length)
    weight = logits.masked_fill(index > index[:, None], -torch.inf).softmax(-1)
    far = weight * (index[:, None] - index >= window)
    expected = far.view(2, 2, group, length, length).sum((2, 3)) / (length - window - index).clamp(min=1)
    found = far_attention_mass(query, key, window=window, scaling=0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not found[..., -window:].any()
    assert found.min() >= 0 and found.max() <= group


@pytest.mark.parametrize("buffer", [1, 200, 1 << 26], ids=["row-by-row", "some-rows", "at-once"])
@pytest.mark.parametrize("window", [1, 4, 5, 37, 74, 90])
def test_equals_the_dense_matrix_of_an_encoder(monkeypatch, buffer, window):
    monkeypatch.setattr(mass_module, "_BUFFER", buffer)
    length, group = 37, 2
    query, key = torch.randn(2, 2 * group, length, 8), torch.randn(2, 2, length, 8)
    weight = (query @ key.repeat_interleave(group, 1).transpose(-1, -2) * 0.3).softmax(-1)
    expected = torch.zeros(2, 2, length)
    for j in range(length):
        far = [i for i in range(length) if not i - window // 2 <= j < i - window // 2 + window]
        if far:
            expected[..., j] = weight[:, :, far, j].view(2, 2, group, -1).sum(2).mean(-1)
    found = far_attention_mass(query, key, window=window, scaling=0.3, causal=False)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert bool(found.any()) == (window < 74)
