"""The memory of a request in vLLM: a page of bytes, in which each tensor of the state has its place."""

import torch

from hf_sparse.core.request_state import StateTensor
from hf_sparse.serving.vllm.layer import _places, page_bytes


def test_each_tensor_of_a_page_begins_where_kernels_can_load_16_bytes_at_once():
    """A tensor of 8 bytes once moved the keys and values behind it off such places."""
    state = (
        StateTensor("seen", (1,), torch.int64),
        StateTensor("scores", (3, 5), torch.float32),
        StateTensor("keys", (3, 5, 8), torch.bfloat16),
    )
    places = _places(state)
    assert all(place % 16 == 0 for place in places)
    assert all(end - begin >= part.nbytes for part, begin, end in zip(state, places, places[1:], strict=False))
    assert page_bytes([state[:1], state]) == places[-1]
