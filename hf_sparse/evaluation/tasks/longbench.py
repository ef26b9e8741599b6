"""Read questions about long documents from files in LongBench's format (Bai et al. 2023, 2308.14508)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse.data import prompt_tokens, read_text
from hf_sparse.errors import DataError


@dataclass(frozen=True)
class Document:
    """Hold one line of a file: a `context`, a question (`input`, may be empty), and `answers` of which any will do."""

    context: str
    input: str
    answers: tuple[str, ...]


def read_longbench(path: str | Path) -> list[Document]:
    """Read JSON lines with the fields `input`, `context` and `answers`; other fields are left alone.

    Raises:
        DataError: the file cannot be read, or a line of it is no such object.
    """
    documents = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # a text may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            document = Document(row["context"], row["input"], tuple(row["answers"]))
            if not document.answers or not all(isinstance(x, str) for x in (document.context, document.input)):
                kinds = ", ".join(type(row[name]).__name__ for name in ("context", "input"))
                raise TypeError(
                    f"context and input must be text, and answers a list with at least one, got {kinds} and "
                    f"{len(document.answers)} answers"
                )
            if isinstance(row["answers"], str) or not all(isinstance(answer, str) for answer in document.answers):
                raise TypeError(f"answers must be a list of texts, got {row['answers']!r:.80}")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"line {number} of {path} is not LongBench's format (input, context, answers): {error!r}"
            ) from error
        documents.append(document)
    return documents


def prompt(tokenizer: Any, document: Document, limit: int) -> list[int]:
    """Return the tokens of a document and its question; the middle of a context too long for `limit` is left out.

    LongBench cuts the same way, and has a wording of its own for each data set; this one wording serves all.

    Raises:
        DataError: the question alone is longer.
    """
    question = f"\n\nQuestion: {document.input}\nAnswer:" if document.input else "\n\nAnswer:"
    whole = prompt_tokens(tokenizer, document.context + question)
    if len(whole) <= limit:
        return whole
    end = tokenizer(question, add_special_tokens=False)["input_ids"]
    room = limit - len(end)
    if room < 2:
        raise DataError(f"expected a question of at most {limit - 2} tokens, got {len(end)}: use longer prompts")
    start = prompt_tokens(tokenizer, document.context)
    return start[: room - room // 2] + start[-(room // 2) :] + end
