"""Tell whether chunks of a text were trained on, whatever their length, beginning and place in the text.

Every window of 16 tokens has a hash. finetune.json holds the smallest hashes of the text that was trained on, which are
a random sample of its windows; the same sample of another text tells how much of it is the same.
"""

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sparse.data import IGNORED
from hf_sparse.errors import DataError

_WINDOW = 16  # tokens; hardly any two texts share so many in a row by chance
_MOST = 2**15  # hashes in finetune.json, 256 KiB there
_BYTES = 6  # bytes of a hash
_LIMIT = 2 ** (8 * _BYTES)
_AT_ONCE = 2**22  # tokens that are hashed at a time


def sketch(chunks: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
    """Sample the windows of chunks that were trained on, for finetune.json.

    Args:
        chunks: `[N, T]` int64 tokens.
        labels: `[N, T]` int64, of a masked language model: what hidden tokens were, -100 elsewhere.

    Returns:
        `window`, the tokens of a window; `hashes`, base64 of at most 32,768 ascending hashes of 6 bytes; and `below`:
        all hashes below it are there.
    """
    return _encoded([np.unique(_hashes(part).numpy()) for part in _split(_plain(chunks, labels))], _LIMIT)


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Sample what either of two sketches samples: an adapter may be trained more than once.

    Raises:
        DataError: one of them is no sketch.
    """
    (known, below), (others, limit) = _decoded(first), _decoded(second)
    return _encoded([known, others], min(below, limit))


def overlap(trained: dict[str, Any], chunks: Tensor, labels: Tensor | None = None) -> dict[str, int] | None:
    """Count the chunks that were trained on, and their tokens.

    Args:
        trained: the result of `sketch`.
        chunks, labels: as for `sketch`.

    Returns:
        `chunks`, how many have at least half of their tokens in the text that was trained on; `tokens`, about how many
        tokens of all chunks are in it. `None` where the chunks have too few tokens to tell.

    Raises:
        DataError: `trained` is no sketch.
    """
    known, below = _decoded(trained)
    count = total = common = 0
    for part in _split(_plain(chunks, labels)):
        hashes = _hashes(part).numpy()
        sampled = hashes < below
        shared = sampled & np.isin(hashes, known)
        count += int(((2 * shared.sum(1) >= sampled.sum(1)) & shared.any(1)).sum())
        total, common = total + int(sampled.sum()), common + int(shared.sum())
    return {"chunks": count, "tokens": round(chunks.numel() * common / total)} if total else None


def sentence(text: dict[str, Any]) -> str:
    """Say in words what `text` of an eval.json holds in `trained_on`; nothing for files that are older than it.

    >>> sentence({"chunks": 4, "trained_on": {"chunks": 3, "tokens": 6144}})
    '3 of the 4 chunks (about 6,144 tokens) were trained on.'
    """
    if "trained_on" not in text:
        return ""
    seen = text["trained_on"]
    if seen is None:
        return "Whether these chunks were trained on is not known."
    if not seen["tokens"]:
        return "None of it was trained on."
    were = "was" if seen["chunks"] == 1 else "were"
    return f"{seen['chunks']} of the {text['chunks']} chunks (about {seen['tokens']:,} tokens) {were} trained on."


def _plain(chunks: Tensor, labels: Tensor | None) -> Tensor:
    """Put hidden tokens back in the place of their masks."""
    return chunks if labels is None else torch.where(labels == IGNORED, chunks, labels)


def _split(chunks: Tensor) -> tuple[Tensor, ...]:
    length = chunks.shape[1]
    return chunks.split(max(1, _AT_ONCE // length)) if length >= _WINDOW else ()


def _hashes(chunks: Tensor) -> Tensor:
    """Hash the windows of each chunk, `[N, T - 15]` int64, 0 to 2^48 - 1; products wrap around."""
    windows = chunks.unfold(1, _WINDOW, 1)
    value = torch.zeros(windows.shape[:2], dtype=torch.int64)
    for column in range(_WINDOW):
        value = (value + windows[..., column] + 1) * 0x2545F4914F6CDD1D
        value ^= (value >> 32) & 0xFFFFFFFF
    return (value >> 8) & (_LIMIT - 1)


def _encoded(hashes: list[np.ndarray], below: int) -> dict[str, Any]:
    union = np.unique(np.concatenate([np.zeros(0, np.int64), *hashes]))
    union = union[union < below]
    if len(union) > _MOST:
        below, union = int(union[_MOST]), union[:_MOST]
    digits = union.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - _BYTES :]
    return {"window": _WINDOW, "below": below, "hashes": base64.b64encode(digits.tobytes()).decode("ascii")}


def _decoded(trained: dict[str, Any]) -> tuple[np.ndarray, int]:
    try:
        digits = np.frombuffer(base64.b64decode(trained["hashes"], validate=True), np.uint8).reshape(-1, _BYTES)
        below = trained["below"]
        if trained["window"] != _WINDOW or not isinstance(below, int):
            raise ValueError(f"windows of {trained['window']!r} tokens below {below!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"`trained_on` of finetune.json is not what hf-sparse writes: {error!r}") from error
    padded = np.pad(digits, ((0, 0), (8 - _BYTES, 0)))
    return np.ascontiguousarray(padded).view(">u8").astype(np.int64).reshape(-1), below
