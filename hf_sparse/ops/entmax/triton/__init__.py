"""Run entmax attention in Triton kernels; import its modules only where `takes_kernels` says that they run."""

import torch
from torch import Tensor

from hf_sparse.ops.triton import DTYPES, available

WIDEST = 256  # the largest head size


def takes_kernels(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether entmax attention of these tensors runs in the kernels: on CUDA, but not with deterministic sums.

    The kernels add up the gradients of keys and values in no fixed order. They need one dtype, which autocast gives
    tensors that differ: rotary positions turn queries and keys into float32.
    """
    if query.device.type != "cuda":
        return False
    dtypes = {query.dtype, key.dtype, value.dtype}
    if torch.is_autocast_enabled("cuda") and dtypes <= set(DTYPES):
        dtypes = {torch.get_autocast_dtype("cuda")}
    fits = len(dtypes) == 1 and dtypes <= set(DTYPES) and query.shape[-1] <= WIDEST
    exact_order = torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled()
    return fits and query.numel() > 0 and not exact_order and available(query.device)
