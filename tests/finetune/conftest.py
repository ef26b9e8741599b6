import pytest
import torch
from peft import get_peft_model

import hf_sparse


@pytest.fixture
def sparse_llama(tiny_llama):
    """Makes a tiny Llama with SparseK; the same weights each time."""

    def make(**changes):
        torch.manual_seed(1)
        return get_peft_model(tiny_llama(), hf_sparse.SparseKConfig(**{"k": 6, "window": 8, "sinks": 2, **changes}))

    return make


@pytest.fixture
def chunks():
    return torch.randint(0, 64, (12, 96), generator=torch.Generator().manual_seed(2))
