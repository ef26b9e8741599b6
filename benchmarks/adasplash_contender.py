"""Run AdaSplash beside the kernels of entmax: the optional package `adasplash` from PyPI (0.2 has both versions).

    adasplash 1    any alpha in (1, 2], causal or not; as many KV heads as query heads
    adasplash 2    causal attention with alpha 1.5

Both take lengths that are powers of two and one scale for all heads, `1 / sqrt(D)`. So queries are multiplied by the
scales of the heads first, and keys and values are repeated for version 1. `prepared` does this, outside of what is
measured.
"""

import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor

VERSIONS = ("adasplash 1", "adasplash 2")


def installed_version() -> str | None:
    """Return the version of the package, or None where it is not installed."""
    try:
        return importlib.metadata.version("adasplash")
    except importlib.metadata.PackageNotFoundError:
        return None


def takes(name: str, alpha: float, causal: bool) -> bool:
    """Decide if a version computes such attention."""
    return name == "adasplash 1" or (causal and alpha == 1.5)


def prepared(name: str, inputs: list[Tensor], scaling: Tensor) -> list[Tensor]:
    """Return query, key and value as a version takes them; gradients pass through."""
    query, key, value = inputs
    query = (query * (scaling * query.shape[-1] ** 0.5)[:, None, None].to(torch.float32)).to(query.dtype)
    if name == "adasplash 1":
        group = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    return [query.contiguous(), key.contiguous(), value.contiguous()]


def attend(name: str, tensors: list[Tensor], alpha: float, causal: bool) -> Callable[[], Tensor]:
    """Return what computes an output from the tensors that `prepared` returned."""
    import adasplash

    if name == "adasplash 1":
        return lambda: adasplash.adasplash_v1(*tensors, alpha=alpha, is_causal=causal)
    return lambda: adasplash.adasplash_v2(*tensors)
