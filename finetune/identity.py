"""Hash what a run begins with: the weights of the base model, and those of the adapter."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.finetune.sharding import full

_SAMPLES = 1024  # of each tensor of a base model
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def adapter_sha256(layers: Sequence[SparseAttentionLayer]) -> str:
    """Hash the parameters and buffers of the active adapter with sha256, bit for bit, NaN included."""
    digest = hashlib.sha256()
    for number, layer in enumerate(layers):
        for name, tensor in adapter_tensors(layer).items():
            digest.update(f"{number} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_bits(tensor).cpu().numpy().tobytes())
    return digest.hexdigest()


def adapter_tensors(layer: SparseAttentionLayer) -> dict[str, Tensor]:
    """Return the parameters and buffers by name that the active adapter has in one attention layer."""
    tensors: dict[str, Tensor] = {}
    for kind in layer.adapter_layer_names:
        container = getattr(layer, kind)
        if layer.active in container:
            tensors |= {f"{kind}.{name}": tensor for name, tensor in _tensors(container[layer.active])}
    return tensors


@torch.no_grad()
def base_sha256(model: nn.Module, layers: Sequence[nn.Module]) -> str:
    """Hash the weights of a base model with sha256, so that others differ; takes seconds for 8 billion of them.

    Hashed are name, dtype, shape, the sum of the bits as integers, which no order of addition changes, and 1,024
    numbers of each tensor: another value anywhere changes the sum, and an exchange of values nearly always the sample.

    Args:
        model: with the base model in it.
        layers: sparse attention layers, whose tensors are not the base model's.
    """
    of_adapter = {id(tensor) for layer in layers for _, tensor in _tensors(layer)}
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model), key=lambda named: named[0]):
        if id(tensor) in of_adapter:
            continue
        tensor = full(tensor)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.is_meta or not tensor.numel():
            continue
        bits = _bits(tensor)
        digest.update(f"{int(bits.sum(dtype=torch.int64))}\n".encode())
        digest.update(bits[:: max(1, len(bits) // _SAMPLES)].cpu().numpy().tobytes())
    return digest.hexdigest()


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the keys whose values differ; what is not in `before` was not noted then."""
    return [key for key, value in now.items() if key in before and before[key] != value]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module with their names."""
    return chain(module.named_parameters(), module.named_buffers())


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, `[N]`."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()])
