"""The kernel for short texts, against softmax in float64."""

import pytest
import torch

from hf_sparse.ops import causal_attention as dispatch
from hf_sparse.ops.causal_attention import causal_attention
from hf_sparse.ops.triton.causal_attention import attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter", "nothing_noted")


def inputs(batch, heads, kv_heads, length, dim, dtype):
    """Query, key and value as a model has them, `[B, T, H, D]` in memory."""
    torch.manual_seed(length)
    shapes = [(batch, length, number, dim) for number in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, device=DEVICE, dtype=dtype).transpose(1, 2) for shape in shapes]


def reference(query, key, value, scaling):
    group = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(x.double().repeat_interleave(group, 1) for x in (key, value))
    logits = scaling * query @ key.mT
    sees = torch.ones(logits.shape[-2:], dtype=torch.bool, device=DEVICE).tril()
    return logits.masked_fill(~sees, -torch.inf).softmax(-1) @ value


@pytest.mark.cross("values")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "dim", "scaling"),
    [
        (2, 4, 2, 1, 16, 0.2),
        (1, 3, 1, 63, 24, 0.2),
        (2, 2, 2, 64, 16, -0.2),
        (1, 6, 2, 65, 40, 2.0),
        (1, 2, 1, 150, 72, 0.0),
        (1, 2, 1, 33, 256, 0.1),
    ],
)
def test_values(batch, heads, kv_heads, length, dim, scaling, dtype, poisoned_memory):
    query, key, value = inputs(batch, heads, kv_heads, length, dim, dtype)
    expected = reference(query, key, value, scaling)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 5e-3}
    for _ in range(2 if DEVICE == "cuda" else 1):  # the second time by the launch that the first one noted
        output = attend(query, key, value, scaling)
        assert output.shape == query.shape and output.stride() == query.stride() and output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, **tolerance)


def test_large_logits_and_masked_values(poisoned_memory):
    """Neither overflows, and what a query does not see is not read into it."""
    query, key, value = inputs(1, 2, 1, 70, 16, torch.float32)
    query, key = 60 * query, 60 * key
    torch.testing.assert_close(
        attend(query, key, value, 0.25).double(), reference(query, key, value, 0.25), rtol=1e-3, atol=1e-3
    )
    before = attend(query, key, value, 0.25)
    key[:, :, 40:], value[:, :, 40:] = 1e30, 1e30
    assert torch.equal(attend(query, key, value, 0.25)[:, :, :40], before[:, :, :40])


def test_short_texts_take_the_kernel_and_others_sdpa(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(dispatch, "is_on_gpu", lambda tensor: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    query, key, value = inputs(2, 4, 2, 70, 64, torch.float16)
    for no_gradients in (torch.no_grad, torch.inference_mode):
        with no_gradients():
            assert dispatch.takes_kernel(query, key, value)
            assert torch.equal(causal_attention(query, key, value, scaling=0.2), attend(query, key, value, 0.2))
            assert not dispatch.takes_kernel(query, key, value[..., :32])
            assert not dispatch.takes_kernel(query, key.transpose(2, 3).contiguous().transpose(2, 3), value)
            assert not dispatch.takes_kernel(query.double(), key.double(), value.double())
    assert not dispatch.takes_kernel(query, key, value)  # gradients
    with torch.no_grad():
        monkeypatch.setattr(dispatch, "_MOST_PRODUCTS", query.numel() * 70 - 1)
        assert not dispatch.takes_kernel(query, key, value)
        expected = reference(query, key, value, 0.2)
        torch.testing.assert_close(
            causal_attention(query, key, value, scaling=0.2).double(), expected, rtol=1e-2, atol=1e-2
        )
