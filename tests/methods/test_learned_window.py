"""A method from outside the package goes all the way, with no edit outside its folder `learned_window`."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import hf_sparse
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.report import write_report
from hf_sparse.core import registry
from hf_sparse.core.cache import GrowingCacheLayer
from hf_sparse.core.layer import AttentionShape
from hf_sparse.errors import DataError
from hf_sparse.evaluation import evaluate, tables
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.patches import sparse_layers
from hf_sparse.workflow import create_adapter

FOLDER = Path(__file__).parent / "learned_window"
ROOT = Path(__file__).parents[2]
TOKENS = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def method():
    """The module that registers the method, which other tests do not see registered."""
    with pytest.MonkeyPatch.context() as patching:
        patching.syspath_prepend(str(FOLDER.parent))
        patching.setattr(registry, "_METHODS", registry.registered_methods())
        yield import_module(f"{FOLDER.name}.method")


def set_widths(model: nn.Module, *widths: float) -> None:
    with torch.no_grad():
        for layer in sparse_layers(model):
            layer.window_widths[layer.active].log_width.copy_(torch.tensor(widths).log())


def test_nothing_outside_its_folder_knows_it():
    """No source, template or metadata of the package has a line for it."""
    files = [path for folder in ("hf_sparse", "patches", "finetune") for path in (ROOT / folder).rglob("*.*")]
    sources = [path for path in files if path.suffix in (".py", ".jinja")]
    assert len(sources) > 200
    for path in [*sources, ROOT / "pyproject.toml", ROOT / "Makefile"]:
        assert "learned_window" not in path.read_text("utf-8").lower(), path


def test_it_is_registered_like_any_other(method):
    entry = registry.method_of(method.WindowConfig())
    assert entry.name == "window" and entry.layer is method.WindowAttention
    layer = entry.layer.for_shape(AttentionShape(32, 4, 2, 8, layer=0))
    layer.add_adapter("default", method.WindowConfig(first_width=5))
    assert type(layer.cache_layer()) is GrowingCacheLayer
    assert [name for name, _ in layer.named_parameters()] == ["window_widths.default.log_width"]
    assert layer.widths.tolist() == pytest.approx([5.0] * 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_that_of_the_windows(method, causal, padded):
    layer = method.WindowAttention(AttentionShape(32, 4, 2, 8, layer=0, causal=causal))
    layer.add_adapter("default", method.WindowConfig())
    layer.eval()
    widths = [1.0, 2.5, 6.5, 100.0]  # none but 1 is whole: exp(log(7)) is more or less than 7, as the CPU rounds
    with torch.no_grad():
        layer.window_widths["default"].log_width.copy_(torch.tensor(widths).log())
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    valid = torch.ones(2, 9, dtype=torch.bool)
    if padded:
        valid[0, :3] = False
    result = layer.attend(
        query, key, value, hidden_states=None, valid=valid if padded else None, cache=None, scaling=0.3
    )
    assert torch.isfinite(result).all()
    for row, head, place in ((r, h, t) for r in range(2) for h in range(4) for t in range(9) if valid[r, t]):
        seen = [
            other
            for other in range(9)
            if valid[row, other] and abs(place - other) < widths[head] and (other <= place or not causal)
        ]
        weights = (0.3 * key[row, head // 2, seen] @ query[row, head, place]).softmax(0)
        torch.testing.assert_close(result[row, head, place], weights @ value[row, head // 2, seen])


def test_generation_goes_on_from_the_cache(method, tiny_llama):
    model = hf_sparse.patch(tiny_llama(), method.WindowConfig())
    model.eval()
    set_widths(model, 2.0, 5.0, 9.0, 50.0)
    with torch.no_grad():
        whole = model(TOKENS).logits
        assert not torch.allclose(whole, tiny_llama()(TOKENS).logits, atol=1e-3)
        first = model(TOKENS[:, :30], use_cache=True)
        logits, cache = [first.logits], cache_of(first)
        for token in TOKENS[:, 30:].split(1, dim=1):
            logits.append(model(token, **with_cache(cache)).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-5)


def test_an_encoder_and_a_text_within_the_windows(method, tiny_bert):
    model, base = hf_sparse.patch(tiny_bert("BertModel"), method.WindowConfig(first_width=40)), tiny_bert("BertModel")
    tokens = TOKENS.clamp(min=5)
    with torch.no_grad():
        same = model(tokens).last_hidden_state, base(tokens).last_hidden_state
        torch.testing.assert_close(*same, rtol=0, atol=1e-5)
    set_widths(model, 2.0, 2.0, 2.0, 2.0)
    result = evaluate(model, tokens, progress=False)
    assert result["method"] == "window" and result["embedding_similarity"]["learned"] < 0.999


@pytest.fixture
def trained(method, tiny_llama):
    """A model, and the metrics of its training."""
    model = get_peft_model(tiny_llama(), method.WindowConfig(first_width=8, lora_rank=1))
    settings = {"steps": 4, "learning_rate": 0.1, "warmup_steps": 0, "width_price": 100.0, "progress": False}
    return model, finetune(model, TOKENS, FinetuneConfig(**settings))


def test_training_moves_the_widths_and_nothing_of_the_base(trained, tiny_llama):
    model, metrics = trained
    assert metrics["trained"] == "widths and LoRA" and metrics["settings"]["width_price"] == 100
    assert [row["stage"] for row in metrics["history"]] == ["distill"] * 4
    assert all((layer.widths < 8).all() for layer in sparse_layers(model))  # they have a price
    with torch.no_grad(), model.disable_adapter():
        model.cpu()  # training leaves it on a GPU
        assert torch.equal(model(TOKENS).logits, tiny_llama()(TOKENS).logits)


def test_without_a_price_narrow_windows_grow(method, tiny_llama):
    model = get_peft_model(tiny_llama(), method.WindowConfig(first_width=2))
    finetune(model, TOKENS, FinetuneConfig(steps=4, learning_rate=0.1, warmup_steps=0, width_price=0, progress=False))
    assert sum(layer.widths.mean().item() for layer in sparse_layers(model)) > 2 * len(sparse_layers(model))


def test_settings_of_other_methods_are_refused(method, tiny_llama):
    model = get_peft_model(tiny_llama(), method.WindowConfig())
    with pytest.raises(ValueError, match="graph_rows: no setting for Learned window"):
        finetune(model, TOKENS, FinetuneConfig(graph_rows=3))
    with pytest.raises(ValueError, match="Learned window has no objective 'graph'; choose one of distill, lm"):
        finetune(model, TOKENS, FinetuneConfig(objective="graph"))
    with pytest.raises(ValueError, match="'slots' is an option of sparsek: a window model"):
        evaluate(model, TOKENS, slots=[9])


def test_saved_and_loaded_bit_for_bit(trained, tiny_llama, tmp_path):
    model, _ = trained
    model.cpu().save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(tiny_llama(), tmp_path),
        hf_sparse.from_pretrained(tmp_path, base_model=tiny_llama()),
    ):
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert "method `window`" in (tmp_path / "README.md").read_text()


def test_measured_against_dense_attention(trained):
    model, _ = trained
    result = evaluate(model, TOKENS, speed_tokens=4, progress=False)
    assert (result["method"], result["metric"]) == ("window", "perplexity")
    assert list(result["perplexity"]) == list(result["divergence"]) == ["dense", "learned"]
    assert result["divergence"]["learned"] > result["divergence"]["dense"] == 0
    assert result["kv_bytes"]["sparse"] == result["kv_bytes"]["dense"]  # the cache keeps every key
    (table,) = tables(result)
    assert table.row_count == 2


def test_the_card_shows_no_measurement_of_another_method(method, tmp_path):
    create_adapter("demo", method.WindowConfig(), tmp_path / "adapter")
    adapter = AdapterFolder(tmp_path / "adapter")
    with pytest.raises(DataError, match=r"eval\.json is of the method 'sparsefinder', but the adapter is of 'window'"):
        adapter.write_repo(evaluation={"method": "sparsefinder"})


PROGRAM = """
import sys
from hf_sparse.cli import app
from hf_sparse.cli.patch import METHODS

