"""Put the cache layers of a method into a transformers cache, and make one to hold across calls."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from hf_sparse.core.backbone_call import BackboneCall, current_call
from hf_sparse.core.cache import ModelCall
from hf_sparse.core.layer import SparseAttentionLayer


class SparseCache(Cache):
    """Make an empty cache for a patched model: a layer of the method where one attends sparsely, or an ordinary one.

    `generate` and a forward with `use_cache=True` make a cache of their own. Make one here to keep it between calls:

        cache = hf_sparse.SparseCache(model)
        ids = model.generate(first_turn, past_key_values=cache)
        ids = model.generate(torch.cat([ids, second_turn], 1), past_key_values=cache)

    (transformers 5.24 and newer call the keyword `cache`, and take the older name with a warning.)

    It belongs to the adapter that is active now. Rows of different lengths are padded and masked as ever; what was
    padding when it came stays padding. A row that ended before the others was fed pad tokens as real ones, and cannot
    be continued from here. Where all its layers are of constant size, as KV slots are, on a GPU `generate` compiles the
    decoding steps, as it does with transformers' `StaticCache` (`disable_compile=True` forgoes that).

    Args:
        model: a patched model, or a `PeftModel` of one.

    Raises:
        TypeError: no model.
        ValueError: nothing in the model attends sparsely.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(f"expected a patched model, or a PeftModel of one, got {type(model).__name__}")
        super().__init__(layers=DynamicCache(config=model.config).layers)  # type: ignore[arg-type]
        is_sparse = False
        for module in model.modules():
            attention = getattr(module, "sparse_attention", None)
            if isinstance(attention, SparseAttentionLayer) and attention.is_active:
                sparse_cache_layer(self, int(module.layer_idx), attention)  # type: ignore[arg-type]
                is_sparse = True
        if not is_sparse:
            raise ValueError(
                "no attention of the model is sparse now: patch it or enable its adapter, then make the cache"
            )

    @property
    def nbytes(self) -> int:
        """Count the bytes of all keys and values."""
        return kv_bytes(self)


SparseKCache = SparseCache  # the name that it had with the first method


def kv_bytes(cache: Any) -> int:
    """Count the bytes of all keys and values in a transformers cache."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def layer_in_call(cache: Any, index: int) -> Any:
    """Return the layer of a cache that `make_layers` made in this call of the model; `None` if it is none of those."""
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    call: ModelCall | None = getattr(layer, "call", None)
    if call is None or (call.forward is not None and call.forward is not current_call()):
        return None
    return layer


def is_unused(cache: Any, index: int) -> bool:
    """Tell whether a layer of a cache is an ordinary one that holds nothing yet, as `generate` makes it.

    One of a cache that keeps a layer at a time on the device is not: slots of all layers would be there at once.
    """
    layers: Any = cache.layers if type(cache) is DynamicCache and not cache.offloading else ()
    return index < len(layers) and type(layers[index]) is DynamicLayer and not layers[index].is_initialized


def layers_to_fill(cache: Any, attentions: Sequence[SparseAttentionLayer]) -> list[Any] | None:
    """Return those layers of an empty cache that are to hold a prompt.

    Returns:
        Those of a `SparseCache` that are as if new; none for a cache that `generate` made, which gets new ones; `None`
        for other caches, which hold something, or layers of another kind or another budget.
    """
    if type(cache) is SparseCache:
        pairs = [(layer, attention.cache_layer()) for layer, attention in zip(cache.layers, attentions, strict=True)]
        is_new = all([type(layer) is type(other) and vars(layer) == vars(other) for layer, other in pairs])
        return list(cache.layers) if is_new else None
    return [] if all([is_unused(cache, index) for index in range(len(attentions))]) else None


def is_as_new(cache: Any, layers: list[Any]) -> bool:
    """Put the layers back that an empty cache had before a forward failed; tell whether none of them holds anything."""
    if type(cache) is DynamicCache:
        cache.layers[:] = layers
    return bool(layers) and all([is_unused(cache, index) for index in range(len(layers))])


def make_layers(
    cache: Any, modules: Iterable[nn.Module], end: Tensor | None = None, forward: BackboneCall | None = None
) -> None:
    """Put the layers of sparse attention modules into a cache that `generate` or a forward has just made.

    Python does that for all in a fraction of the time that it takes where each layer is reached. The method may have
    others for the rest of the model too.

    Args:
        cache: an empty cache of transformers.
        modules: those that attend sparsely.
        end, forward: see `ModelCall`.
    """
    call = ModelCall(end=end, forward=forward)
    sparse: Any = None  # attention of one of them
    for module in modules:
        attention: Any = module._modules["sparse_attention"]  # not by `nn.Module.__getattr__`, which is slow
        index: Any = module.layer_idx
        if attention.is_active and is_unused(cache, index):
            cache.layers[index] = attention.cache_layer_in_call(call)
            sparse = attention
    for index, layer in enumerate(cache.layers):
        if sparse is not None and type(layer) is DynamicLayer:
            cache.layers[index] = sparse.dense_cache_layer(layer)


def sparse_cache_layer(cache: Any, index: int, attention: SparseAttentionLayer) -> Any:
    """Return the method's layer in a cache; put it there if `generate` made an ordinary cache that is still empty.

    Args:
        cache: a cache of transformers.
        index: index of the layer in the cache.
        attention: the sparse attention that fills it.

    Raises:
        ValueError: a cache that has no place for the layer, or one that holds dense keys already.
    """
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise ValueError(f"sparse attention cannot use a {type(cache).__name__}; pass no cache, generate makes one")
    while len(cache.layers) <= index:  # a cache that was made without a config grows as layers ask for theirs
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if type(layer) in (DynamicLayer, StaticLayer) and layer.get_seq_length() == 0:
        is_static = type(layer) is StaticLayer
        new: Any = attention.static_cache_layer(layer.max_cache_len) if is_static else attention.cache_layer()
        if attention.has_local_neighbours and not any(cache.is_sliding):
            new.share_mask_sizes()  # a cache that knows no local layers may take the size of their mask from this one
        cache.layers[index] = layer = new
    if not attention.has_made(layer):
        of_a_switch = type(layer) in (DynamicLayer, StaticLayer) or hasattr(layer, "begin_attention")
        advice = (
            "start a new cache after switching adapters on or off" if of_a_switch else "generate without this cache"
        )
        raise ValueError(
            "sparse attention keeps a cache layer of its own in place of that of an ordinary, empty cache; "
            f"layer {index} is a {type(layer).__name__}{' that holds dense keys' if layer.get_seq_length() else ''}: "
            f"{advice}"
        )
    return layer
