"""Read text that every Python installation holds: the sources of its standard library and the topics of `help()`.

The bundled checkpoint was trained on the `train` part. The `held_out` part is whole modules (with their tests) that
training never saw; the demo and the card measure on it. Splitting by module name, not by file or chunk, keeps the two
parts apart on every Python version.
"""

import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

# Tables of code points and generated parser tables: numbers, not text.
_SKIPPED = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "__phello__", "lib-dynload"}


def is_held_out(module: str) -> bool:
    """Tell whether a top-level standard library module, tests included, is kept out of training (about 1 in 12)."""
    return zlib.crc32(module.removeprefix("test_").encode()) % 12 == 0


def documents(split: Split, *, tests: bool = False) -> Iterator[str]:
    """Yield the documents of one part in a fixed order: module sources, then (`train` only) the topics of `help()`.

    `tests` adds the standard library's own test suite, which minimal installations leave out; only the training of
    the bundled checkpoint asks for it.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_sources(root)):
        names = path.relative_to(root).with_suffix("").parts
        is_test = names[0] == "test" or "tests" in names or "idle_test" in names
        if is_test and not tests:
            continue
        module = names[1] if names[0] == "test" and len(names) > 1 else names[0]
        if is_held_out(module) != (split == "held_out"):
            continue
        text = path.read_text("utf-8", errors="replace").strip()
        if text:
            yield text
    if split == "train":
        from pydoc_data.topics import topics

        yield from (topics[name].strip() for name in sorted(topics))


def _sources(root: Path) -> Iterator[Path]:
    """Yield the sources below a folder without going through what is skipped, the packages that are installed there."""
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - _SKIPPED
        yield from (Path(folder, name) for name in files if name.endswith(".py") and name[:-3] not in _SKIPPED)


#: A module in one pattern, which dense attention of the bundled checkpoint continues: class, docstring, constructor.
PROMPT = '''"""Errors of the network client."""


class NetworkError(Exception):
    """Base class of all errors in this module."""


class HostError(NetworkError):
    """Raised when the host is not known."""

    def __init__(self, host):
        self.host = host
        super().__init__(f"unknown host: {host}")


class PortError(NetworkError):
    """Raised when the port is out of range."""

    def __init__(self, port):
        self.port = port
        super().__init__(f"invalid port: {port}")


class TimeoutError(NetworkError):
    """Raised when the server does not answer in time."""

    def __init__(self, seconds):
        self.seconds = seconds
        super().__init__(f"no answer after: {seconds}")


class ProtocolError(NetworkError):
    """Raised when the server speaks another protocol."""

    def __init__(self, version):
        self.version = version
        super().__init__(f"unsupported version: {version}")


class HeaderError(NetworkError):
    """Raised when a header is not valid."""

    def __init__(self, header):
        self.header = header
        super().__init__(f"invalid header: {header}")


class'''
