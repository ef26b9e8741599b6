"""A cache to hold across calls: several turns of a chat, or a text that comes in pieces."""

from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hf_sparse.methods.base import SparseMethod
from hf_sparse.patches.interface import own_layer


class SparseKCache(Cache):
    """An empty cache for a patched model: KV slots where a layer attends sparsely, an ordinary layer elsewhere.

    `generate` and a forward with `use_cache=True` make their own; this one is for who wants to keep it:

        cache = hf_sparse.SparseKCache(model)
        ids = model.generate(first_turn, past_key_values=cache)
        ids = model.generate(torch.cat([ids, second_turn], 1), past_key_values=cache)

    It belongs to the adapter that is active now. Rows of different lengths are padded and masked as ever. It compiles:
    on a GPU `generate` compiles the decoding steps that use it, as it does with transformers' `StaticCache`
    (`disable_compile=True` forgoes that), unless the model has layers that are not patched.

    Args:
        model: a patched model, or a `PeftModel` of one.

    Raises:
        ValueError: nothing in the model attends sparsely.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(layers=DynamicCache(config=model.config).layers)  # type: ignore[arg-type]
        found = False
        for module in model.modules():
            method = getattr(module, "sparse_attention", None)
            if isinstance(method, SparseMethod) and method.is_active:
                own_layer(self, int(module.layer_idx), method)  # type: ignore[arg-type]
                found = True
        if not found:
            raise ValueError(
                "no attention of the model is sparse now: patch it or enable its adapter, then make the cache"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        layers: Any = self.layers
        tensors = (tensor for layer in layers for tensor in (layer.keys, layer.values))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
