"""Make packed chunks of tokens from text."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.errors import DataError
from hf_sparse.model_kinds import kind_of
from hf_sparse.texts import BYTE_ORDER_MARK
from hf_sparse.texts import read_text as read_text

IGNORED = -100  # the label of a token that is not to be predicted, as everywhere in transformers
_MASKED_SHARE = 0.15
_PROBE = 64  # characters of a text that show how a tokenizer begins one


def bos_tokens(tokenizer: Any, text: str, bos: bool | None = None) -> list[int]:
    """Return the tokens with which a tokenizer begins a text: that of its BOS token, or none.

    Many decoders (Llama, Gemma, Mistral) were trained on texts that begin with BOS, and are lost without it. The
    tokenizer is asked, for only it knows. Tokens that it appends are left out, for they say that the text ends.

    Args:
        tokenizer: tokenizer of a decoder. An encoder's `cls_token` is no beginning, see `special_tokens` of `pack`.
        text: the text that is begun.
        bos: whether to begin with BOS; `None` is as the tokenizer does.

    Raises:
        DataError: `bos` is true and the tokenizer has no BOS token, it begins a text with several tokens, or what it
            makes of a text does not tell how it begins.
    """
    if bos is False:
        return []
    probe = text.removeprefix(BYTE_ORDER_MARK).lstrip()[:_PROBE]
    whole, plain = ((tokenizer(probe, add_special_tokens=add, verbose=False))["input_ids"] for add in (True, False))
    starts = range(len(whole) - len(plain) + 1)
    start = next((index for index in starts if whole[index : index + len(plain)] == plain), None)
    if start is None:
        raise DataError("the tokenizer does not tell how it begins a text: expected bos=True or bos=False")
    first = whole[:start]
    if first and tokenizer.cls_token_id == first[0]:
        first = []
    if len(first) > 1:
        raise DataError(
            f"expected a tokenizer that begins a text with one token at most, got {len(first)}: pass bos=False"
        )
    if bos and not first:
        if tokenizer.bos_token_id is None:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no BOS token to begin a text "
                "with: pass bos=None or bos=False"
            )
        first = [tokenizer.bos_token_id]
    return first


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a text that a decoder goes on with: begun as the tokenizer begins it, and not ended as it may end it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return bos_tokens(tokenizer, text) + ids


def pack(
    tokenizer: Any,
    text: str,
    length: int,
    *,
    special_tokens: bool = False,
    stride: int | None = None,
    bos: bool | None = None,
) -> Tensor:
    """Tokenise a text whole and cut it into chunks; the rest that fills none is dropped.

    Every chunk begins as the tokenizer begins a text: with its BOS token, where it adds one.

    Args:
        special_tokens: begin every chunk with the tokenizer's `cls_token` and end it with its `sep_token`, as encoders
            know them; a tokenizer that has none adds none.
        stride: tokens of the text from the start of one chunk to that of the next, 1 to `length` less the tokens that
            are added to each; by default chunks do not overlap.
        bos: whether chunks begin with BOS, see `bos_tokens`; by default as the tokenizer does. Not beside
            `special_tokens`.

    Returns:
        `[N, length]` int64, N at least 1.

    Raises:
        DataError: no string, fewer than `length` tokens, a stride out of range, or a BOS token that the tokenizer does
            not have.
        ValueError: `bos` beside `special_tokens`.
    """
    if not isinstance(text, str):
        raise DataError(f"expected one text, got {type(text).__name__}: join several, with '\\n\\n'.join(texts)")
    text = text.removeprefix(BYTE_ORDER_MARK)
    first, last, size = _ends(tokenizer, text, length, special_tokens, bos)
    stride = size if stride is None else stride
    if not 1 <= stride <= size:
        raise DataError(f"stride must be 1 to {size} tokens, got {stride}")
    # The length of the text is the point here: no warning that it exceeds the model's.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < size:
        raise DataError(
            f"the text has {len(ids)} tokens, fewer than one chunk of {size}: give a longer text, or a length below "
            f"{length} (`--length` of the command line)"
        )
    chunks = torch.tensor(ids).unfold(0, size, stride)
    ends = [None if token is None else chunks.new_full((len(chunks), 1), token) for token in (first, last)]
    return torch.cat([part for part in (ends[0], chunks, ends[1]) if part is not None], 1)


def _ends(
    tokenizer: Any, text: str, length: int, special_tokens: bool, bos: bool | None
) -> tuple[int | None, int | None, int]:
    """Return the token that a chunk begins with, the one that it ends with, and how many tokens of text lie between."""
    first, last = (tokenizer.cls_token_id, tokenizer.sep_token_id) if special_tokens else (None, None)
    if special_tokens and bos is not None and first is not None:
        raise ValueError(f"bos is for decoders: with special_tokens every chunk begins with the cls_token, got {bos}")
    if first is None:
        first = next(iter(bos_tokens(tokenizer, text, bos)), None)
    size = length - (first is not None) - (last is not None)
    if size < 2:
        raise DataError(f"length must be at least {2 + length - size} tokens, got {length}")
    return first, last, size


def pack_documents(
    tokenizer: Any,
    documents: Iterable[str],
    length: int,
    *,
    most: int,
    separate: bool,
    special_tokens: bool = False,
    bos: bool | None = None,
) -> tuple[Tensor, dict[str, int]]:
    """Cut documents into chunks until there are enough, and read no more of them than that takes.

    Args:
        tokenizer, length, special_tokens, bos: see `pack`.
        documents: texts, in the order in which they are read.
        most: chunks, at most.
        separate: whether a chunk holds tokens of one document only; the rest of a document that fills none is left out.
            Otherwise documents follow one another with an empty line between.

    Returns:
        `[N, length]` int64, and counts: `documents` that were read, those that were `too_short` for a chunk of their
        own, and `tokens_left_out`.

    Raises:
        DataError: the documents fill no chunk.
    """
    chunks: list[Tensor] = []
    counts = {"documents": 0, "too_short": 0, "tokens_left_out": 0}
    rest: list[int] = []
    size, first, last = length, None, None
    for document in documents:
        if not counts["documents"]:
            first, last, size = _ends(tokenizer, document, length, special_tokens, bos)
        counts["documents"] += 1
        text = document if separate else f"{document}\n\n"
        rest += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        counts["too_short"] += separate and len(rest) < size
        while len(rest) >= size and len(chunks) < most:
            ends = [[] if token is None else [token] for token in (first, last)]
            chunks.append(torch.tensor(ends[0] + rest[:size] + ends[1]))
            del rest[:size]
        if separate:
            counts["tokens_left_out"] += len(rest)
            rest = []
        if len(chunks) == most:
            break
    counts["tokens_left_out"] += len(rest)
    if not chunks:
        raise DataError(f"{counts['documents']} documents fill no chunk of {length} tokens")
    return torch.stack(chunks), counts


def mask_tokens(tokenizer: Any, chunks: Tensor, *, seed: int = 0, corrupt: bool = False) -> dict[str, Tensor]:
    """Hide 15 % of the tokens of each chunk, for a masked language model to find again.

    Which ones follows from the seed and the number of the chunk alone; special tokens are never among them.

    Args:
        tokenizer: has a `mask_token`.
        chunks: `[N, T]` int64.
        seed: another one hides others.
        corrupt: of the hidden tokens, 10 % become any other token and 10 % stay, as in BERT's training (Devlin et al.
            2018). Otherwise all become the mask.

    Returns:
        `input_ids` `[N, T]` with hidden tokens, and `labels` `[N, T]`: what they were, and -100 elsewhere.

    Raises:
        DataError: a tokenizer without a mask token, or a chunk of nothing but special tokens.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            f"the tokenizer has no mask token, which a masked language model needs: {tokenizer.name_or_path}"
        )
    ordinary = ~torch.isin(chunks, torch.tensor(tokenizer.all_special_ids))
    if not ordinary.any(1).all():
        raise DataError(f"chunk {int(ordinary.any(1).int().argmin())} holds nothing but special tokens")
    inputs, labels = chunks.clone(), torch.full_like(chunks, IGNORED)
    for number, candidates in enumerate(ordinary):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        places = candidates.nonzero().squeeze(1)
        count = max(1, round(_MASKED_SHARE * len(places)))
        hidden = places[torch.randperm(len(places), generator=generator)[:count]]
        labels[number, hidden] = chunks[number, hidden]
        inputs[number, hidden] = tokenizer.mask_token_id
        if corrupt:
            fate = torch.rand(count, generator=generator)
            other = torch.randint(len(tokenizer), (count,), generator=generator)
            inputs[number, hidden[fate < 0.2]] = other[fate < 0.2]
            inputs[number, hidden[fate < 0.1]] = chunks[number, hidden[fate < 0.1]]
    return {"input_ids": inputs, "labels": labels}


