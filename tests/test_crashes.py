"""Every verb is cut short before every call that changes a file: an adapter's folder is the old or the new one.

A process that is killed before a call leaves the files as they are then, so one run shows the states of all its kills:
an audit hook copies the folder before each call. Interrupts (Ctrl-C) need a run each, since they clean up behind them.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
from huggingface_hub import HfApi, hf_hub_download
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_sparse
from hf_sparse import workflow
from hf_sparse.adapters.files import CONFIG, EVALUATION, REPORT, TRAINING, WEIGHTS
from hf_sparse.adapters.folder import write_repo
from hf_sparse.adapters.report import write_report
from hf_sparse.cli.errors import is_expected, message_of
from hf_sparse.errors import DataError
from hf_sparse.finetune import FinetuneConfig
from hf_sparse.folders import locked
from hf_sparse.methods.sparsefinder.unpatch import unpatch_adapter
from hf_sparse.methods.sparsek.divide import divide_adapter

pytestmark = pytest.mark.usefixtures("blank_pictures_in_module")

LENGTH, LIMIT = 80, int(os.environ.get("HF_SPARSE_FUZZ", "3"))
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

CONFIGS: dict[str, Callable[..., Any]] = {
    "sparsek": lambda **changes: hf_sparse.SparseKConfig(**{"k": 4, "window": 4, "sinks": 1, **changes}),
    "sparsefinder": lambda **changes: hf_sparse.SparsefinderConfig(
        **{"rank": 4, "tile": 8, "window": 4, "clusters": 3, "length": LENGTH, **changes}
    ),
}
#: Of an adapter with weights of the same shapes, which could be taken for the other's.
OTHERS = {"sparsek": {"k": 6}, "sparsefinder": {"window": 6}}
STEPS: dict[str, dict[str, Any]] = {
    "sparsek": {"warm_start_steps": 2, "steps": 2},
    "sparsefinder": {"steps": 2, "graph_steps": 2, "graph_rows": 8},
}
MEASURED: dict[str, dict[str, Any]] = {
    "sparsek": {"selections": ["dense", "learned"]},
    "sparsefinder": {"selections": ["predicted"], "sparsities": [0.5]},
}


class _Watch:
    """Calls `act` before every call that changes a file, while there is one."""

    def __init__(self) -> None:
        self.act: Callable[[], None] | None = None

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.act is None:
            return
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            self.changing()

    def changing(self) -> None:
        act, self.act = self.act, None
        if act is not None:
            try:
                act()
            finally:
                self.act = act


WATCH = _Watch()
sys.addaudithook(WATCH.hook)  # for good: Python has no way to remove one


@contextmanager
def watching(act: Callable[[], None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        write = safetensors.torch.serialize_file  # Rust, which no audit hook sees

        def serialize_file(*args: Any, **options: Any) -> Any:
            WATCH.changing()
            return write(*args, **options)

        patch.setattr(safetensors.torch, "serialize_file", serialize_file)
        WATCH.act = act
        try:
            yield
        finally:
            WATCH.act = None


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shown(folder: Path) -> dict[str, bytes]:
    """Return the files of an adapter's folder, apart from checkpoints and the steps of a run that goes on."""
    found = content(folder) if folder.is_dir() else {}
    return {name: data for name, data in found.items() if not name.startswith((".", "checkpoints/", "finetune.jsonl"))}


def states_of(act: Callable[[], Any], root: Path, copies: Path) -> list[Path]:
    """Copies of a folder as it was before each call that changed a file in an action, each state once."""
    seen: dict[str, Path] = {}

    def keep() -> None:
        digest = hashlib.sha256()
        for path in sorted(root.rglob("*")):
            with suppress(FileNotFoundError):
                digest.update(f"{path.relative_to(root)} {path.is_dir()}\n".encode())
                digest.update(b"" if path.is_dir() else path.read_bytes())
        if digest.hexdigest() not in seen:
            seen[digest.hexdigest()] = shutil.copytree(root, copies / f"{len(seen):03d}" / root.name)

    with watching(keep):
        act()
    assert len(seen) > 3
    return list(seen.values())


