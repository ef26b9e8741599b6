"""Choose the sizes of the programs of the attention kernels; `benchmarks/sizes.py` searches for them."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse.ops.triton.sizes import padded


class ProgramSizes(NamedTuple):
    """Hold the sizes of a program: rows, keys at a time, Triton's warps and stages, most registers of a thread.

    With 128 registers 16 warps share a multiprocessor; some values are then kept in memory, which costs less."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def forward_sizes(query: Tensor, soft: bool, causal: bool) -> ProgramSizes:
    """Choose the sizes of the forward for a dtype, a head size, the kind of gates and the order."""
    dim = padded(query.shape[-1])
    if query.dtype == torch.float32:
        return ProgramSizes(64, 32, 4, 2) if dim <= 128 else ProgramSizes(64, 32, 8, 1)
    if dim > 128:
        return ProgramSizes(128, 32, 8, 2)
    if dim > 64:
        return ProgramSizes(128, 32, 4, 3) if soft else ProgramSizes(128, 32, 8, 3, 128)
    if not causal:
        return ProgramSizes(64, 32, 4, 3, 128)
    return ProgramSizes(64, 32, 4, 2, 128) if soft else ProgramSizes(64, 64, 4, 2, 128)


def by_query_sizes(query: Tensor, wanted: bool, soft: bool) -> ProgramSizes:
    """Choose the sizes of a program that owns rows of queries, with the gradient of the query or without."""
    dim = padded(query.shape[-1])
    if query.dtype == torch.float32:  # with 64 rows of 256 a program would need 320 KB of shared memory
        return ProgramSizes(64, 32, 4, 1) if dim <= 128 else ProgramSizes(32, 32, 8, 1)
    if dim > 128:
        return ProgramSizes(64, 32, 8, 2)
    if dim > 64:
        if soft and wanted:
            return ProgramSizes(128, 64, 8, 3)
        return ProgramSizes(128, 32, 8, 3, 128) if wanted else ProgramSizes(128, 32, 8, 2, 128)
    return ProgramSizes(64, 32, 4, 3, 128)


def by_key_sizes(query: Tensor, group: int) -> ProgramSizes:
    """Choose the sizes of a program that owns keys; `group` query heads share a KV head.

    A third stage pays where a block of rows is a few whole queries, whose addresses take no registers."""
    dim = padded(query.shape[-1])
    if query.dtype == torch.float32:
        return ProgramSizes(32, 32, 4, 1) if dim <= 128 else ProgramSizes(32, 32, 8, 1)
    if dim > 128:
        return ProgramSizes(32, 64, 8, 2)
    if dim > 64:
        return ProgramSizes(32, 64, 4, 3)
    return ProgramSizes(64, 64, 4, 3 if group >= 4 and 64 % group == 0 else 2)
