"""The divergence of plain PyTorch against its formula, and its gradient against differences."""

import torch

from hf_sparse.ops.divergence import divergence


def test_it_is_the_sum_of_the_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(divergence(student, teacher), (p * (p / q).log()).sum())
    torch.testing.assert_close(divergence(teacher, teacher), torch.zeros((), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: divergence(x, teacher), student.requires_grad_())


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 900).bfloat16(), torch.randn(5, 900).bfloat16()
    found = divergence(student.requires_grad_(), teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), divergence(student.double(), teacher.double()), rtol=1e-5, atol=0)


def test_the_teacher_gets_no_gradient():
    teacher = torch.randn(2, 3, requires_grad=True)
    divergence(torch.randn(2, 3, requires_grad=True), teacher).backward()
    assert teacher.grad is None
