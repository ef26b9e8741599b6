"""Choose sizes inside the kernels."""

import triton


def padded(dim: int) -> int:
    """Round a head size up to a power of two that matrix products take."""
    return max(16, triton.next_power_of_2(dim))
