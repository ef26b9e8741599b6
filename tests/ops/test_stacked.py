"""Tensors in one piece of memory are as if each was allocated alone."""

import pytest
import torch

from hf_sparse.ops.stacked import ALIGNMENT, stack_of, stacked


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 7)], ids=str)
def test_each_is_contiguous_and_apart_from_the_others(shape, dtype):
    tensors = stacked(3, shape, dtype, torch.device("cpu"))
    assert [(tensor.shape, tensor.dtype) for tensor in tensors] == [(shape, dtype)] * 3
    first = tensors[0].data_ptr()
    for number, tensor in enumerate(tensors):
        assert tensor.is_contiguous() and (tensor.data_ptr() - first) % ALIGNMENT == 0
        tensor.fill_(number % 2)
    assert all(bool((tensor == number % 2).all()) for number, tensor in enumerate(tensors))


@pytest.mark.parametrize("shape", [(3,), (2, 5, 7)], ids=str)
def test_those_that_follow_each_other_are_one(shape):
    tensors = stacked(5, shape, torch.bfloat16, torch.device("cpu"))
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for some in (tensors, tensors[1:3], tensors[::2], tensors[4:], [tensor[1:] for tensor in tensors]):
        assert torch.equal(stack_of(some), torch.stack(list(some)))
    stack_of(tensors[1:3]).zero_()
    assert [bool(tensor.any()) for tensor in tensors] == [False, False, False, True, True]


def test_others_are_not_one():
    tensors = stacked(4, (3, 3), torch.float32, torch.device("cpu"))
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)  # what was there before may be NaN, which equals nothing
    a, b, c, d = tensors
    other = torch.zeros(3, 3)
    for some in ([b, a], [a, b, d], [a, other], [a, b[:2]], [a, b.t()], [a, b.view(torch.int32)]):
        assert stack_of(some) is None
    assert torch.equal(stack_of([b, d]), torch.stack([b, d])) and stack_of([a, b, c]) is not None
