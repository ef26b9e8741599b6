"""Change a folder as a whole, and by one process at a time.

New files are written into a stage. One rename of the stage is the commit: before it the folder is as it was, after it
the folder is the new one, though its files may still have to be moved into place. Whoever opens the folder next
finishes that, so a process may be killed at any call.
"""

import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock, Timeout

from hf_sparse.atomic_files import check_place, check_writable
from hf_sparse.environment import is_main_process
from hf_sparse.errors import BusyError

Verb = TypeVar("Verb", bound=Callable[..., Any])

LOCK, PENDING = ".lock", ".pending"

_PLAN = ".plan.json"  # in a stage: what goes before its files come, and what goes after
_WAIT = 5.0  # seconds for another process to move its files into place
_held = threading.local()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder within a `with` block, after what a killed run left there is finished or removed.

    The operating system releases the lock of a process that dies. In one thread the blocks may be nested. The lock of
    a folder that does not exist yet lies beside it.

    Raises:
        BusyError: another run holds the folder.
        PermissionError: there is no such folder, and none can be made.
    """
    folder = Path(folder).resolve()
    folders: set[Path] = _held.__dict__.setdefault("folders", set())
    if folder in folders:
        yield
        return
    check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}{LOCK}")
    exists = folder.is_dir()
    with _lock(folder / LOCK if exists else beside, folder):
        folders.add(folder)
        try:
            if exists:
                _sweep(folder, ".stage")
                _finish(folder)
                if beside.exists() or _stages(folder.parent, f".{folder.name}"):  # of the run that made the folder
                    with suppress(OSError), _lock(beside, folder):
                        _sweep(folder.parent, f".{folder.name}")
            else:
                _sweep(folder.parent, f".{folder.name}")
            yield
        finally:
            folders.discard(folder)


def exclusive(verb: Verb) -> Verb:
    """Let a function hold the folder that is its first argument, which must take new files if it exists.

    Of processes that were launched together the first one holds it.
    """

    @wraps(verb)
    def holding(folder: str | Path, *args: Any, **options: Any) -> Any:
        if not Path(folder).is_dir() or not is_main_process():
            return verb(folder, *args, **options)
        check_writable(Path(folder))
        with locked(folder):
            return verb(folder, *args, **options)

    return cast(Verb, holding)


@contextmanager
def staged(folder: str | Path, *, first: Sequence[str] = (), removed: Iterable[str] = ()) -> Iterator[Path]:
    """Give a new folder whose files replace those of `folder` at the end of the `with` block, or vanish if it fails.

    If there is no `folder` yet, it appears whole. Weights come before JSON, and JSON before what shows it.

    Args:
        folder: is locked meanwhile.
        first: names of files that go before any new one comes, where they would be taken for a pair with it.
        removed: relative paths of files and folders that go when all new files are in place, new ones apart.

    Raises:
        BusyError: another run holds the folder.
        OSError: the new files cannot be written, or a folder has the name of one; `folder` is as it was.
    """
    folder = Path(folder).resolve()
    with locked(folder):
        exists = folder.is_dir()
        place = folder if exists else folder.parent
        prefix = ".stage" if exists else f".{folder.name}"
        temporary = Path(tempfile.mkdtemp(prefix=f"{prefix}.", dir=place))
        stage = temporary / folder.name
        try:
            stage.mkdir()
            yield stage
            for name in _files(stage):
                if (folder / name).is_dir():
                    raise IsADirectoryError(f"{folder / name} is a folder, and a file of this name is written there")
            if exists:
                old = [name for name in removed if not (stage / name).exists()]
                (stage / _PLAN).write_text(json.dumps({"first": list(first), "removed": old}), "utf-8")
            for name in _files(stage):
                _sync(stage / name)
            with _uninterrupted():
                os.replace(stage, folder / PENDING if exists else folder)
                _sync(place)
                if exists:
                    _finish(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish what a killed run had committed, before the files of a folder are read.

    Raises:
        BusyError: another run holds the folder and does not finish it.
        OSError: the folder takes no new files.
    """
    deadline = time.monotonic() + _WAIT
    while (folder / PENDING).is_dir():
        try:
            with locked(folder):
                pass
        except BusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def is_empty(folder: Path) -> bool:
    """Tell whether a folder holds nothing but what killed runs left."""
    return {path.name for path in folder.iterdir()} <= {LOCK, *(path.name for path in _stages(folder, ".stage"))}


@contextmanager
def _lock(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, with a note of who does."""
    while True:
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(
                f"{folder} is in use by another run{_holder(path)}: wait until it has ended, or stop it"
            ) from None
        if path.exists():
            break
        lock.release()  # the one before removed the file while this one opened it
    try:
        with suppress(OSError):  # only a message would miss it
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            path.write_text(f"pid {os.getpid()}, since {since}", "utf-8")
        yield
    finally:
        with suppress(OSError):  # the folder may be gone, or Windows may want the lock released first
            path.unlink()
        lock.release()


def _holder(path: Path) -> str:
    """Return the note of who holds a lock, for a message; empty if there is none."""
    try:
        note = path.read_text("utf-8")
    except (OSError, ValueError):
        return ""
    return f" ({note})" if re.fullmatch(r"pid \d+, since [\d :+-]+", note) else ""


def _finish(folder: Path) -> None:
    """Move committed files into place. It may be cut short anywhere, and is then done again."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    plan = json.loads((pending / _PLAN).read_text("utf-8")) if (pending / _PLAN).exists() else {}
    names = [name for name in _files(pending) if name != _PLAN]
    for name in plan.get("first", ()):
        if name in names:  # otherwise the new one is in place already
            (folder / name).unlink(missing_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(pending / name, folder / name)
    for name in plan.get("removed", ()):
        remove(folder / name)
    _sync(folder)
    (pending / _PLAN).unlink(missing_ok=True)
    shutil.rmtree(pending)


def remove(path: Path) -> None:
    """Remove a file, or a folder and all in it, and the folder around it if that is empty then; none is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _files(stage: Path) -> list[str]:
    """Return the relative paths of the files in a stage, in the order in which they come into place."""
    order = {".safetensors": 0, ".json": 1}
    names = [path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()]
    return sorted(names, key=lambda name: (order.get(Path(name).suffix, 2), name))


def _sweep(place: Path, prefix: str) -> None:
    """Remove stages that killed runs left."""
    for path in _stages(place, prefix):
        shutil.rmtree(path, ignore_errors=True)


def _stages(place: Path, prefix: str) -> list[Path]:
    """List the stages in a folder; `tempfile` adds 8 letters to what their names begin with."""
    names = rf"{re.escape(prefix)}\.[a-z0-9_]{{8}}"
    try:
        return [path for path in place.iterdir() if re.fullmatch(names, path.name) and path.is_dir()]
    except PermissionError:  # a folder around this one need not be readable
        return []


def _sync(path: Path) -> None:
    """Bring a file or the names in a folder to the disk, as far as the system can; what a link points to is old."""
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C within a `with` block, so that committed files all come into place."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
