"""Read texts: files, and columns of datasets."""

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from hf_sparse.access_tokens import redact
from hf_sparse.errors import DataError

_BUFFER = 1000  # rows among which a stream draws the next one

BYTE_ORDER_MARK = "\ufeff"  # some editors begin a file with it


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Line ends of any kind become `\\n`, as everywhere in Python. A byte order mark at the head is no text.

    Raises:
        DataError: the file is missing, empty, or not UTF-8 text.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8").removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise DataError(f"{path} holds no text")
    return text


def read_texts(paths: Sequence[str | Path]) -> tuple[str, str]:
    """Join text files by an empty line; return the text and the names of the files.

    Raises:
        DataError: a file that is missing, empty or not UTF-8 text.
    """
    return "\n\n".join(read_text(path) for path in paths), ", ".join(Path(path).name for path in paths)


def hub_dataset(name: str, config: str | None, split: str, column: str) -> dict[str, str] | None:
    """Describe a part of a dataset on the Hub for a record of training; `None` for a file or a folder.

    A path of this machine would mean nothing elsewhere.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    if Path(name).exists():
        return None
    return {"name": name, **({"config": config} if config else {}), "split": split, "column": column}


class Documents:
    """Read the texts in one column of a dataset, row by row as they are needed; rows without text are counted.

    All processes that were launched together get the same rows in the same order.

    Args:
        name, config, split, column: see `read_dataset`.
        seed: of the order of the rows, which are shuffled in a buffer of `_BUFFER`.

    Attributes:
        rows: how many were read so far.
        bad: how many of these held no text.

    Raises:
        DataError: no such dataset or split.
    """

    def __init__(self, name: str, config: str | None, split: str, column: str, seed: int) -> None:
        self._name, self._column = name, column
        self._stream = _load(name, config, split, streaming=True).shuffle(seed=seed, buffer_size=_BUFFER)
        self.rows = self.bad = 0

    def __iter__(self) -> Iterator[str]:
        """Yield the texts.

        Raises:
            DataError: no row holds text in the column, or the dataset cannot be read.
        """
        rows = iter(self._stream)
        while True:
            with _readable(self._name):
                row = next(rows, None)
            if row is None:
                break
            self.rows += 1
            text = row.get(self._column)
            if isinstance(text, str) and text.strip():
                yield text.removeprefix(BYTE_ORDER_MARK)
            else:
                self.bad += 1
        if self.rows == self.bad:
            raise DataError(f"column {self._column!r} of the dataset {self._name!r} holds no text in {self.rows} rows")


def read_dataset(name: str, config: str | None = None, split: str = "train", column: str = "text") -> str:
    """Join the rows of one column of a dataset by an empty line.

    Args:
        name: id on the Hub, a folder, or a file (.jsonl, .csv, .parquet, ...), for `datasets.load_dataset`.
        config: configuration of the dataset, if it has several.
        split: which part; a slice such as `"train[:1%]"` reads less.
        column: holds the text.

    Raises:
        DataError: no such dataset, split or column of text.
    """
    rows = _load(name, config, split, streaming=False)
    if column not in rows.column_names:
        raise DataError(f"the dataset {name!r} has no column {column!r}, it has {', '.join(rows.column_names)}")
    texts = [row.removeprefix(BYTE_ORDER_MARK) if isinstance(row, str) else row for row in rows[column] if row]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"column {column!r} of the dataset {name!r} holds no text; chats become text by the tokenizer's "
            "apply_chat_template(..., tokenize=False)"
        )
    return "\n\n".join(texts)


def _load(name: str, config: str | None, split: str, *, streaming: bool) -> Any:
    """Load a part of a dataset, or open it for reading row by row."""
    from datasets import load_dataset

    path = Path(name).absolute()
    source: tuple[str, ...] = (str(path.parent), glob.escape(path.name)) if path.is_file() else (name,)
    with _readable(name):
        return load_dataset(source[0], config, data_files=source[1:] or None, split=split, streaming=streaming)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what `datasets` raises for a dataset that cannot be read into `DataError`."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        raise DataError(f"the dataset {name!r} cannot be loaded: {redact(str(error.__cause__ or error))}") from error
