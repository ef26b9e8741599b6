"""Make the masks of a patched model: padding as it is for sparse attention, and what dense modules need of it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse._compat import private, texts_in_mask
from hf_sparse.core.packed_texts import PackedTexts

bidirectional_mask_function: Any = private("transformers.masking_utils", "bidirectional_mask_function")
causal_mask_function: Any = private("transformers.masking_utils", "causal_mask_function")
sdpa_mask: Any = private("transformers.masking_utils", "sdpa_mask")


def padding_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the 2-D padding mask as it is, never `T x T`: the mask function behind `hf_sparse`.

    A mask that says more than padding, causality and packed texts (a sliding window) is for modules that are not
    patched: those get transformers' own, and a patched module refuses it.

    Returns:
        `[B, Tk]` bool, or `None` where nothing is padded; `[B, T]` int64 that numbers the texts of packed rows;
        `[B, 1, Tq, Tk]` bool for every other mask function.

    Raises:
        ValueError: a mask that has one dimension, or three.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        texts = None if attention_mask is not None or torch.compiler.is_compiling() else texts_in_mask(mask_function)
        if texts is not None:
            return texts
        settings = {**kwargs, "allow_is_causal_skip": False}  # no mask would read as a plain causal one
        return sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **settings,
        )
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"sparse attention takes a padding mask [B, T], got one of shape {tuple(attention_mask.shape)}"
        )
    if q_length == 1:
        # A decoding step. The mask grows, but the cache may have asked for its newest column only (`get_mask_sizes`),
        # and a step of constant shape and strides can be compiled. Columns that a cache of fixed size has beyond the
        # mask are the future. Nothing here waits for the device; on the CPU there is nothing to wait for, and a newest
        # column that says nothing is left out. A longer mask stays, so that no step of a cache of fixed size lacks it.
        columns = attention_mask[:, -kv_length:].bool()
        if columns.shape[1] < kv_length:
            return F.pad(columns, (0, kv_length - columns.shape[1]))
        is_readable = columns.device.type == "cpu" and not torch.compiler.is_compiling()
        if kv_length == 1 and is_readable and bool(columns.all()):
            return None
        return columns.clone(memory_format=torch.contiguous_format)
    if attention_mask.shape[1] == q_length and not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def dense_mask(module: nn.Module, query: Tensor, key: Tensor, valid: Tensor | None) -> Tensor | None:
    """Return the mask a dense module needs beyond `is_causal`; `valid` is the padding mask of its keys, `[B, Tk]`."""
    rows, columns = query.shape[2], key.shape[2]
    if rows == 1 or not getattr(module, "is_causal", True):  # keys behind the query of a step are padding to the mask
        return None if valid is None else valid[:, None, None, :]
    if valid is None and rows == columns:
        return None
    return sdpa_mask(
        batch_size=query.shape[0],
        q_length=rows,
        kv_length=columns,
        q_offset=columns - rows,
        attention_mask=valid,
        allow_is_causal_skip=False,
        device=query.device,
    )


def within_texts(module: nn.Module, mask: Tensor | None, texts: PackedTexts) -> Tensor:
    """Return the mask `[B, 1, T, T]` of a dense module, without the pairs of tokens of different texts."""
    same = texts.numbers[:, None, :, None] == texts.numbers[:, None, None, :]
    if mask is not None:
        return mask & same
    return same.tril() if getattr(module, "is_causal", True) else same