def interrupted(act: Callable[[], Any], at: int) -> bool:
    """Run an action with Ctrl-C before one of its calls that change files; whether it had as many."""
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGINT)

    with watching(stop), suppress(KeyboardInterrupt):
        act()
    return calls >= at


@pytest.fixture(scope="module", params=list(CONFIGS))
def place(request, tmp_path_factory) -> SimpleNamespace:
    """A base model, an untrained adapter, and one that was trained, measured and reported, of one method."""
    root = tmp_path_factory.mktemp(request.param)
    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(root / "base")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape, initializer_range=0.2)).save_pretrained(root / "base")
    generator = random.Random(0)
    text = " ".join(f"w{generator.randrange(64)}" for _ in range(4 * LENGTH))
    found = SimpleNamespace(method=request.param, root=root, base=str(root / "base"), text=text)
    found.fresh, found.whole = root / "fresh", root / "whole"
    create(found, found.fresh)
    shutil.copytree(found.fresh, found.whole)
    train(found, found.whole, checkpoint_every=1)
    measure(found, found.whole)
    report(found, found.whole)
    return found


def create(place, folder, force=False, seed=0, **changes):
    workflow.create_adapter(place.base, CONFIGS[place.method](**changes), folder, force=force, seed=seed)


def train(place, folder, **changes):
    settings = {**STEPS[place.method], "progress": False, "warmup_steps": 0, "output_dir": str(folder), **changes}
    return workflow.train_adapter(folder, place.text, FinetuneConfig(**settings), length=LENGTH, device="cpu")


def divide(place, folder):
    divide_adapter(folder, place.text, length=LENGTH, chunks=":1", device="cpu")


def unpatch(place, folder):
    options = {"length": LENGTH, "chunks": ":1", "device": "cpu"}
    densities = unpatch_adapter(folder, place.text, above=0.9999, **options)  # changes nothing
    unpatch_adapter(folder, place.text, above=sum(densities.values()) / 2, **options)


def measure(place, folder):
    options = {"length": LENGTH, "chunks": ":1", "device": "cpu", **MEASURED[place.method]}
    workflow.evaluate_adapter(folder, place.text, "words", **options)


def report(place, folder):
    write_report(folder, place.text, "words", length=LENGTH, chunks=":1", device="cpu")


VERBS: dict[str, Callable[[Any, Path], Any]] = {
    "patch --force": lambda place, folder: create(place, folder, force=True, seed=1, **OTHERS[place.method]),
    "finetune": lambda place, folder: train(place, folder, seed=1),
    "finetune with checkpoints": lambda place, folder: train(place, folder, seed=1, checkpoint_every=1),
    "finetune --resume": lambda place, folder: train(place, folder, resume=True),
    "divide": divide,
    "unpatch": unpatch,
    "eval": lambda place, folder: measure(place, folder),
    "report": report,
    "report again": lambda place, folder: write_report(folder),
    "write_repo": lambda place, folder: write_repo(folder, repo_id="another/name"),
}


def check(state: Path, old: dict[str, bytes], new: dict[str, bytes]) -> None:
    """A state is the old one or the new one once it is opened, and nobody who reads its files alone is misled."""
    raw = shown(state)
    pair = (raw.get(CONFIG), raw.get(WEIGHTS))
    assert None in pair or pair in [(side.get(CONFIG), side.get(WEIGHTS)) for side in (old, new)]
    for name in (EVALUATION, TRAINING):
        if name in raw and raw[name] != old.get(name):
            assert pair == (new[CONFIG], new[WEIGHTS])  # what tells of the new weights comes after them
    with locked(state):
        pass
    found = shown(state)
    assert found in (old, new), sorted(name for name in {**found, **new} if found.get(name) != new.get(name))
    hidden = {name for name in content(state) if name.startswith(".") or "/." in name}
    assert all(name.startswith("checkpoints/.") for name in hidden), hidden  # go with the next training


