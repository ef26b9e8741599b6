"""How a method gets hold of a model's attention, through transformers' two registries and one hook.

Under the name `hf_sparse`, an attention function and a mask function are registered with transformers; importing
this changes no model. A patched model has that name as its attention implementation. In each patched attention
module, a forward pre-hook adds one keyword, `sparse_call`, which transformers carries to the attention function
together with queries, keys and values; the model's own forward stays as it is.

Both registrations are needed: without a mask function transformers drops the padding mask silently.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hf_sparse.methods.base import SparseMethod

NAME = "hf_sparse"


@dataclass
class SparseCall:
    """What the hook knows and the attention function needs."""

    method: SparseMethod
    hidden_states: Tensor
    cache: CacheLayerMixin | None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sparse_call: SparseCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function behind `hf_sparse`; returns `[B, T, Hq, D]` as transformers wants it.

    Attention dropout, if the base model has any, is not applied in patched modules.
    """
    if attention_mask is not None and attention_mask.ndim != 2:  # transformers hands a 4-D mask on without asking
        raise ValueError(
            f"sparse attention takes a padding mask [B, T], got one of shape {tuple(attention_mask.shape)}"
        )
    if sparse_call is None:
        # An attention module of a patched model that is not patched itself.
        return sdpa_attention_forward(
            module, query, key, value, _dense_mask(query, key, attention_mask), dropout, scaling, **kwargs
        )
    if kwargs.get("output_attentions"):
        raise ValueError("sparse attention has no attention matrix: output_attentions=True is not supported")
    length = query.shape[2]
    output = sparse_call.method.attend(
        query,
        key,
        value,
        hidden_states=sparse_call.hidden_states,
        valid=None if attention_mask is None else attention_mask[:, -length:],
        cache=sparse_call.cache,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return output.transpose(1, 2).contiguous(), None


def padding_mask(
    *,
    q_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function behind `hf_sparse`: the 2-D padding mask as it is, never `T x T`.

    Returns:
        `[B, Tk]` bool, or `None` where nothing is padded.
    """
    if mask_function is not causal_mask_function:
        raise ValueError(
            "sparse attention supports causal masks with padding; packed sequences (position_ids that restart), "
            "sliding windows of the base model and custom mask functions are not supported"
        )
    if attention_mask is None or (q_length > 1 and bool(attention_mask.all())):
        return None
    return attention_mask.bool()


def _dense_mask(query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor | None:
    if valid is None:
        return None if query.shape[2] in (1, key.shape[2]) else _causal(query, key)
    mask = sdpa_mask(
        batch_size=query.shape[0],
        q_length=query.shape[2],
        kv_length=key.shape[2],
        q_offset=key.shape[2] - query.shape[2],
        attention_mask=valid,
        allow_is_causal_skip=False,
        device=query.device,
    )
    return mask


def _causal(query: Tensor, key: Tensor) -> Tensor:
    rows, columns = query.shape[2], key.shape[2]
    return torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)[None, None]


def before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of a patched attention module."""
    method = module.sparse_attention
    assert isinstance(method, SparseMethod)
    if not method.is_active:
        return None
    current = module.config._attn_implementation  # type: ignore[union-attr]
    if current != NAME:
        raise ValueError(
            f"the attention implementation of a patched model was changed to {current!r}, which would ignore its "
            "sparse attention: unpatch the model, or disable the adapter, to use another one"
        )
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = kwargs.get("past_key_values")
    layer = None if cache is None else _own_layer(cache, int(module.layer_idx), method)  # type: ignore[arg-type]
    return args, {**kwargs, "sparse_call": SparseCall(method, hidden_states, layer)}


def _own_layer(cache: Any, index: int, method: SparseMethod) -> CacheLayerMixin:
    """The method's layer in the cache; put there when `generate` made an ordinary cache that is still empty."""
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise ValueError(f"sparse attention cannot use a {type(cache).__name__}; pass no cache, generate makes one")
    if cache.offloading:
        raise ValueError("sparse attention keeps its few KV slots on the device: do not ask for an offloaded cache")
    wanted: Any = method.cache_layer()
    while len(cache.layers) <= index:  # a cache that was made without a config grows as layers ask for theirs
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
        cache.layers[index] = layer = wanted
    if type(layer) is not type(wanted):
        raise ValueError(
            f"sparse attention keeps its own KV slots in place of an ordinary, empty DynamicCache; layer {index} is a "
            f"{type(layer).__name__}{' that holds dense keys' if layer.get_seq_length() else ''}. Do not set "
            "cache_implementation, and start a new cache after switching adapters on or off"
        )
    layer.announced = True
    return layer


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
