"""How a method's layers get into a transformers cache, and a cache to hold across calls, such as turns of a chat."""

from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from hf_sparse.core.layer import SparseAttentionLayer


class SparseKCache(Cache):
    """An empty cache for a patched model: the method's layer where one attends sparsely, an ordinary one elsewhere.

    `generate` and a forward with `use_cache=True` make their own; this one is for who wants to keep it:

        cache = hf_sparse.SparseKCache(model)
        ids = model.generate(first_turn, past_key_values=cache)
        ids = model.generate(torch.cat([ids, second_turn], 1), past_key_values=cache)

    (transformers 5.24 and newer call the keyword `cache`, and take the older name with a warning.)

    It belongs to the adapter that is active now. Rows of different lengths are padded and masked as ever; what was
    padding when it came stays padding. A row that ended before the others was fed pad tokens as real ones, and cannot
    be continued from here. KV slots, which SparseK has, compile: on a GPU `generate` compiles the decoding steps that
    use them, as it does with transformers' `StaticCache` (`disable_compile=True` forgoes that), unless the model has
    layers that are not patched.

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
            if isinstance(method, SparseAttentionLayer) and method.is_active:
                own_layer(self, int(module.layer_idx), method)  # type: ignore[arg-type]
                found = True
        if not found:
            raise ValueError(
                "no attention of the model is sparse now: patch it or enable its adapter, then make the cache"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return kv_bytes(self)


def kv_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a transformers cache."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def own_layer(cache: Any, index: int, method: SparseAttentionLayer) -> Any:
    """The method's layer in the cache; put there when `generate` made an ordinary cache that is still empty.

    Raises:
        ValueError: a cache that has no place for the layer, or one that holds dense keys already.
    """
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise ValueError(f"sparse attention cannot use a {type(cache).__name__}; pass no cache, generate makes one")
    while len(cache.layers) <= index:  # a cache that was made without a config grows as layers ask for theirs
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if type(layer) in (DynamicLayer, StaticLayer) and layer.get_seq_length() == 0:
        own: Any = method.cache_layer()
        if type(layer) is StaticLayer and not method.has_slots:
            raise ValueError(
                f"{method.label} keeps every key in a cache that grows, which a static cache does not: use the "
                "ordinary cache"
            )
        if type(layer) is StaticLayer and not own.only_sparse:
            raise ValueError(
                "a static cache needs every full-attention layer patched, and the adapter names some only (`layers`): "
                "use the ordinary cache"
            )
        if method.has_slots and method.beside_local and not any(cache.is_sliding):
            own.only_sparse = False  # in a cache that knows no local layers, this one may tell the size of their mask
        cache.layers[index] = layer = own
    if not isinstance(layer, method.cache_layer_type):
        raise ValueError(
            "sparse attention keeps a cache layer of its own in place of that of an ordinary, empty cache; "
            f"layer {index} is a {type(layer).__name__}{' that holds dense keys' if layer.get_seq_length() else ''}: "
            "start a new cache after switching adapters on or off"
        )
    return layer
