"""Folders change as a whole, and by one process at a time."""

import os
import re
import signal
import threading
import time

import pytest

from hf_sparse.errors import BusyError
from hf_sparse.folders import is_empty, locked, recover, staged


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a.json").write_text("old")
    return folder


class Holder:
    """A process that holds a folder until it is killed."""

    def __init__(self, folder, hold):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            with hold(folder):
                os.write(writer, b"held")
                time.sleep(60)
            os._exit(0)
        os.close(writer)
        assert os.read(reader, 4) == b"held"
        os.close(reader)

    def kill(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


@pytest.fixture
def holder():
    """Starts a process that holds a folder, and kills it in the end."""
    started = []

    def start(folder, hold=locked):
        started.append(Holder(folder, hold))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_a_second_run_is_told_who_holds_the_folder(folder, holder):
    process = holder(folder)
    for _ in range(2):  # the note is there for the next one too
        with (
            pytest.raises(BusyError, match=r"adapter is in use by another run \(pid \d+, since 20") as caught,
            staged(folder),
        ):
            pytest.fail("held twice")
        assert f"(pid {process.pid}, since " in str(caught.value) and isinstance(caught.value, OSError)
    process.kill()
    with locked(folder):  # the system has released it
        assert f"pid {os.getpid()}" in (folder / ".lock").read_text()
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_a_folder_that_is_being_made_is_held_too(tmp_path, holder):
    process = holder(tmp_path / "new", staged)
    with pytest.raises(BusyError, match="new is in use by another run"), staged(tmp_path / "new"):
        pytest.fail("held twice")
    process.kill()
    assert len(list(tmp_path.iterdir())) == 2  # its stage and its lock
    with staged(tmp_path / "new") as stage:
        (stage / "a.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_blocks_are_nested_in_one_thread_alone(folder):
    caught = []

    def other():
        try:
            with locked(folder):
                pass
        except BusyError as error:
            caught.append(error)

    with locked(folder), locked(str(folder)), staged(folder):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 1
    with locked(folder):
        pass


def test_files_are_replaced_and_removed(folder):
    (folder / "sub").mkdir()
    for name in ("b.json", "c.png", "sub/d.png"):
        (folder / name).write_text("old")
    removed = ["b.json", "a.json", "none.json"]
    with staged(folder, removed=removed) as stage:
        (stage / "a.json").write_text("new")  # a new file is not removed
        (stage / "sub").mkdir()
        (stage / "sub" / "e.png").write_text("new")
        removed.append("sub/d.png")
        assert (folder / "a.json").read_text() == "old"
    assert {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()} == {
        "a.json": "new",
        "c.png": "old",
        "sub/e.png": "new",
    }


def test_nothing_happens_where_the_block_fails(folder, tmp_path):
    for place in (folder, tmp_path / "new"):
        with pytest.raises(KeyError), staged(place, removed=["a.json"]) as stage:
            (stage / "a.json").write_text("new")
            raise KeyError
    with pytest.raises(IsADirectoryError, match="sub is a folder, and a file of this name is written there"):
        (folder / "sub").mkdir()
        with staged(folder) as stage:
            (stage / "a.json").write_text("new")
            (stage / "sub").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] and (folder / "a.json").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "sub"]


def test_leftovers_of_killed_runs(tmp_path, holder):
    folder = tmp_path / "adapter"
    folder.mkdir()
    process = holder(folder, staged)
    process.kill()
    assert len(list(folder.iterdir())) == 2 and is_empty(folder)
    for name in (".stage.mine", ".adapter.notes", "notes.txt"):
        (folder / name).mkdir()
    assert not is_empty(folder)
    with locked(folder):
        pass
    assert sorted(path.name for path in folder.iterdir()) == [".adapter.notes", ".stage.mine", "notes.txt"]


def test_a_reader_finishes_what_was_committed(folder, holder):
    (folder / ".pending").mkdir()
    (folder / ".pending" / "a.json").write_text("new")
    holder(folder.with_name("other"))
    recover(folder)
    assert (folder / "a.json").read_text() == "new" and not (folder / ".pending").exists()


def test_a_reader_waits_for_who_holds_the_folder(folder, monkeypatch):
    monkeypatch.setattr("hf_sparse.folders._WAIT", 0.1)
    release = threading.Event()

    def hold():
        with locked(folder):
            (folder / ".pending").mkdir()
            (folder / ".pending" / "a.json").write_text("new")
            held.set()
            release.wait()

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    began = time.monotonic()
    with pytest.raises(BusyError, match=re.escape(f"(pid {os.getpid()}, since ")):
        recover(folder)
    assert time.monotonic() - began > 0.1
    release.set()
    thread.join()
    recover(folder)
    assert (folder / "a.json").read_text() == "new"


def test_a_folder_that_cannot_be_made_is_told_before_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    message = f"{tmp_path / 'new'} cannot be made, since {tmp_path} takes no new files: choose another place"
    with pytest.raises(PermissionError, match=re.escape(message)), locked(tmp_path / "new"):
        pytest.fail("the block began")
    assert list(tmp_path.iterdir()) == []
