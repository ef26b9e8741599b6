"""Hash what a run begins with: the weights of the base model, and those of the adapter."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 1024  # of each tensor of a base model
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def adapter_sha256(methods: Sequence[Any]) -> str:
    """sha256 of the active adapter's parameters and buffers, bit for bit, NaN included."""
    digest = hashlib.sha256()
    for number, method in enumerate(methods):
        for name, tensor in adapter_tensors(method).items():
            digest.update(f"{number} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_bits(tensor).cpu().numpy().tobytes())
    return digest.hexdigest()


def adapter_tensors(method: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name that the active adapter has in one attention layer."""
    found: dict[str, Tensor] = {}
    for kind in method.adapter_layer_names:
        container = getattr(method, kind)
        if method.active in container:
            found |= {f"{kind}.{name}": tensor for name, tensor in _tensors(container[method.active])}
    return found


@torch.no_grad()
def base_sha256(model: nn.Module, methods: Sequence[nn.Module]) -> str:
    """sha256 that tells base models apart by their weights, in seconds for 8 billion of them.

    Hashed are name, dtype, shape, the sum of the bits as integers, which no order of addition changes, and 1,024
    numbers of each tensor: another value anywhere changes the sum, and an exchange of values nearly always the sample.

    Args:
        model: with the base model in it.
        methods: hold what is not the base model's.
    """
    own = {id(tensor) for method in methods for _, tensor in _tensors(method)}
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model), key=lambda named: named[0]):
        if id(tensor) in own:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.is_meta or not tensor.numel():
            continue
        bits = _bits(tensor)
        digest.update(f"{int(bits.sum(dtype=torch.int64))}\n".encode())
        digest.update(bits[:: max(1, len(bits) // _SAMPLES)].cpu().numpy().tobytes())
    return digest.hexdigest()


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ; what is not in `before` was not noted then."""
    return [key for key, value in now.items() if key in before and before[key] != value]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, `[N]`."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()])
