"""Give a method hold of a model's attention, through transformers' two registries and one keyword.

Under the name `hf_sparse`, an attention function and a mask function are registered with transformers; importing
this changes no model. A patched model has that name as its attention implementation. The class of each patched
attention module (`sparse_class`), or a hook, adds one keyword, `sparse_call`, which transformers carries to the
attention function together with queries, keys and values; the model's own forward stays as it is.

Both registrations are needed: without a mask function transformers drops the padding mask silently.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import EncoderDecoderCache

from hf_sparse._compat import attention_implementation, cache_given, private
from hf_sparse.core.backbone_call import BackboneCall, current_call
from hf_sparse.core.cache import ModelCall, SparseCacheLayer, is_recorded, mask_of_keys
from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.core.packed_texts import PackedTexts, packed_texts
from hf_sparse.ops.local_attention import local_attention
from hf_sparse.patches.attached import CHILD
from hf_sparse.patches.cache import is_unused, layer_in_call, make_layers, sparse_cache_layer
from hf_sparse.patches.masks import dense_mask, padding_mask, within_texts
from hf_sparse.patches.other_adapters import active_beside

NAME = "hf_sparse"

_active_collector: Any = private("transformers.utils.output_capturing", "_active_collector")
sdpa_attention_forward: Any = private("transformers.integrations.sdpa_attention", "sdpa_attention_forward")

_MOST_PRODUCTS = 1 << 33  # of a linear layer: up to so many the host sets the pace of a forward; measured on an H200

# What is known where an attention module is called and the attention function needs: the sparse attention of the
# module, its input `[B, T, C]`, its cache layer or `None`, and the call that it was checked in with all others, if any.
# A tuple is made without a call of Python, and on short texts the host sets the pace.
SparseCall = tuple[SparseAttentionLayer, Tensor, SparseCacheLayer | None, ModelCall | BackboneCall | None]


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
    """Attend as the attention function behind `hf_sparse`; returns `[B, T, Hq, D]` as transformers wants it.

    Attention dropout, if the base model has any, is not applied in patched modules.

    Packed texts, several in a row, attend each within itself. The mask then numbers them (see `padding_mask`), or
    `cu_seq_lens_q` says where each of them begins, as flash attention takes it.

    Raises:
        ValueError: a mask that says more than padding and packed texts, packed texts that cannot be told apart here, a
            keyword that would change the result and is not known.
    """
    if sparse_call is None:  # an attention module of a patched model that is not patched itself
        _refuse_a_trace()
        return _attend_densely(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    attention, hidden_states, cache, call = sparse_call
    inputs = module, query, key, value, attention_mask, scaling, sparse_call, kwargs
    if torch.compiler.is_compiling():  # where a graph breaks, it could not within `try`
        return _attend_sparsely(*inputs).transpose(1, 2).contiguous(), None
    try:
        output = None
        is_plain = attention_mask is None and not attention.dense_window and _WATCHED.isdisjoint(kwargs)
        if call is not None and is_plain:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = attention.attend_fast(query, key, value, hidden_states, cache, call, scale)
            if output is not None and cache is not None:
                _end(cache)
        if output is None:
            output = _attend_sparsely(*inputs)
    except Exception:
        if cache is not None:
            cache.cancel_attention(query.shape[2])
        raise
    return output.transpose(1, 2).contiguous(), None


def _refuse_a_trace() -> None:
    if torch.jit.is_tracing():
        raise ValueError(
            "torch.jit.trace would record the keys that one text selects, for every other text: use torch.compile or "
            "torch.export"
        )


def _end(cache: SparseCacheLayer) -> None:
    """Note that the attention of a cache layer is done, and with it the call that has made the layer."""
    cache.end_attention()
    if cache.call is not None:  # a compiled step would be compiled anew once the layer has one of its own
        cache.call = None


def _attend_densely(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attend as the base model does; see `attention_forward`."""
    texts = _packed(query, attention_mask, kwargs)
    if attention_mask is None or attention_mask.ndim == 2:
        padding = None if attention_mask is None or attention_mask.dtype != torch.bool else attention_mask
        attention_mask = dense_mask(module, query, key, padding)
    if texts is not None:
        attention_mask = within_texts(module, attention_mask, texts)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def _attend_sparsely(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    sparse_call: SparseCall,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attend by the method of a patched module, `[B, Hq, T, D]`; see `attention_forward`."""
    attention, hidden_states, cache, _ = sparse_call
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    texts = None
    if attention_mask is not None or not _WATCHED.isdisjoint(kwargs):
        texts = _packed(query, attention_mask, kwargs)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"sparse attention takes a padding mask [B, T], got a mask of shape {tuple(attention_mask.shape)}: "
                "custom masks are not supported, nor packed sequences (position_ids that restart) in a compiled "
                "forward. A compiled forward without a cache is packed to transformers, unless it gets an "
                "attention_mask"
            )
        _refuse_what_would_be_ignored(module, kwargs)
    if window := attention.dense_window:
        if attention_mask is not None or texts is not None or cache is not None:
            raise ValueError("dense attention within a window takes whole texts: no padding, packed texts or cache")
        return local_attention(query, key, value, window=window, scaling=scaling)
    if texts is not None:
        if cache is not None:
            raise ValueError("packed sequences (cu_seq_lens_q) have no cache: call the model with use_cache=False")
        return texts.attend(attention.attend, query, key, value, hidden_states=hidden_states, scaling=scaling)
    valid = None
    if cache is None:
        valid = mask_of_keys(attention_mask, key.shape[2])
    elif cache.call is None or cache.is_initialized or attention_mask is not None:  # a new one has no earlier tokens
        valid = cache.check_mask(attention_mask, query.shape[2])
    # A decoding step waits for no value from the device.
    if valid is not None and query.shape[2] > 1 and not torch.compiler.is_compiling() and bool(valid.all()):
        valid = None
    output = attention.attend(query, key, value, hidden_states=hidden_states, valid=valid, cache=cache, scaling=scaling)
    if cache is not None:
        _end(cache)
    return output


_CHANGES_THE_RESULT = {
    "softcap": "soft-capped attention logits",
    "s_aux": "learned attention sinks",
    "position_bias": "a position bias",
    "sliding_window": "a sliding window",
}
_WATCHED = frozenset((*_CHANGES_THE_RESULT, "is_causal", "cu_seq_lens_q"))


def _packed(query: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> PackedTexts | None:
    """Return the texts of packed rows, or `None` where each row is one text.

    Raises:
        ValueError: boundaries of texts that do not fit, or with padding, or in a compiled forward.
    """
    boundaries = kwargs.get("cu_seq_lens_q")
    if attention_mask is None and boundaries is None:
        return None
    shape = len(query), query.shape[2]
    flat = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    if boundaries is None:
        return None if flat is None or flat.dtype == torch.bool else packed_texts(flat, shape)
    if torch.compiler.is_compiling():
        raise ValueError("packed sequences (cu_seq_lens_q) cannot be told apart in a compiled forward")
    if flat is not None and flat.dtype == torch.bool:
        raise ValueError("packed sequences (cu_seq_lens_q) have no padding: leave the attention_mask out")
    keys = kwargs.get("cu_seq_lens_k")
    if keys is not None and keys is not boundaries and not torch.equal(keys, boundaries):
        raise ValueError(
            "packed sequences need the same boundaries for queries and keys (cu_seq_lens_q, cu_seq_lens_k)"
        )
    return packed_texts(boundaries, shape)


def _refuse_what_would_be_ignored(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse keywords of an attention function that change its result and that no sparse method knows."""
    for name, meaning in _CHANGES_THE_RESULT.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for {meaning} ({name}), which sparse attention cannot do")
    causal = kwargs.get("is_causal")
    if causal is not None and causal != getattr(module, "is_causal", True):
        raise ValueError(f"is_causal={causal} was asked of a {type(module).__name__} patched as is_causal={not causal}")


def sparse_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SparseCall | None:
    """Return what sparse attention needs to know of a call of a patched attention module.

    Args:
        module: the attention module.
        args, kwargs: what it is called with.

    Returns:
        `None` where it attends densely: no method is attached or on, or the adapter in use is another one.

    Raises:
        ValueError: a call by `torch.jit.trace`, another attention implementation, `output_attentions`, or a cache that
            cannot be gone on with.
    """
    # Not by `nn.Module.__getattr__`, which is slow.
    attention: SparseAttentionLayer | None = module._modules.get(CHILD)  # type: ignore[assignment]
    if attention is None:
        return None
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    is_compiled = torch.compiler.is_compiling()
    cache, call = cache_given(module, args, kwargs), None
    if cache is None:
        call = None if is_compiled else current_call()
        if call is not None and attention in call.ready:  # all has been checked together
            return attention, hidden_states, None, call
    elif not is_compiled:
        layer = layer_in_call(cache, module.layer_idx)  # type: ignore[arg-type]
        if layer is not None:  # likewise, where it was made
            layer.begin_attention()
            return attention, hidden_states, layer, layer.call
    if not attention.is_active:
        return None
    _refuse_a_trace()  # of the layers that a call checks together, the one that does
    name = None
    is_compiled_step = is_compiled and hidden_states.shape[1] == 1
    may_switch = not is_compiled_step and attention.is_managed is not None and attention.is_managed()
    if may_switch and not _goes_on(module, args, kwargs, hidden_states):
        name = active_beside(module, attention)
    if name:
        attention.set_adapter(name)
        return None
    _refuse_another_implementation(module.config, is_compiled)
    if _attentions_are_wanted(kwargs):
        raise ValueError("sparse attention has no attention matrix: output_attentions=True is not supported")
    if isinstance(cache, EncoderDecoderCache) and getattr(module.config, "add_cross_attention", False):
        cache = cache.self_attention_cache  # the other half belongs to cross-attention, which stays dense
    one_by_one = may_switch or is_recorded(hidden_states.device)
    if cache is None:
        if call is None or one_by_one or torch.is_grad_enabled() or not (attention.layer or _is_short(hidden_states)):
            return attention, hidden_states, None, None
        if torch.is_autocast_enabled(hidden_states.device.type):
            return attention, hidden_states, None, None
        assert attention.model_switch is not None
        others: list[Any] = [module._modules[CHILD] for module in attention.model_switch.modules()]
        length = hidden_states.shape[1]
        call.ready.update({other: other.prepare(length) for other in others if other.is_active})
        return attention, hidden_states, None, call
    index = int(module.layer_idx)  # type: ignore[arg-type]
    if not one_by_one and not attention.has_local_neighbours and is_unused(cache, index):
        forward = current_call()
        # A forward that is not known could not be told from one after an error, and the first layer checks all.
        if index or (forward is not None and _is_short(hidden_states)):
            assert attention.model_switch is not None
            make_layers(cache, attention.model_switch.modules(), forward=forward)
    layer = sparse_cache_layer(cache, index, attention)
    if layer.call is not None and (is_compiled or layer.call.forward is not current_call()):  # an error ended that call
        layer.call = None
    attention.check_cache(layer)
    layer.begin_attention()
    return attention, hidden_states, layer, layer.call


def _is_short(hidden_states: Tensor) -> bool:
    """Tell whether inputs `[B, T, C]` are so few that all layers are seen to at the first one.

    At others the GPU, which has nothing to do yet, would wait for that.
    """
    return hidden_states.numel() * hidden_states.shape[-1] <= _MOST_PRODUCTS


def before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Add what `sparse_call` returns to the keywords of an attention module, as its forward pre-hook."""
    call = sparse_call(module, args, kwargs)
    return None if call is None else (args, {**kwargs, "sparse_call": call})


def _refuse_another_implementation(config: Any, is_compiled: bool) -> None:
    current = config._attn_implementation if is_compiled else attention_implementation(config)
    if current != NAME:
        raise ValueError(
            f"the attention implementation of a patched model was changed to {current!r}, which would ignore its "
            "sparse attention: unpatch the model, or disable the adapter, to use another one"
        )


def _goes_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden_states: Tensor) -> bool:
    """Tell a decoding step, which goes on as its text began, from the first token of a text."""
    if hidden_states.shape[1] > 1:
        return False
    if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
        return True  # a recorded step follows others, and the number of tokens is on the device: reading it would fail
    cache = cache_given(module, args, kwargs)
    return cache is not None and cache.get_seq_length(int(module.layer_idx)) > 0  # type: ignore[arg-type]


def _attentions_are_wanted(kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return True
    # GPT-2 does not hand the keyword on; it would return attentions=() in silence.
    collector = None if torch.compiler.is_compiling() else _active_collector.get()
    return collector is not None and "attentions" in collector


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
