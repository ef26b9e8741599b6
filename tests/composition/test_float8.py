"""Training over a base that multiplies in fp8: accelerate's `mixed_precision="fp8"` with torchao, emulated on a CPU.

Launched processes run this file.
"""

import runpy
import sys
from contextlib import suppress
from copy import copy
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from typer.testing import CliRunner

import hf_sparse
from hf_sparse import cli
from hf_sparse.demo import CHECKPOINT
from hf_sparse.finetune import FinetuneConfig, checkpoint, finetune, float8
from hf_sparse.finetune.objectives import distill

TESTS = Path(__file__).parents[1]
FAMILIES = runpy.run_path(str(TESTS / "families.py"))["FAMILIES"]
CONFIGS = {
    "sparsek": hf_sparse.SparseKConfig(k=6, window=8, sinks=2, lora_rank=2),
    "sparsefinder": hf_sparse.SparsefinderConfig(rank=4, clusters=4, tile=8, window=8),
}
CHUNKS = torch.randint(5, 64, (12, 96), generator=torch.Generator().manual_seed(2))
FP8 = {"mixed_precision": "fp8"}


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    pytest.importorskip("torchao.float8", reason="needs the extra `fp8`: run `make composition`")
    monkeypatch.setenv(float8.EMULATE, "1")


def make_model(method="sparsek"):
    torch.manual_seed(1)
    return get_peft_model(FAMILIES["llama"].make(), copy(CONFIGS[method]))


def train(model, **changes):
    settings = {"steps": 4, "warmup_steps": 1, "learning_rate": 5e-3, "lm_weight": 0.0}  # the KL is to fall
    settings |= {"batch_size": 2, "progress": False, "cpu": True}
    return finetune(model, CHUNKS, FinetuneConfig(**{**settings, **changes}))


