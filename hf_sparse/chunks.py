"""Cut a text into the chunks that a model with an adapter learns from and is measured on."""

from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from torch import Tensor

from hf_sparse.core.registry import method_of
from hf_sparse.data import context_length, mask_tokens, pack, pack_documents, select_chunks
from hf_sparse.errors import DataError
from hf_sparse.model_kinds import kind_of
from hf_sparse.patches import sparse_layers


def prepared_chunks(
    model: PeftModel,
    tokenizer: Any,
    text: str,
    length: int | None,
    chunks: str | None,
    *,
    bos: bool | None = None,
    limit: int | None = None,
    stride: int | None = None,
    **masking: Any,
) -> Any:
    """Pack a text as the model learns and is measured on it, with hidden tokens for a masked language model.

    Where no `chunks` are named, at most `limit` are taken, at equal distances.

    Raises:
        DataError: a text that cannot be packed, or `bos` for an encoder.
    """
    packed = packed_chunks(model, tokenizer, text, length, bos=bos, stride=stride)
    packed = select_chunks(packed, chunks)
    if chunks is None and limit is not None and len(packed) > limit:
        packed = packed[[i * len(packed) // limit for i in range(limit)]]
    return mask_tokens(tokenizer, packed, **masking) if kind_of(model) == "masked" else packed


def prepared_documents(
    model: PeftModel,
    tokenizer: Any,
    documents: Iterable[str],
    length: int | None,
    *,
    most: int,
    separate: bool,
    bos: bool | None = None,
    **masking: Any,
) -> tuple[Any, dict[str, int]]:
    """Pack documents until there are enough chunks, as `prepared_chunks` packs a text; return counts beside.

    Raises:
        DataError: documents that fill no chunk, or `bos` for an encoder.
    """
    encoder = _is_encoder(model, bos)
    options: dict[str, Any] = {"most": most, "separate": separate, "special_tokens": encoder, "bos": bos}
    packed, counts = pack_documents(tokenizer, documents, tokens_per_chunk(model, length), **options)
    return (mask_tokens(tokenizer, packed, **masking) if kind_of(model) == "masked" else packed), counts


def packed_chunks(
    model: PeftModel, tokenizer: Any, text: str, length: int | None, *, bos: bool | None, stride: int | None = None
) -> Tensor:
    """Cut a text into chunks `[N, T]` that begin, and for an encoder end, as the model knows texts.

    Raises:
        DataError: a text that cannot be packed, or `bos` for an encoder.
    """
    encoder = _is_encoder(model, bos)
    return pack(tokenizer, text, tokens_per_chunk(model, length), special_tokens=encoder, stride=stride, bos=bos)


def _is_encoder(model: PeftModel, bos: bool | None) -> bool:
    """Tell whether chunks have an encoder's special tokens; an encoder has no `bos`, which is a `DataError`."""
    encoder = not sparse_layers(model)[0].causal
    if encoder and bos is not None:
        raise DataError("an encoder's chunks begin and end with its special tokens: bos is for decoders")
    return encoder


def tokens_per_chunk(model: PeftModel, length: int | None) -> int:
    """Return the length that was asked for; by default that of the method, as far as the positions suffice."""
    if length is not None:
        return length
    config = model.active_peft_config
    default: int = method_of(config).evaluation().length(config)
    return min(default, context_length(model) or default)
