"""A verb reads and checks each file of an adapter's folder once, and what it read is what the file holds."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import hf_sparse
from hf_sparse.adapters.files import CONFIG, EVALUATION, TRAINING, WEIGHTS, measurement_files
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.report import write_report
from hf_sparse.errors import DataError, HubError
from hf_sparse.finetune import FinetuneConfig
from hf_sparse.workflow import create_adapter, evaluate_adapter, train_adapter

pytestmark = pytest.mark.usefixtures("blank_pictures_in_module")

LENGTH = 40
TEXT = Path(__file__).read_text("utf-8")[: 16 * LENGTH]
STEPS = FinetuneConfig(steps=2, warm_start_steps=0, warmup_steps=0, progress=False)


class _Opened:
    """Count the files that are opened for reading while `counts` is there."""

    counts: Counter[Path] | None = None

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.counts is not None and event == "open" and isinstance(args[0], str) and args[1] in ("r", "rb"):
            self.counts[Path(args[0])] += 1


OPENED = _Opened()
sys.addaudithook(OPENED.hook)  # for good: Python has no way to remove one


@contextmanager
def opened() -> Iterator[Counter[Path]]:
    OPENED.counts = counts = Counter[Path]()
    try:
        yield counts
    finally:
        OPENED.counts = None


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder that was trained, measured and reported."""
    folder = tmp_path_factory.mktemp("measured") / "adapter"
    create_adapter("demo", hf_sparse.SparseKConfig(k=5, window=6, sinks=2), folder)
    train_adapter(folder, TEXT, STEPS, length=LENGTH, device="cpu")
    measure(folder)
    write_report(folder, TEXT, length=LENGTH, device="cpu")
    return folder


def measure(folder: Path) -> None:
    evaluate_adapter(folder, TEXT, "words", length=LENGTH, selections=["dense", "learned"], device="cpu")


@pytest.fixture
def folder(measured, tmp_path) -> Path:
    return shutil.copytree(measured, tmp_path / "adapter")


VERBS = {
    "finetune": lambda folder: train_adapter(folder, TEXT, STEPS, length=LENGTH, device="cpu"),
    "eval": measure,
    "report": lambda folder: write_report(folder, TEXT, length=LENGTH, device="cpu"),
    "report again": write_report,
    "write_repo": hf_sparse.hub.write_repo,
}
#: The JSON files that each verb needs, and how often they are opened.
READ = {
    # Once by the verb, once by `hf_sparse.finetune.finetune`, which works without a folder of an adapter too.
    "finetune": {CONFIG: 1, TRAINING: 2},
    "eval": {CONFIG: 1, TRAINING: 1},
    "report": {CONFIG: 1, TRAINING: 1, EVALUATION: 1},
    "report again": {CONFIG: 1, TRAINING: 1, EVALUATION: 1, "selection.json": 1},
    "write_repo": {CONFIG: 1, TRAINING: 1, EVALUATION: 1},
}


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=[pytest.mark.full] * (verb in ("finetune", "report"))) for verb in VERBS]
)
def test_each_json_file_is_read_once(folder, verb):
    with opened() as counts:
        VERBS[verb](folder)
    read = {path.name: count for path, count in counts.items() if path.parent == folder and path.suffix == ".json"}
    assert read == READ[verb]


def test_content(folder):
    adapter = AdapterFolder(folder)
    assert (
        adapter.name == "adapter"
        and adapter.config.k == 5
        and adapter.public_base_model == adapter.base_model == "demo"
    )
    assert adapter.config_content == json.loads((folder / CONFIG).read_text())
    assert adapter.evaluation == json.loads((folder / EVALUATION).read_text()) == adapter.checked_evaluation
    assert adapter.training == json.loads((folder / TRAINING).read_text()) == adapter.checked_training
    assert adapter.details == json.loads((folder / "selection.json").read_text())
    assert adapter.evaluation["weights_sha256"] == adapter.weights_sha256 == adapter.details["scorers_sha256"]
    assert adapter.evaluation["settings_sha256"] == adapter.settings_sha256 == adapter.details["settings_sha256"]


def test_measurements_of_other_weights(folder):
    tensors = {key: value + 1 for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    adapter = AdapterFolder(folder)
    assert adapter.evaluation is not None and adapter.training is not None and adapter.details is None
    with pytest.raises(DataError, match="was measured with other weights"):
        _ = adapter.checked_evaluation
    with pytest.raises(DataError, match="tells of the training of other weights"):
        _ = adapter.checked_training


def test_without_measurements(folder):
    for name in (*measurement_files(folder), TRAINING):
        (folder / name).unlink()
    adapter = AdapterFolder(folder)
    assert adapter.checked_evaluation is adapter.checked_training is adapter.details is None


def test_new_files_replace_what_was_measured_of_the_old_ones(folder):
    (folder / "notes.txt").write_text("mine")
    adapter = AdapterFolder(folder)
    with adapter.replaced() as stage:
        (stage / WEIGHTS).write_bytes(b"new")
        assert (folder / EVALUATION).exists()
    assert (folder / WEIGHTS).read_bytes() == b"new"
    assert {path.name for path in folder.iterdir()} == {
        CONFIG,
        WEIGHTS,
        TRAINING,
        "finetune.jsonl",
        "README.md",
        "notes.txt",
    }


def test_no_adapter(tmp_path):
    with pytest.raises(HubError, match="missing is no folder; `hf-sparse patch MODEL --output"):
        AdapterFolder(tmp_path / "missing")
    with pytest.raises(HubError, match=r"mine is not a complete adapter: adapter_config.json and adapter_model"):
        AdapterFolder(tmp_path, "mine")
