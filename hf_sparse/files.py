"""Files that appear whole or not at all."""

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


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")