@pytest.mark.cross("values")
@pytest.mark.parametrize(
    "verb",
    [pytest.param(verb, marks=[pytest.mark.full] * (verb in ("finetune", "finetune --resume"))) for verb in VERBS],
)
def test_killed_before_any_call(place, tmp_path, verb):
    if (verb, place.method) in (("divide", "sparsefinder"), ("unpatch", "sparsek")):
        with pytest.raises(DataError, match="adapter, w"):
            VERBS[verb](place, place.whole)
        return
    folder = shutil.copytree(place.whole, tmp_path / "adapter")
    (folder / "notes.txt").write_text("mine")
    old = shown(folder)
    states = states_of(lambda: VERBS[verb](place, folder), folder, tmp_path / "states")
    new = shown(folder)
    assert (new != old or verb == "report again") and new["notes.txt"] == b"mine"
    if verb.startswith("finetune"):
        trained = json.loads(new[TRAINING])
        assert trained["weights_sha256"] == hashlib.sha256(new[WEIGHTS]).hexdigest()
        assert not {EVALUATION, REPORT} & new.keys() and {EVALUATION, REPORT} <= old.keys()
    for state in states:
        check(state, old, new)


def test_patch_killed_before_any_call(place, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    states = states_of(lambda: create(place, root / "new" / "adapter"), root, tmp_path / "states")
    new = shown(root / "new" / "adapter")
    assert set(new) == {CONFIG, WEIGHTS}
    for state in states:
        assert shown(state / "new" / "adapter") in ({}, new)
        if not shown(state / "new" / "adapter"):
            create(place, state / "new" / "adapter")
        with locked(state / "new" / "adapter"):
            pass
        assert content(state) == {f"new/adapter/{name}": data for name, data in new.items()}


def some(request: pytest.FixtureRequest, number: int) -> range:
    """Indices, from all over, of as many as the run is for."""
    whole = "fuzz" in request.config.getoption("-m", "").split() or number <= LIMIT
    return range(0, number, 1 if whole else -(-number // LIMIT))


@pytest.mark.cross("values")
@pytest.mark.fuzz
@pytest.mark.parametrize("old", ["fresh", "whole"])
def test_resumes_bit_for_bit_from_any_kill(place, tmp_path, request, old):
    folder = shutil.copytree(getattr(place, old), tmp_path / "adapter")
    settings = {"seed": 1, "checkpoint_every": 1}
    states = states_of(lambda: train(place, folder, **settings), folder, tmp_path / "states")
    expected = (folder / WEIGHTS).read_bytes()
    assert expected != (getattr(place, old) / WEIGHTS).read_bytes()
    from_another_run = 0
    for state in (states[index] for index in some(request, len(states))):
        try:
            train(place, state, **settings, resume=True)
        except ValueError as error:  # the checkpoint of the run before is there still, and is not taken for its own
            assert old == "whole" and "cannot resume with other settings" in str(error) and "seed" in str(error)
            from_another_run += 1
            train(place, state, **settings)
        assert (state / WEIGHTS).read_bytes() == expected
        assert [path.name for path in (state / "checkpoints").iterdir()] == ["step-000004"]
    assert (from_another_run > 0) == (old == "whole")


@pytest.mark.cross("values")
@pytest.mark.fuzz
@pytest.mark.parametrize("verb", ["patch --force", "finetune with checkpoints", "write_repo", "report again"])
def test_interrupted_before_any_call(place, tmp_path, request, verb):
    counted = shutil.copytree(place.whole, tmp_path / "counted")
    old, calls = shown(counted), 0

    def count() -> None:
        nonlocal calls
        calls += 1

    with watching(count):
        VERBS[verb](place, counted)
    for at in some(request, calls):
        folder = shutil.copytree(place.whole, tmp_path / "states" / str(at) / "adapter")
        assert interrupted(lambda folder=folder: VERBS[verb](place, folder), at + 1)
        raw = shown(folder)
        again = shutil.copytree(place.whole, tmp_path / "states" / str(at) / "again" / "adapter")
        if raw != old:  # the whole commit was made, though Ctrl-C came
            VERBS[verb](place, again)
            assert raw.keys() == shown(again).keys() and raw[WEIGHTS] == shown(again)[WEIGHTS]
        with locked(folder):
            pass
        assert shown(folder) == raw and not [name for name in content(folder) if name.startswith(".")]


def test_a_push_publishes_what_was_committed(place, tmp_path, hub):
    folder = shutil.copytree(place.whole, tmp_path / "adapter")
    states = states_of(lambda: train(place, folder, seed=1), folder, tmp_path / "states")
    # The new weights are in place, and the finetune.json beside them is of the old ones.
    cut = next(state for state in states if shown(state).get(WEIGHTS) == shown(folder)[WEIGHTS])
    assert shown(cut)[TRAINING] != shown(folder)[TRAINING] and EVALUATION in shown(cut)
    name = f"{hub.user}/crash-{place.method}"
    AutoModelForCausalLM.from_pretrained(place.base).push_to_hub(f"{name}-base")
    hf_sparse.push_to_hub(cut, name, base_model=f"{name}-base")
    for file in (WEIGHTS, TRAINING):
        assert Path(hf_hub_download(name, file)).read_bytes() == shown(folder)[file]
    assert not HfApi().file_exists(name, EVALUATION)


@pytest.mark.cross("values")
@pytest.mark.parametrize("verb", ["patch --force", "finetune with checkpoints", "eval", "report again"])
@pytest.mark.parametrize("size", [60, 2500, 9000])
def test_a_disk_that_is_full(place, tmp_path, verb, size):
    """A limit on the size of files stands for it: to the system it is an error of writing too."""
    folder = shutil.copytree(place.whole, tmp_path / "adapter")
    old = shown(folder)
    ending = in_a_child(lambda: VERBS[verb](place, folder), size)
    if ending == "done":
        assert size > 60
        return
    error, expected, message = ending.split("|", 2)
    assert expected == "True" and "\n" not in message and ("large" in message or "os error 27" in message), ending
    assert shown(folder) == old
    left = {name for name in content(folder) if "/." in f"/{name}"}
    assert not left, (error, left)


def in_a_child(act: Callable[[], Any], size: int) -> str:
    """Run an action in a process that can write no file larger than so many bytes, and tell how it ended."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            act()
            ending = "done"
        except BaseException as error:
            ending = f"{type(error).__name__}|{is_expected(error)}|{message_of(error)}"
        os.write(writer, ending.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        ending = pipe.read()
    os.waitpid(child, 0)
    return ending


def test_measurements_of_other_weights_are_refused(place, tmp_path):
    """What a copy by hand mixes: finetune.json of other weights, and eval.json of other settings."""
    folder = shutil.copytree(place.whole, tmp_path / "adapter")
    train(place, shutil.copytree(folder, tmp_path / "other"), seed=1)
    shutil.copyfile(tmp_path / "other" / TRAINING, folder / TRAINING)
    old = content(folder)
    for act in (lambda: write_repo(folder), lambda: measure(place, folder), lambda: write_report(folder)):
        with pytest.raises(
            DataError, match=r"finetune\.json tells of the training of other weights than adapter_model"
        ):
            act()
    assert content(folder) == old
    shutil.copyfile(place.whole / TRAINING, folder / TRAINING)
    write_repo(folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"layers": [0, 1], "peft_version": "another"}))
    for act in (lambda: write_repo(folder), lambda: write_report(folder)):
        with pytest.raises(DataError, match=r"eval\.json (was measured with other|is of the) settings"):
            act()
