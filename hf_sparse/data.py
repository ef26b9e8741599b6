"""Text to packed chunks of tokens."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.errors import DataError


def read_text(path: str | Path) -> str:
    """A UTF-8 text file; line ends of any kind become `\\n`, as everywhere in Python.

    Raises:
        DataError: the file is missing, empty, or not UTF-8 text.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise DataError(f"{path} holds no text")
    return text


def pack(tokenizer: Any, text: str, length: int) -> Tensor:
    """Tokenise a text whole, without special tokens, and cut it into chunks; the rest that fills none is dropped.

    Returns:
        `[N, length]` int64, N at least 1.

    Raises:
        DataError: fewer than `length` tokens.
    """
    if length < 2:
        raise DataError(f"length must be at least 2 tokens, got {length}")
    # The length of the text is the point here: no warning that it exceeds the model's.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < length:
        raise DataError(f"the text has {len(ids)} tokens, fewer than one chunk of {length}")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def select_chunks(chunks: Tensor, which: str | None) -> Tensor:
    """Chunks `START:STOP` of a text, as Python slices; all of them for `None`.

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
        raise DataError(f"chunks {which} of a text that has {len(chunks)} chunks are none")
    return chosen


def check_chunks(model: Any, chunks: Tensor) -> None:
    """See that a model can read chunks of tokens.

    Raises:
        DataError: not `[N, T]` int64, nothing in them, longer than the model's positions, or tokens of another model.
    """
    if chunks.ndim != 2 or chunks.dtype != torch.int64 or 0 in chunks.shape:
        raise DataError(f"expected chunks [N, T] of int64 tokens, got {chunks.dtype} {list(chunks.shape)}")
    length = chunks.shape[1]
    positions = getattr(model.config, "max_position_embeddings", length)
    if length > positions:
        raise DataError(f"chunks of {length} tokens are longer than the {positions} positions of the model")
    vocabulary = model.get_input_embeddings().num_embeddings
    if chunks.min() < 0 or chunks.max() >= vocabulary:
        raise DataError(
            f"tokens must be 0 to {vocabulary - 1}, got {int(chunks.min())} to {int(chunks.max())}: "
            "was the text tokenised for another model?"
        )


def fingerprint(chunks: Tensor) -> str:
    """sha256 of the tokens, so that two measurements can be told to be of the same data."""
    return hashlib.sha256(chunks.contiguous().numpy().tobytes()).hexdigest()
