"""Entmax of rows of logits in a kernel, against plain PyTorch in float64."""

import pytest
import torch

from hf_sparse.ops.entmax.threshold import distribution
from hf_sparse.ops.entmax.triton import rows
from hf_sparse.ops.entmax.triton.rows import distribution_of_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreter")


@pytest.mark.cross("values")
@pytest.mark.parametrize("exponent", [2.0, 1.0, 1 / 0.3, "heads"])
@pytest.mark.parametrize("length", [1, 37, 128])
def test_rows_are_those_of_plain_pytorch(monkeypatch, exponent, length):
    monkeypatch.setattr(rows, "_WIDE", 32)  # several blocks of a row
    torch.manual_seed(0)
    z = 2 * torch.randn(2, 3, 4, length, device=DEVICE)
    z[0, 0, 1], z[1, 2, 3, length // 2 :] = -torch.inf, -torch.inf
    if exponent == "heads":
        exponent = torch.tensor([1.1, 2.0, 5.0], device=DEVICE)[:, None, None]
    found = distribution_of_rows(z, exponent)
    wide = exponent.double() if isinstance(exponent, torch.Tensor) else exponent
    expected = distribution(z.double(), wide)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)
    assert found.shape == z.shape and (found[0, 0, 1] == 0).all()
    # Entries that are 0 by more than rounding are 0.
    assert not found[expected == 0].gt(1e-6).any()


def test_rows_that_do_not_lie_in_one_piece():
    z = torch.randn(5, 16, device=DEVICE).t()
    torch.testing.assert_close(distribution_of_rows(z, 2.0), distribution(z.double(), 2.0).float(), rtol=0, atol=3e-6)
    assert distribution_of_rows(z[:0], 2.0).shape == (0, 5)
