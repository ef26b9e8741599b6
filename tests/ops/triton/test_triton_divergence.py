"""The kernel of the divergence against PyTorch in float64."""

import pytest
import torch

from hf_sparse.ops.triton.divergence import fused_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")


def exact(student, teacher):
    """The sum over tokens and the gradient of the student, float64."""
    student, teacher = student.detach().double().requires_grad_(), teacher.double()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    total = (p.exp() * (p - q)).sum()
    return total.detach(), torch.autograd.grad(total, student)[0]


@pytest.mark.cross("values")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (2, 4096), (5, 9001)])
def test_sum_and_gradient(rows, columns, dtype, poisoned_memory):
    torch.manual_seed(columns)
    student, teacher = (4 * torch.randn(rows, columns, device=DEVICE).to(dtype) for _ in range(2))
    student.requires_grad_()
    total = fused_divergence(student, teacher)
    (gradient,) = torch.autograd.grad(total, student, torch.tensor(0.5, device=DEVICE))
    expected, of_student = exact(student, teacher)
    assert total.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), 0.5 * of_student, rtol=rounding, atol=1e-6 + rounding * 1e-3)


def test_rows_apart_and_far_from_zero(poisoned_memory):
    """Rows of a larger tensor, logits whose exponentials overflow, and equal distributions."""
    torch.manual_seed(0)
    large = 1e4 + 3 * torch.randn(4, 600, device=DEVICE)
    student, teacher = large[:, :500].detach().requires_grad_(), large[:, 50:550]
    total = fused_divergence(student, teacher)
    expected, of_student = exact(student, teacher)
    torch.testing.assert_close(total.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.autograd.grad(total, student)[0].double(), of_student, rtol=1e-2, atol=1e-5)
    same = teacher.detach().requires_grad_()
    nothing = fused_divergence(same, teacher + 7)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), atol=1e-2, rtol=0)


def test_without_a_gradient_none_is_computed(poisoned_memory, monkeypatch):
    student, teacher = torch.randn(3, 40, device=DEVICE), torch.randn(3, 40, device=DEVICE)
    expected = exact(student, teacher)[0]
    monkeypatch.setattr(torch, "empty_like", None)
    torch.testing.assert_close(fused_divergence(student, teacher).double(), expected, rtol=1e-5, atol=1e-6)


def test_nan_shows(poisoned_memory):
    student, teacher = torch.randn(3, 40, device=DEVICE), torch.randn(3, 40, device=DEVICE)
    student[1, 5] = torch.nan
    assert fused_divergence(student, teacher).isnan()
