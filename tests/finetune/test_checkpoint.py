"""Checkpoints: whose they are, what belongs together, and that a damaged one is one clear error."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import hf_sparse
from hf_sparse.errors import DataError
from hf_sparse.finetune import FinetuneConfig, checkpoint, finetune
from hf_sparse.finetune.identity import adapter_sha256, base_sha256
from hf_sparse.patches import sparse_layers

SETTINGS = {
    "sparsek": {"warm_start_steps": 2, "steps": 4},
    "sparsefinder": {"steps": 2, "graph_steps": 4, "graph_rows": 8},
}
COMMON = {"batch_size": 2, "warmup_steps": 0, "progress": False, "cpu": True}
PARAMETERS, EARLIER = "parameters.safetensors", "scorers.safetensors"
FILES = ("state.json", PARAMETERS, "optimizer.safetensors")


def make(method, tiny_llama, seed=1, base=None, **changes):
    configs = {
        "sparsek": lambda: hf_sparse.SparseKConfig(k=6, window=8, sinks=2, **changes),
        "sparsefinder": lambda: hf_sparse.SparsefinderConfig(rank=4, tile=16, window=4, clusters=3, **changes),
    }
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llama() if base is None else base, configs[method]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def train(method, model, chunks, output=None, **changes):
    place = {"output_dir": str(output), "checkpoint_every": 1} if output else {}
    return finetune(model, chunks, FinetuneConfig(**{**SETTINGS[method], **COMMON, **place, **changes}))


def learned(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rewrite(folder, drop=(), **changes):
    """Change the state of a checkpoint as a run with such a state would have written it."""
    content = json.loads((folder / "state.json").read_text()) | changes
    content = {key: value for key, value in content.items() if key not in ("sha256", *drop)}
    if content["format"] == 2:
        content["sha256"] = checkpoint._state_sha256(content)
    (folder / "state.json").write_text(json.dumps(content))


def as_before(folder):
    """A checkpoint as it was written before it noted what belongs to it."""
    rewrite(folder, drop=("files", "origin"), format=1)


def with_earlier_name(folder):
    """A checkpoint as it was written when the file of the parameters had SparseK's word for them."""
    (folder / PARAMETERS).rename(folder / EARLIER)
    files = json.loads((folder / "state.json").read_text())["files"]
    rewrite(folder, files={EARLIER if name == PARAMETERS else name: digest for name, digest in files.items()})


@pytest.fixture(params=list(SETTINGS))
def run(request, tiny_llama, chunks, stopped, tmp_path):
    """A run that was stopped after step 4 of 6: its method, a function that makes its model, and its folder."""
    with stopped(4):
        train(request.param, make(request.param, tiny_llama), chunks, tmp_path / "run")
    return request.param, lambda **changes: make(request.param, tiny_llama, **changes), tmp_path / "run"


def folder_of(output):
    (folder,) = (output / "checkpoints").iterdir()
    return folder


class TestIdentity:
    @pytest.mark.cross("values")
    @pytest.mark.parametrize(
        "age", [(), (with_earlier_name,), (with_earlier_name, as_before)], ids=["", "earlier name", "without the notes"]
    )
    def test_resumes_to_the_same_weights(self, run, chunks, age):
        method, model, output = run
        assert sorted(path.name for path in folder_of(output).iterdir()) == sorted(FILES)
        for change in age:
            change(folder_of(output))
        whole, resumed = model(), model()
        train(method, whole, chunks)
        metrics = train(method, resumed, chunks, output, resume=True)
        assert same(learned(whole), learned(resumed)) and len(metrics["history"]) == 6
        assert adapter_sha256(sparse_layers(whole)) == adapter_sha256(sparse_layers(resumed))

    def test_a_run_that_ended_can_be_repeated(self, run, chunks):
        method, model, output = run
        ended = model()
        train(method, ended, chunks, output, resume=True)
        expected = learned(ended)
        train(method, ended, chunks, output, resume=True)  # finetune.json says that its weights are that run's
        assert same(learned(ended), expected)
        with torch.no_grad():
            next(iter(p for p in ended.parameters() if p.requires_grad)).add_(1.0)
        with pytest.raises(DataError, match="other first weights"):
            train(method, ended, chunks, output, resume=True)

    def test_refuses_what_began_otherwise(self, run, chunks, tiny_llama):
        method, model, output = run
        before = {name: (folder_of(output) / name).read_bytes() for name in FILES}
        other = tiny_llama()
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
        with pytest.raises(DataError, match=r"cannot resume from step-000004: it began with another base model"):
            train(method, model(base=other), chunks, output, resume=True)
        with pytest.raises(DataError, match=r"cannot resume from step-000004: it began with another base model"):
            train(method, model(base=tiny_llama().bfloat16()), chunks, output, resume=True)
        with pytest.raises(DataError, match=r"cannot resume from step-000004: it began with other first weights"):
            train(method, model(seed=2), chunks, output, resume=True)
        assert {name: (folder_of(output) / name).read_bytes() for name in FILES} == before

    def test_a_step_beyond_the_plan(self, run, chunks):
        method, model, output = run
        history = [{"step": step, "loss": 1.0} for step in range(1, 9)]
        rewrite(folder_of(output), step=8, history=history)
        folder_of(output).rename(output / "checkpoints" / "step-000008")
        with pytest.raises(DataError, match="step-000008: expected at most the 6 steps of this run, got 8"):
            train(method, model(), chunks, output, resume=True)

    @pytest.mark.cross("values")
    @pytest.mark.parametrize(
        ("name", "old"),  # nothing told before which parameters belong to a checkpoint
        [*((name, False) for name in FILES), *((name, True) for name in FILES if name != PARAMETERS)],
    )
    def test_files_of_two_checkpoints(self, run, chunks, stopped, tmp_path, name, old):
        method, model, output = run
        with stopped(3):
            train(method, model(), chunks, tmp_path / "other")
        if old:
            as_before(folder_of(output))
            as_before(folder_of(tmp_path / "other"))
        shutil.copyfile(folder_of(tmp_path / "other") / name, folder_of(output) / name)
        with pytest.raises(DataError, match=r"^the checkpoint step-000004 is damaged \(.*\); delete it to start over$"):
            train(method, model(), chunks, output, resume=True)

    def test_base_sha256(self, tiny_llama):
        model = make("sparsek", tiny_llama)
        first = base_sha256(model, sparse_layers(model))
        other = make("sparsek", tiny_llama, seed=5)
        assert base_sha256(other, sparse_layers(other)) == first  # whatever the scorers are
        weight = other.get_base_model().model.embed_tokens.weight
        with torch.no_grad():
            weight[[1, 2]] = weight[[2, 1]]  # the sum is the same
        assert base_sha256(other, sparse_layers(other)) != first


