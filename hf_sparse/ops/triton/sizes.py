"""Compute sizes for the kernels on the host, without Triton's own functions, each call of which takes microseconds."""


def padded(dim: int) -> int:
    """Round a head size, or a number of rows, up to a power of two that matrix products take."""
    return max(16, 1 << (dim - 1).bit_length())


def pieces(length: int, size: int) -> int:
    """Count the pieces of a size that a length is cut into, the last of which may be shorter."""
    return -(-length // size)
