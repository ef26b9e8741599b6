"""The experiment runner: every setting can be trained, no run is repeated, the table says what the lines hold."""

import json
import sys
from pathlib import Path

import pytest
import torch

from hf_sparse import SparseKConfig
from hf_sparse.finetune import FinetuneConfig

FOLDER = Path(__file__).parents[2] / "benchmarks" / "learning"


@pytest.fixture
def sweep(monkeypatch, tiny_llama):
    """The runner on a tiny model and text, and a call of its command line."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("sweep", "settings", "table"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import sweep

    recipe = sweep.Recipe(
        adapter={"k": 6, "window": 8, "sinks": 2},
        training={"steps": 3, "warm_start_steps": 1, "batch_size": 2, "learning_rate": 1e-2},
        length=192,
        evaluation_length=64,
        evaluation_slots=[16, 32],
    )
    base = tiny_llama().requires_grad_(False)
    tokens = torch.randint(0, 64, (6, 192), generator=torch.Generator().manual_seed(2))
    monkeypatch.setitem(sweep.RECIPES, "demo", recipe)
    monkeypatch.setattr(sweep, "load", lambda *_: (base, None))
    monkeypatch.setattr(sweep, "texts", lambda *_: (tokens, tokens[:2, :64]))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sweep.py", "--device", "cpu", *map(str, arguments)])
        sweep.main()

    sweep.call = call
    yield sweep
    for name in ("sweep", "settings", "table"):
        sys.modules.pop(name, None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_setting_is_valid_and_none_is_another(sweep):
    for recipe in sweep.RECIPES.values():
        seen = {}
        for name in sweep.SETTINGS:
            settings = sweep._settings(recipe, name, seed=0, steps=None)
            SparseKConfig(**settings["adapter"])
            FinetuneConfig(**settings["training"])
            if not sweep._same_run(recipe, name) or name == "recipe":
                seen.setdefault(json.dumps(settings, sort_keys=True), []).append(name)
        assert all(len(names) == 1 for names in seen.values()), seen


def test_runs_are_measured_and_not_repeated(sweep, monkeypatch, tmp_path):
    output = tmp_path / "runs.jsonl"
    wanted = ("--output", output, "--only", "dense", "recency", "recipe", "rate-double", "shorter", "--seeds", 0, 1)
    sweep.call(*wanted)
    found = lines(output)
    names = ["dense", "recency", "recipe", "rate-double", "shorter", "recipe", "rate-double", "shorter"]
    assert [line["name"] for line in found] == names
    assert [line["seed"] for line in found] == [None, None, 0, 0, 0, 1, 1, 1]
    dense, recency, recipe, double, shorter = found[:5]
    assert dense["quality"]["16"]["divergence"] == 0 < recipe["quality"]["16"]["divergence"]
    assert recency["quality"]["32"]["divergence"] < recency["quality"]["16"]["divergence"]
    assert double["settings"]["training"]["learning_rate"] == 2e-2 and recipe["parameters"] == 2 * 2 * (32 + 1)
    assert shorter["settings"]["length"] == 96 and shorter["tokens"] == recipe["tokens"]
    assert recipe["quality"] != found[5]["quality"]
    assert not list(tmp_path.glob("runs.partial/*"))

    monkeypatch.setattr(sweep, "finetune", lambda *_: pytest.fail("it was done already"))
    sweep.call(*wanted)
    assert lines(output) == found
    with pytest.raises(SystemExit, match=r"holds recipe \(seed 0\) with other settings"):
        sweep.call("--output", output, "--only", "recipe", "--steps", 4)
    with pytest.raises(SystemExit, match="no setting magic; there are dense, recency, recipe"):
        sweep.call("--output", output, "--only", "magic")


def test_settings_combine_and_adapters_are_kept(sweep, tmp_path):
    shares = tmp_path / "shares.json"
    shares.write_text(json.dumps({"shares": [0.5, 1.5]}))
    name = "rate-double+support-8+shares"
    sweep.call("--output", tmp_path / "runs.jsonl", "--only", name, "--shares", shares, "--adapters", tmp_path / "kept")
    (line,) = lines(tmp_path / "runs.jsonl")
    assert line["settings"]["adapter"] == {"k": 6, "window": 8, "sinks": 2, "support": 8, "layer_shares": [0.5, 1.5]}
    assert line["settings"]["training"]["learning_rate"] == 2e-2
    config = SparseKConfig.from_pretrained(tmp_path / "kept" / name)
    assert config.layer_shares == [0.5, 1.5] and (tmp_path / "kept" / name / "finetune.json").exists()
    sweep.SETTINGS.pop("shares")


def test_a_stopped_run_goes_on(sweep, monkeypatch, tmp_path):
    outputs = [tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"]
    options = ("--only", "recipe", "--steps", 25)
    sweep.call("--output", outputs[0], *options)
    real = sweep.finetune

    def stop(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "finetune", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.call("--output", outputs[1], *options)
    assert not outputs[1].exists() and [p.name for p in tmp_path.glob("stopped.partial/*")] == ["recipe-0"]
    monkeypatch.setattr(sweep, "finetune", real)
    sweep.call("--output", outputs[1], *options)
    whole, stopped = (lines(path)[0]["quality"] for path in outputs)
    assert whole == stopped and not list(tmp_path.glob("stopped.partial/*"))


def test_table(sweep, tmp_path):
    def line(name, seed, value):
        trained = {} if seed is None else {"parameters": 1234, "seconds": 10.0 * value}
        quality = {"16": {"perplexity": value, "divergence": value / 10}}
        return {"model": "demo", "name": name, "seed": seed, "quality": quality, **trained}

    runs = tmp_path / "runs.jsonl"
    found = [line("dense", None, 2.0), line("recipe", 0, 4.0), line("recipe", 1, 5.0), line("lm-1", 0, 3.0)]
    runs.write_text("".join(json.dumps(one) + "\n" for one in found))
    document = tmp_path / "log.md"
    document.write_text("before\n<!-- table: demo -->\nold\n<!-- end -->\nafter\n")
    sweep.call("--output", runs, "--table", document)
    rows = document.read_text().splitlines()
    assert rows[:2] == ["before", "<!-- table: demo -->"] and rows[-2:] == ["<!-- end -->", "after"]
    assert rows[2] == "| setting | what | perplexity, 16 slots | KL, 16 slots | parameters | training, s | seeds |"
    assert rows[4:7] == [
        "| `dense` | all keys | 2.000 | 0.2000 |  |  |  |",
        "| `lm-1` | plus 1 cross-entropy | 3.000 | 0.3000 | 1,234 | 30 | 1 |",
        "| `recipe` | the recipe | 4.500 ± 0.500 | 0.4500 ± 0.0500 | 1,234 | 45 | 2 |",
    ]
    document.write_text("no place\n")
    with pytest.raises(SystemExit, match="no place for the table of demo"):
        sweep.call("--output", runs, "--table", document)