assert "torch" not in sys.modules and list(METHODS) == ["sparsefinder", "sparsek", "window"]
for command in sys.stdin.read().splitlines():
    app(command.split(), standalone_mode=False)
"""


@pytest.fixture
def fresh_python(hub_env, tmp_path):
    """Run a program in a fresh interpreter that finds the package; `installed` as `pip install` would leave it."""
    site = tmp_path / "site"
    information = site / "learned_window-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: learned-window\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[hf_sparse.methods]\nwindow = learned_window\n")

    def run(program: str, *, installed: bool = False, stdin: str = "") -> str:
        paths = [str(FOLDER.parent), *([str(site)] if installed else []), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**hub_env, "PYTHONPATH": ":".join(paths)}
        # As the console script: hf_sparse imports no torch before a verb begins its work.
        script = tmp_path / "hf-sparse"
        script.write_text(program)
        done = subprocess.run(
            [sys.executable, script], cwd=tmp_path, env=environment, input=stdin, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_all_verbs_of_the_command_line(method, fresh_python, hub, tmp_path):
    """Patch, train, measure, report and publish, with the package installed; then load what was published."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Sentence {number} is about {number * 7 % 31} windows. " for number in range(400)))
    repo = f"{hub.user}/learned-window"
    commands = [
        "patch demo --method window --first-width 8 --output adapter",
        f"finetune adapter --text {text} --length 64 --steps 2 --width-price 0.5 --device cpu",
        f"eval adapter --text {text} --length 64 --chunks :2 --device cpu",
        "eval adapter --task passkey --task-lengths 96 --task-samples 1 --device cpu",
        "report adapter",
        f"push adapter {repo}",
    ]
    said = fresh_python(PROGRAM, installed=True, stdin="\n".join(commands))
    assert "windows of 8 keys before training" in said  # what `attended` of its settings tells
    assert "2 steps on" in said and f"pushed adapter to {hub.endpoint}/{repo}" in said.replace("\n", "")
    folder = tmp_path / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "contenders.png",
        "eval.json",
        "figures",
        "finetune.json",
        "finetune.jsonl",
        "report.html",
    }
    evaluation = json.loads((folder / "eval.json").read_text())
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    assert "|---|---:|---:|\n| dense (all keys) | " in card
    for value in evaluation["perplexity"].values():
        assert f"{value:.2f}" in card and f"{value:.2f}" in page
    assert "import learned_window.method" in card and "| first_width | 8 |" in card and "| width_price | 0.5 |" in card
    assert list(evaluation["tasks"]) == ["passkey"] and "scores in `eval.json`: passkey" in card and ": passkey" in page
    published = hf_sparse.from_pretrained(repo)
    here = hf_sparse.from_pretrained(folder)
    tokens = TOKENS[:1]
    with torch.no_grad():
        assert torch.equal(published(tokens).logits, here(tokens).logits)
    with pytest.raises(DataError, match="a report on a window adapter shows no text"):
        write_report(folder, text.read_text(), length=64, device="cpu")


LOADING = """
import hf_sparse, torch
from hf_sparse.errors import HubError

try:
    hf_sparse.from_pretrained("saved")
except HubError as error:
    print(error)
import learned_window.method
model = hf_sparse.from_pretrained("saved")
with torch.no_grad():
    torch.save(model(torch.arange(40)[None]).logits, "logits.pt")
"""


@pytest.mark.full  # test_all_verbs_of_the_command_line imports the module in a fresh interpreter too
def test_a_fresh_interpreter_that_imports_the_module_loads_it(method, fresh_python, tmp_path):
    model = create_adapter("demo", method.WindowConfig(first_width=3), tmp_path / "saved")
    assert "saved is an adapter of type HF_SPARSE_LEARNED_WINDOW, expected" in fresh_python(LOADING)
    with torch.no_grad():
        expected = model.eval()(torch.arange(40)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