class TestNames:
    def test_other_names_are_somebody_elses(self, run, chunks):
        method, model, output = run
        root = output / "checkpoints"
        for name in ("step-000004-best", "step-old", "step-", "Step-000009", "step-٣"):
            (root / name).mkdir()
            (root / name / "mine.txt").write_text("mine")
        (root / "step-notes.txt").write_text("mine")
        (root / "step-000099").symlink_to(root / "step-old")
        mine = sorted(path.name for path in root.iterdir() if path.name != "step-000004")
        assert checkpoint.latest(output) == root / "step-000004"
        resumed, whole = model(), model()
        train(method, resumed, chunks, output, resume=True)
        train(method, whole, chunks)
        assert same(learned(resumed), learned(whole))
        assert sorted(path.name for path in root.iterdir()) == sorted([*mine, "step-000006"])
        assert all((root / name / "mine.txt").exists() for name in ("step-000004-best", "step-old"))

    def test_numbers_count_as_numbers(self, tmp_path):
        for name in ("step-000009", "step-1000000", "step-10"):
            (tmp_path / "checkpoints" / name).mkdir(parents=True)
        assert checkpoint.latest(tmp_path).name == "step-1000000"

    def test_a_file_of_such_a_name(self, run, chunks):
        method, model, output = run
        (output / "checkpoints" / "step-000005").write_text("no folder")
        with pytest.raises(DataError, match="step-000005 is a file, and checkpoints of such names are folders"):
            train(method, model(), chunks, output, resume=True)

    def test_a_lower_step_of_a_new_run_is_the_newest(self, run, chunks, stopped):
        method, model, output = run
        with stopped(1):
            train(method, model(seed=3), chunks, output)
        assert checkpoint.latest(output).name == "step-000001"
        train(method, model(seed=3), chunks, output, resume=True)

    def test_leftovers_go(self, run):
        output = run[-1]
        (output / "checkpoints" / ".partial").mkdir()
        (output / "checkpoints" / "step-000002").mkdir()
        (output / "checkpoints" / "step-000004").rename(output / "checkpoints" / ".step-000004")
        checkpoint.recover(output)
        assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000004"]


def test_a_full_disk_leaves_the_checkpoint_before(run, chunks, monkeypatch):
    method, model, output = run
    before = {name: (folder_of(output) / name).read_bytes() for name in FILES}
    real, calls = Path.write_text, []

    def full(path, *args, **options):
        if path.name == "state.json":
            calls.append(path)
            real(path, '{"format": 2, "st')
            raise OSError(28, "No space left on device")
        return real(path, *args, **options)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left on device"):
        patched.setattr(Path, "write_text", full)
        train(method, model(), chunks, output, resume=True)
    assert calls and {name: (folder_of(output) / name).read_bytes() for name in FILES} == before
    train(method, model(), chunks, output, resume=True)


