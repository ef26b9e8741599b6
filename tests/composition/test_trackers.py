"""Trackers of accelerate get the steps of a run: each writes them to files, without a network, that are read back."""

import json
import struct

import pytest
import yaml

from hf_sparse.finetune import FinetuneConfig, finetune

STEPS = {"steps": 3, "warm_start_steps": 1, "warmup_steps": 1, "batch_size": 1, "progress": False, "cpu": True}


@pytest.fixture
def steps(make, ids, tmp_path):
    """Train with a tracker; return the numbers of every step by its number, and the settings."""

    def train(tracker):
        metrics = finetune(make(), ids, FinetuneConfig(**STEPS, output_dir=str(tmp_path), tracker=tracker))
        rows = map(json.loads, (tmp_path / "finetune.jsonl").read_text().splitlines())
        told = {row.pop("step"): row for row in rows}
        assert len(told) == len(metrics["history"]) == 4
        assert all(row.pop("stage") and {"loss", "gradient_norm", "seconds"} < row.keys() for row in told.values())
        # What the run found out afterwards stands in the same place.
        found = ("length", "chunks", "chunks_sha256", "first_token", "processes")
        return told, {name: value for name, value in metrics["settings"].items() if name not in found}

    return train


def test_tensorboard(steps, tmp_path):
    """`finetune` with `tracker="tensorboard"` writes every number of every step, and the settings."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="not installed")
    expected, settings = steps("tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "hf-sparse"))
    events.Reload()
    read = {number: {} for number in expected}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            read[event.step][name] = event.value
    assert read == {number: pytest.approx(row, rel=1e-6) for number, row in expected.items()}  # they are float32
    (file,) = tmp_path.glob("hf-sparse/*/hparams.yml")
    assert yaml.safe_load(file.read_text()) == settings


def test_trackio(steps):
    """`finetune` with `tracker="trackio"` writes the same into its local database."""
    trackio = pytest.importorskip("trackio", reason="not installed")
    expected, settings = steps("trackio")
    (run,) = trackio.Api().runs("hf-sparse")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    rows = storage.get_logs("hf-sparse", run.name)
    assert {row["step"]: {name: row[name] for name in expected[row["step"]]} for row in rows} == expected
    assert {name: run.config[name] for name in settings} == settings
    assert storage.get_project_db_path("hf-sparse").is_file()


def test_wandb(steps, tmp_path, monkeypatch):
    """`finetune` with `tracker="wandb"` and `WANDB_MODE=offline` writes the same for a later `wandb sync`."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb", reason="not installed")
    expected, settings = steps("wandb")
    wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    read, configured = {}, {}
    for record in records(file.read_bytes()):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if row:
            read[row["_step"]] = {name: value for name, value in row.items() if not name.startswith("_")}
        configured |= {item.key: json.loads(item.value_json) for item in record.config.update}
        configured |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert read == expected
    assert {name: configured[name] for name in settings} == settings


def records(content):
    """Yield what a run of wandb wrote: after 7 bytes, records in the log format of LevelDB, here of one block."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    place = 7
    assert content.startswith(b":W&B") and len(content) < 32768
    while place < len(content):
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        assert kind == 1  # a whole record
        yield messages.Record.FromString(content[place + 7 : place + 7 + length])
        place += 7 + length
