"""Tensors in one piece of memory are as if each was allocated alone."""

import pytest
import torch

from hf_sparse.ops.stacked import ALIGNMENT, stacked


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