def tensors(model: nn.Module, dataset: Any) -> tuple[Tensor, Tensor | None]:
    """Return tokens `[N, T]`, and labels `[N, T]` for a masked language model, of anything that holds them.

    Args:
        dataset: chunks, or a mapping or `datasets.Dataset` with `input_ids` (and `labels`) of equal lengths.

    Raises:
        DataError: it does not hold them, or says that tokens do not count, which is not supported.
    """
    masked = kind_of(model) == "masked"
    if isinstance(dataset, Tensor):
        if masked:
            raise DataError(
                "a masked language model needs chunks with hidden tokens and their labels: "
                "hf_sparse.data.mask_tokens(tokenizer, chunks) makes them"
            )
        return dataset, None
    tokens = _column(dataset, "input_ids")
    if _has(dataset, "attention_mask") and not _column(dataset, "attention_mask").all():
        raise DataError("the chunks hold padding (attention_mask has zeros): pack the text, see hf_sparse.data.pack")
    if _has(dataset, "position_ids") and (_column(dataset, "position_ids").diff(dim=1) != 1).any():
        raise DataError(
            "the chunks hold several texts each (position_ids that restart), which finetune would read as one: leave "
            "position_ids out to allow that, or train with transformers' Trainer, which keeps them apart"
        )
    if not masked and _has(dataset, "labels") and not torch.equal(_column(dataset, "labels"), tokens):
        raise DataError("labels other than the tokens themselves are not supported: every token is predicted")
    labels = _column(dataset, "labels") if masked else None
    if labels is not None and labels.shape != tokens.shape:
        raise DataError(f"labels must have the shape of the tokens, {list(tokens.shape)}, got {list(labels.shape)}")
    return tokens, labels


