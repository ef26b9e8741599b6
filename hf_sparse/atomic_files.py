"""Write files that appear whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all; the folder must exist."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, "utf-8", errors="replace")  # JSON can hold halves of characters
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise `PermissionError` for a folder that takes no new files, before there is something to lose.

    A folder that does not exist is left to whoever reads it.
    """
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to, and the result goes there: work on a copy of it")


def check_place(folder: Path) -> None:
    """Raise `PermissionError` for a folder that is missing and cannot be made, before there is something to lose."""
    parent = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    if parent != folder and not os.access(parent, os.W_OK):
        raise PermissionError(f"{folder} cannot be made, since {parent} takes no new files: choose another place")


def read_object(path: Path, most: int = 2**24) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        most: bytes that the file may have; a larger one is not read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too large, no JSON, nested too deeply, has a key twice, or holds something other than an
            object.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it must have at most {most} bytes, got {path.stat().st_size}")
    try:
        content = json.loads(data, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it must hold an object, got {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("it has a key twice")
    return content


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")
