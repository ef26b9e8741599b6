"""Find the sparse attention layers that are attached to a model."""

from typing import Any, TypeVar, overload

from torch import nn

from hf_sparse.core.layer import SparseAttentionLayer

CHILD = "sparse_attention"  # the name of such a layer in its attention module

M = TypeVar("M", bound=SparseAttentionLayer)


@overload
def sparse_layers(model: nn.Module) -> list[SparseAttentionLayer]: ...
@overload
def sparse_layers(model: nn.Module, kind: type[M]) -> list[M]: ...
def sparse_layers(model: nn.Module, kind: type[SparseAttentionLayer] = SparseAttentionLayer) -> list[Any]:
    """Return the sparse attention layers of a model in order; none if it is not patched, or with another kind."""
    return [module for module in model.modules() if isinstance(module, kind)]


@overload
def sparse_layers_in_use(model: nn.Module) -> list[SparseAttentionLayer]: ...
@overload
def sparse_layers_in_use(model: nn.Module, kind: type[M]) -> list[M]: ...
def sparse_layers_in_use(model: nn.Module, kind: type[SparseAttentionLayer] = SparseAttentionLayer) -> list[Any]:
    """Return the sparse attention layers that have the adapter in use; adapters may be in different layers."""
    return [layer for layer in sparse_layers(model, kind) if layer.is_used]