def learned(model):
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def described(model):
    """Return the name, class and attributes of every linear layer."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [(name, type(linear), sorted(vars(linear))) for name, linear in linears]


def losses(metrics):
    return [row["loss"] for row in metrics["history"]]


@pytest.mark.parametrize("method", CONFIGS)
def test_training(method):
    """`mixed_precision="fp8"`: both methods learn as without it, and the base and what is saved are as without it."""
    before = {"warm_start_steps": 4, "divide_heads": False} if method == "sparsek" else {"graph_steps": 4}
    plain, model = make_model(method), make_model(method)
    base = {name: tensor.clone() for name, tensor in model.base_model.model.state_dict().items()}
    linears = described(model)
    expected, metrics = train(plain, **before), train(model, **before, **FP8)
    assert losses(metrics) == pytest.approx(losses(expected), rel=0.1) and losses(metrics) != losses(expected)
    assert metrics["versions"]["torchao"] == version("torchao") and "torchao" not in expected["versions"]
    if method == "sparsek":
        with torch.no_grad():
            untrained, without, trained = (float(distill(m.eval(), CHUNKS)) for m in (make_model(), plain, model))
        assert without < 0.95 * untrained and trained == pytest.approx(without, rel=0.05)
    saved, as_ever = learned(model), learned(plain)
    assert [(name, t.dtype, t.shape) for name, t in saved.items()] == [
        (name, t.dtype, t.shape) for name, t in as_ever.items()
    ]
    assert described(model) == linears
    after = model.base_model.model.state_dict()
    assert after.keys() == base.keys()
    frozen = [name for name in base if "sparse_attention" not in name]
    assert frozen and all(torch.equal(after[name], base[name]) for name in frozen)


def test_layers_in_fp8():
    """In fp8 are the base's linear layers, below a LoRA of PEFT too; not the head, odd sizes, LoRA and scorers."""
    base = FAMILIES["llama"].make()
    base.model.layers[0].mlp.down_proj = nn.Linear(64, 33)
    below = get_peft_model(base, LoraConfig(r=16, target_modules=["q_proj"])).requires_grad_(False)
    over = hf_sparse.patch(below.get_base_model(), hf_sparse.SparseKConfig(k=6, window=8, sinks=2))
    beside = hf_sparse.patch(FAMILIES["llama"].make(), hf_sparse.SparseKConfig(k=6, window=8, sinks=2, lora_rank=16))
    ends = ("q_proj", "q_proj.base_layer", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for model, left in ((over, ["model.layers.0.mlp.down_proj"]), (beside, [])):
        names = {id(module): name for name, module in model.named_modules()}
        linears = {name for name, module in model.named_modules() if type(module) is nn.Linear and name.endswith(ends)}
        found = {names[id(linear)] for linear in float8._linears(model)}
        assert found == linears.difference(left) and len(found) == 7 * len(base.model.layers) - len(left)


def test_nothing_to_multiply():
    """A base whose layers are no `torch.nn.Linear` is refused."""
    model = get_peft_model(FAMILIES["gpt2"].make(), copy(CONFIGS["sparsek"]))
    with pytest.raises(ValueError, match=r"'fp8' needs a base with torch.nn.Linear layers .* multiples of 16"):
        train(model, **FP8)


def test_resume_and_checkpointing(tmp_path, monkeypatch):
    """A resumed run in fp8 is the run, with gradient checkpointing too, and a stopped one leaves the base as it was."""
    settings = {**FP8, "steps": 4, "warm_start_steps": 2, "output_dir": str(tmp_path), "checkpoint_every": 1}
    whole = make_model()
    expected = train(whole, **{**settings, "output_dir": None, "checkpoint_every": 0})
    save = checkpoint.save

    def stop_after_3(output, step, *args):
        save(output, step, *args)
        if step == 3:
            raise KeyboardInterrupt

    stopped = make_model()
    linears = described(stopped)
    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(checkpoint, "save", stop_after_3)
        train(stopped, **settings)
    assert described(stopped) == linears
    assert checkpoint.latest(tmp_path).name == "step-000003"
    resumed = make_model()
    metrics = train(resumed, **settings, resume=True, gradient_checkpointing=True)
    assert losses(metrics) == pytest.approx(losses(expected), rel=1e-6)
    after, final = learned(resumed), learned(whole)
    for name in final:
        torch.testing.assert_close(after[name], final[name], rtol=1e-5, atol=1e-7)


def test_command_line(tmp_path):
    """`hf-sparse finetune --mixed-precision fp8`, from a YAML file too, and its `--dry-run`."""
    adapter, text = tmp_path / "adapter", tmp_path / "text.txt"
    text.write_text("def twice(number):\n    return 2 * number\n" * 60)
    (tmp_path / "run.yaml").write_text("mixed_precision: fp8\nsteps: 1\nwarm-start-steps: 0\nlength: 64\n")

    def run(*arguments):
        done = CliRunner().invoke(cli.app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        return done.output

    run("patch", CHECKPOINT, "--k", 4, "--window", 4, "--sinks", 1, "--output", adapter)
    finetune = ("finetune", adapter, "--text", text, "--device", "cpu")
    options = ("--steps", 1, "--warm-start-steps", 0, "--length", 64)
    assert "nothing was written" in run(*finetune, *options, "--mixed-precision", "fp8", "--dry-run")
    run(*finetune, "--config", tmp_path / "run.yaml")
    assert '"mixed_precision": "fp8"' in (adapter / "finetune.json").read_text()


def test_fsdp2(tmp_path):
    """Two processes that share the base by FSDP2 train in fp8 what one does, but for the rounding of other batches."""
    launch = runpy.run_path(str(TESTS / "finetune" / "test_processes.py"))["launch"]
    launch(__file__, tmp_path, engine="fsdp2")
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["losses"] == other["losses"] and max(one["share"], other["share"]) < 0.51
    alone = make_model()
    expected = train(alone, **FP8, warm_start_steps=2, steps=4)
    assert one["losses"] == pytest.approx(losses(expected), rel=0.05)
    assert all(torch.equal(one["learned"][name], other["learned"][name]) for name in one["learned"])


if __name__ == "__main__":
    from hf_sparse.finetune.processes import PartialState

    model = make_model()
    metrics = train(model, **FP8, warm_start_steps=2, steps=4, batch_size=1)
    rank = PartialState().process_index
    content = {"losses": losses(metrics), "share": metrics["base_share"], "learned": learned(model)}
    torch.save(content, Path(sys.argv[1]) / f"{rank}.pt")