class Damage:
    """A change of a checkpoint that a seed determines; what it was is for messages."""

    VALUES = (None, True, -1, 0, 3, 10**30, 1.5, "x", [], {}, [[]], {"a": None}, float("nan"), 1e308)
    DTYPES = (torch.int32, torch.bool, torch.float16, torch.float64, torch.complex64, torch.uint8)

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def apply(self, folder: Path) -> str:
        kinds = (self.bytes, self.cut, self.missing, self.state, self.state, self.tensors, self.tensors, self.swapped)
        kind = self.random.choice(kinds)
        return f"{kind.__name__}: {kind(folder)}"

    def file(self, folder: Path) -> Path:
        return folder / self.random.choice(FILES)

    def bytes(self, folder: Path) -> str:
        path = self.file(folder)
        content = bytearray(path.read_bytes())
        at = self.random.randrange(len(content))
        content[at] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        return f"{path.name} at {at}"

    def cut(self, folder: Path) -> str:
        path = self.file(folder)
        content = path.read_bytes()
        path.write_bytes(content[: self.random.randrange(len(content))])
        return path.name

    def missing(self, folder: Path) -> str:
        path = self.file(folder)
        path.unlink()
        if self.random.random() < 0.3:
            path.mkdir()
        return path.name

    def state(self, folder: Path) -> str:
        path = folder / "state.json"
        content = json.loads(path.read_text())
        place = content
        while True:
            key = self.random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or self.random.random() < 0.5:
                break
            place = place[key]
        value = self.random.choice([value for value in self.VALUES if value != place[key] or type(value) is bool])
        if self.random.random() < 0.3:
            del place[key]
        else:
            place[key] = value
        path.write_text("[" * 100_000 if self.random.random() < 0.05 else json.dumps(content))
        return f"{key} = {value!r}"

    def tensors(self, folder: Path) -> str:
        path = folder / self.random.choice(FILES[1:])
        tensors = load_file(path)
        key = self.random.choice(sorted(tensors))
        what = self.random.choice(["dtype", "nan", "inf", "shape", "gone", "name"])
        if what == "dtype":
            tensors[key] = tensors[key].to(self.random.choice(self.DTYPES))
        elif what in ("nan", "inf"):
            tensors[key] = torch.full_like(tensors[key], float(what))
        elif what == "shape":
            tensors[key] = torch.stack([tensors[key]] * 2)
        else:
            tensor = tensors.pop(key)
            if what == "name":
                tensors[key + self.random.choice(["x", "|", "|step", "é"])] = tensor
        save_file(tensors, path)
        return f"{what} of {key} in {path.name}"

    def swapped(self, folder: Path) -> str:
        path = folder / self.random.choice(FILES[1:])
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
        return path.name


def changed(error):
    """Whether an error came before anything was put back; that of the optimiser's steps comes after."""
    return "steps of the stage" not in str(error)


@pytest.mark.fuzz
@pytest.mark.parametrize("old", [False, True], ids=["", "without the notes"])
def test_damaged_checkpoints(run, tmp_path, request, old):
    """Only our errors, and nothing loaded that can be told from what was written."""
    _, make_model, output = run
    if old:
        as_before(folder_of(output))
    count = int(os.environ.get("HF_SPARSE_FUZZ", "60" if "fuzz" not in request.config.getoption("-m") else "1000"))
    model = make_model()
    before = learned(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plan = [("first", step) for step in range(2)] + [("second", step) for step in range(4)]
    whole = {name: (folder_of(output) / name).read_bytes() for name in FILES}
    loaded = 0
    for seed in range(-(-count // 4)):  # two methods, with and without the notes
        folder = shutil.copytree(folder_of(output), tmp_path / str(seed) / "step-000004")
        damage = Damage(seed).apply(folder)
        optimizer = torch.optim.AdamW(parameters.values())
        try:
            state = checkpoint.load_state(folder)
            checkpoint.load_into(
                folder, state, dict(p for p in model.named_parameters() if p[1].requires_grad), optimizer
            )
            checkpoint.check_steps(folder, optimizer, plan[state["step"] - 1][1] + 1)
        except DataError as error:
            assert str(error).startswith("the checkpoint step-000004 ") and "\n" not in str(error), damage
            assert not changed(error) or same(learned(model), before), damage
        else:
            loaded += 1
            if not old:  # at most the same JSON in other letters
                assert all((folder / name).read_bytes() == whole[name] for name in FILES[1:]), damage
                assert json.loads((folder / FILES[0]).read_text()) == json.loads(whole[FILES[0]]), damage
            assert all(p.isfinite().all() for p in learned(model).values()), damage
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        shutil.rmtree(tmp_path / str(seed))
    assert old or loaded <= count // 100


def test_a_large_loss_is_no_damage(tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(2))
    row = {"step": 1, "loss": 3e12}
    state = {"settings": {}, "origin": {}, "history": [row], "report": {}, "seconds": 1.0}
    checkpoint.save(tmp_path, 1, {"weight": parameter}, torch.optim.AdamW([parameter]), state)
    assert checkpoint.load_state(checkpoint.latest(tmp_path))["history"] == [row]