def _has(dataset: Any, name: str) -> bool:
    """Tell whether a dataset or a mapping has a column."""
    columns = getattr(dataset, "column_names", None)
    return name in (dataset if columns is None and isinstance(dataset, Mapping) else columns or ())


def _column(dataset: Any, name: str) -> Tensor:
    """Return a column of a dataset as a tensor; `DataError` if it has none, or rows of several lengths."""
    try:
        rows = dataset[name]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"expected chunks [N, T] or a dataset with `{name}`, got {type(dataset).__name__}") from error
    if isinstance(rows, Tensor):
        return rows
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise DataError(
            f"all chunks must have one length (pack the dataset first), got {min(lengths)} to {max(lengths)}"
        )
    return torch.tensor([list(row) for row in rows])


def first_token(model: Any, chunks: Tensor) -> int | None:
    """Return the token with which all chunks `[N, T]` begin, such as BOS, or `None` where they have none in common.

    A single chunk shows nothing, unless it begins with the BOS token of the model's configuration.
    """
    first = int(chunks[0, 0])
    common = len(chunks) > 1 and bool((chunks[:, 0] == first).all())
    return first if common or first == getattr(model.config.get_text_config(), "bos_token_id", None) else None


def select_chunks(chunks: Tensor, which: str | None) -> Tensor:
    """Return chunks `START:STOP` of a text, as Python slices; all of them for `None`.

    Raises:
        DataError: not a slice, or one that is empty.
    """
    if which is None:
        return chunks
    try:
        start, stop = (int(part) if part else None for part in which.split(":"))
    except ValueError:
        raise DataError(f"chunks must be START:STOP, got {which!r}") from None
    chosen = chunks[start:stop]
    if len(chosen) == 0:
        raise DataError(f"expected some of the {len(chunks)} chunks of the text, got {which}: none")
    return chosen


def context_length(model: Any) -> int | None:
    """Return how many tokens the model's positions suffice for, `None` if its configuration sets no limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its relatives count from the one after padding's, which the configuration does not say.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - module.padding_idx - 1
    return positions


def check_chunks(model: Any, chunks: Tensor, labels: Tensor | None = None) -> None:
    """Check that a model can read chunks of tokens.

    Raises:
        DataError: not `[N, T]` int64, nothing in them, longer than the model's positions, tokens of another model, or
            a chunk in which no token is to be predicted.
    """
    if chunks.ndim != 2 or chunks.dtype != torch.int64 or 0 in chunks.shape:
        raise DataError(f"expected chunks [N, T] of int64 tokens, got {chunks.dtype} {list(chunks.shape)}")
    length, positions = chunks.shape[1], context_length(model)
    if positions is not None and length > positions:
        raise DataError(f"chunks of {length} tokens are longer than the {positions} positions of the model")
    vocabulary = model.get_input_embeddings().num_embeddings
    targets = None if labels is None else labels[labels != IGNORED]
    for tokens in (chunks, targets):
        if tokens is not None and len(tokens) and (tokens.min() < 0 or tokens.max() >= vocabulary):
            raise DataError(
                f"tokens must be 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}: "
                "was the text tokenised for another model?"
            )
    if labels is not None and not (labels != IGNORED).any(1).all():
        raise DataError("every chunk needs a token to be predicted, and one has nothing but labels of -100")


def fingerprint(*chunks: Tensor | None) -> str:
    """Return the sha256 of tokens and labels: equal for measurements on the same data."""
    digest = hashlib.sha256()
    for tensor in chunks:
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
