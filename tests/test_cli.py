"""The command line: each verb end to end on a tiny model, and every mistake one line, exit code 1, nothing written."""

import inspect
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import hf_sparse
from hf_sparse import cli, workflow
from hf_sparse.cli.push import push
from hf_sparse.errors import DataError
from hf_sparse.methods.sparsek.evaluation import CONTENDERS, SparseKEvaluation, contenders
from hf_sparse.texts import read_dataset

pytestmark = pytest.mark.usefixtures("blank_pictures")

VOCABULARY = 64
BUDGET = ["--k", "4", "--window", "4", "--sinks", "1"]
SLOTS, LENGTH = 9, 96
QUICK = ["--steps", "2", "--warm-start-steps", "1", "--length", str(LENGTH), "--device", "cpu"]

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def succeed(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments) -> str:
    """The one line on stderr of a command that fails with exit code 1 and shows no traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.output
    assert result.stderr.rstrip().endswith(errors[0])
    return errors[0]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llama) -> Path:
    """Make a model with its tokenizer, in which every word is one token, and an adapter of it: `base` and `adapter`."""
    root = tmp_path_factory.mktemp("made")
    folder = root / "base"
    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    tiny_llama(vocab_size=VOCABULARY).save_pretrained(folder)
    succeed("patch", folder, *BUDGET, "--output", root / "adapter")
    return root


@pytest.fixture
def base(made, tmp_path) -> Path:
    return shutil.copytree(made / "base", tmp_path / "base")


@pytest.fixture
def text(tmp_path) -> Path:
    generator = random.Random(0)
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{generator.randrange(VOCABULARY)}" for _ in range(5 * LENGTH)))
    return path


@pytest.fixture
def adapter(made, tmp_path, base) -> Path:
    folder = shutil.copytree(made / "adapter", tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(made / "base"), str(base)))
    return folder


class TestPatch:
    def test_writes_an_untrained_adapter(self, tmp_path, base):
        folder = tmp_path / "new" / "adapter"
        shown = succeed(
            "patch",
            base,
            *BUDGET,
            "--layers",
            "1",
            "--scorer",
            "mlp",
            "--scorer-hidden-size",
            "8",
            "--support",
            "0",
            "--layer-shares",
            "0.5,1.5",
            "--output",
            folder,
        )
        assert set(files(folder)) == ADAPTER
        config = PeftConfig.from_pretrained(str(folder))
        assert (config.k, config.window, config.sinks, config.slots) == (4, 4, 1, SLOTS)
        assert (config.layers, config.scorer, config.support) == ([1], "mlp", None)
        assert (config.scorer_hidden_size, config.layer_shares) == (8, [0.5, 1.5])
        assert config.base_model_name_or_path == str(base)
        trainable = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
        assert f"{trainable:,} trainable parameters" in shown
        assert len({(folder / name).stat().st_mode for name in ADAPTER}) == 1  # who may read one may read both

    def test_stores_the_whole_path_of_the_base(self, tmp_path, base, monkeypatch):
        monkeypatch.chdir(tmp_path)
        succeed("patch", "./base", *BUDGET, "--output", "adapter")
        assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    def test_seed(self, tmp_path, base, adapter):
        weights = files(adapter)["adapter_model.safetensors"]
        for seed, same in ((0, True), (1, False)):
            succeed("patch", base, *BUDGET, "--seed", seed, "--output", tmp_path / f"seed-{seed}")
            assert (files(tmp_path / f"seed-{seed}")["adapter_model.safetensors"] == weights) == same

    def test_a_folder_that_is_not_empty(self, base, adapter):
        (adapter / "eval.json").write_text("{}")
        (adapter / "checkpoints" / "step-000001").mkdir(parents=True)
        (adapter / "notes.txt").write_text("mine")
        before = files(adapter)
        assert "not an empty folder; choose another, or use --force" in fail("patch", base, "--output", adapter)
        assert files(adapter) == before
        succeed("patch", base, *BUDGET, "--seed", "7", "--output", adapter, "--force")
        assert set(files(adapter)) == ADAPTER | {"notes.txt"} and not (adapter / "checkpoints").exists()
        assert files(adapter)["adapter_model.safetensors"] != before["adapter_model.safetensors"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--k", "0"], "SparseKConfig.k must be an integer of at least 1, got 0"),
            (["--window", "0"], "SparseKConfig.window must be an integer of at least 1, got 0"),
            (["--sinks", "-1"], "SparseKConfig.sinks must be an integer of at least 0, got -1"),
            (["--lora-rank", "-1"], "SparseKConfig.lora_rank must be an integer of at least 0, got -1"),
            (["--lora-rank", "17"], "lora_rank must be at most 16, the width of k_proj, got 17"),
            (["--layers", "0,9"], "layers [9] do not exist: the model has 2 attention layers"),
        ],
    )
    def test_refuses(self, tmp_path, base, options, message):
        assert message in fail("patch", base, *options, "--output", tmp_path / "out" / "adapter")
        assert not (tmp_path / "out").exists()

    def test_refuses_what_is_no_base_model(self, tmp_path, adapter):
        assert "the base model 'no-such/model' cannot be read" in fail(
            "patch", "no-such/model", "--output", tmp_path / "out"
        )
        for nowhere in ("./nowhere", "~/nowhere", "a/b/c"):
            message = fail("patch", nowhere, "--output", tmp_path / "out")
            assert f"the base model '{nowhere}' cannot be read: expected a folder that exists, or an id on" in message
        assert "holds an adapter itself: name the model below" in fail("patch", adapter, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_refuses_a_damaged_base_model(self, tmp_path, base):
        weights = base / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        assert "cannot be loaded" in fail("patch", base, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestFinetune:
    def test_writes_back(self, adapter, text):
        before = files(adapter)
        (adapter / "eval.json").write_text("{}")  # of the scorers before
        shown = succeed("finetune", adapter, "--text", text, *QUICK)
        assert "eval.json was of the adapter before, and is gone: `hf-sparse eval` measures this one" in shown
        after = files(adapter)
        assert set(after) == ADAPTER | {"finetune.json", "finetune.jsonl", "README.md"}
        assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
        metrics = json.loads(after["finetune.json"])
        assert [row["stage"] for row in metrics["history"]] == ["attention", "distill", "distill"]
        assert metrics["settings"]["chunks"] == 5
        assert (
            f"3 steps on {3 * 2 * LENGTH} tokens" in shown
            and f"{metrics['history'][-1]['loss']:.4f} (distill)" in shown
        )

    def test_options_arrive(self, adapter, text, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text(text.read_text())
        options = ["--objective", "lm", "--batch-size", "1", "--gradient-accumulation-steps", "2", "--seed", "3"]
        options += ["--learning-rate", "0.5", "--chunks", "2:6", "--checkpoint-every", "1", "--final-scale", "2"]
        options += [
            "--warmup-steps",
            "1",
            "--weight-decay",
            "0.1",
            "--max-grad-norm",
            "0.5",
            "--gradient-checkpointing",
        ]
        succeed("finetune", adapter, "--text", text, "--text", other, *QUICK, *options)
        settings = json.loads((adapter / "finetune.json").read_text())["settings"]
        expected = {"objective": "lm", "batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.5}
        expected |= {"final_scale": 2.0, "warmup_steps": 1, "weight_decay": 0.1, "max_grad_norm": 0.5}
        assert settings.items() >= {**expected, "seed": 3, "steps": 2, "warm_start_steps": 1, "chunks": 4}.items()

    def test_dataset(self, adapter, text, tmp_path, monkeypatch):
        folder = tmp_path / "dataset"
        folder.mkdir()
        rows = [{"body": text.read_text()}, {"body": ""}, {"body": text.read_text()}]
        (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        succeed("finetune", adapter, "--dataset", folder, "--column", "body", *QUICK)
        assert json.loads((adapter / "finetune.json").read_text())["settings"]["chunks"] == 10
        one = shutil.copy(folder / "train.jsonl", tmp_path / "one [1].jsonl")  # the name of a file, and no pattern
        succeed("finetune", adapter, "--dataset", one, "--column", "body", *QUICK)
        assert json.loads((adapter / "finetune.json").read_text())["settings"]["chunks"] == 10
        assert "dataset" not in json.loads((adapter / "finetune.json").read_text())  # a path means nothing elsewhere
        monkeypatch.setattr("hf_sparse.texts.read_dataset", lambda *part: text.read_text())
        succeed("finetune", adapter, "--dataset", "me/books", "--split", "train[:1%]", *QUICK)
        source = {"name": "me/books", "split": "train[:1%]", "column": "text"}
        assert json.loads((adapter / "finetune.json").read_text())["dataset"] == source
        assert "datasets:\n- me/books" in (adapter / "README.md").read_text()
        monkeypatch.undo()
        assert "has no column 'text', it has body" in fail("finetune", adapter, "--dataset", folder, *QUICK)
        (tmp_path / "broken.jsonl").write_text('{"text": "w1"}\n{"te')
        with pytest.raises(DataError, match=r"broken\.jsonl' cannot be loaded: .*JSON"):
            read_dataset(str(tmp_path / "broken.jsonl"))
        (tmp_path / "chat.jsonl").write_text(json.dumps({"text": [{"role": "user", "content": "w1"}]}))
        assert "apply_chat_template" in fail("finetune", adapter, "--dataset", tmp_path / "chat.jsonl", *QUICK)
        assert "cannot be loaded" in fail("finetune", adapter, "--dataset", folder, "--split", "dev", *QUICK)

    def test_resumes(self, adapter, text, tmp_path, monkeypatch):
        whole = shutil.copytree(adapter, tmp_path / "whole")
        run = ["--text", text, *QUICK, "--checkpoint-every", "1"]
        succeed("finetune", whole, *run)

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        # The last thing before anything is written back.
        with monkeypatch.context() as context:
            context.setattr(workflow, "save_adapter", interrupted)
            result = invoke("finetune", adapter, *run)
        assert result.exit_code == 130
        assert "the same command with --resume continues from step-000003" in result.stderr
        succeed("finetune", adapter, *run, "--resume")
        assert files(adapter)["adapter_model.safetensors"] == files(whole)["adapter_model.safetensors"]

    def test_interrupted_without_checkpoints(self, adapter, text, monkeypatch):
        before = files(adapter)

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(workflow, "finetune", interrupted)
        result = invoke("finetune", adapter, "--text", text, *QUICK)
        assert result.exit_code == 130 and "with --checkpoint-every N a run can be resumed" in result.stderr
        assert files(adapter) == before

    def test_refuses(self, adapter, text, tmp_path):
        before = files(adapter)
        empty = tmp_path / "empty.txt"
        empty.write_text(" \n")
        short = ["--text", text, *QUICK, "--length"]
        cases = [
            (["--text", text, *QUICK, "--length", "1000"], "has 480 tokens, fewer than one chunk of 1000"),
            ([*short, SLOTS], f"a budget of {SLOTS} slots"),
            (["--text", tmp_path / "none.txt"], "cannot read the text"),
            (["--text", empty], "holds no text"),
            (
                [*short, LENGTH, "--chunks", "7:9"],
                "expected some of the 5 chunks of the text, got 7:9: none",
            ),
            ([*short, LENGTH, "--steps", "0"], "steps must be an integer of at least 1, got 0"),
        ]
        for arguments, message in cases:
            assert message in fail("finetune", adapter, *arguments)
        assert files(adapter) == before

    def test_needs_one_source_of_text(self, adapter, text):
        for arguments in ([], ["--text", text, "--dataset", "name"]):
            result = invoke("finetune", adapter, *arguments)
            assert result.exit_code == 2 and "either --text FILE or --dataset NAME" in result.stderr


class TestDivide:
    def test_writes_shares_and_removes_what_measured_equal_ones(self, adapter, text):
        succeed("eval", adapter, "--text", text, "--length", LENGTH, "--device", "cpu", "--selection", "learned")
        succeed("report", adapter)
        (adapter / "figures" / "mine.png").write_bytes(b"mine")
        assert (adapter / "report.html").exists() and (adapter / "figures" / "quality.png").exists()
        weights = (adapter / "adapter_model.safetensors").read_bytes()
        shown = succeed("divide", adapter, "--text", text, "--length", LENGTH, "--device", "cpu")
        shares = PeftConfig.from_pretrained(str(adapter)).layer_shares
        assert len(shares) == 2 and sum(shares) == pytest.approx(2, abs=1e-3) and shares != [1.0, 1.0]
        assert f"0: {shares[0]:.2f}, 1: {shares[1]:.2f}" in shown
        assert not (adapter / "eval.json").exists() and "eval.json was of the adapter before, and is gone" in shown
        assert (adapter / "adapter_model.safetensors").read_bytes() == weights
        assert not (adapter / "report.html").exists()  # it showed that eval.json
        assert [path.name for path in (adapter / "figures").iterdir()] == ["mine.png"]
        succeed("finetune", adapter, "--text", text, *QUICK)
        assert PeftConfig.from_pretrained(str(adapter)).layer_shares == shares
        succeed("eval", adapter, "--text", text, "--length", LENGTH, "--device", "cpu", "--selection", "learned")
        card = (adapter / "README.md").read_text()
        assert f"a layer has {min(shares):.2f} to\n{max(shares):.2f} times as many" in card

    def test_among_heads(self, adapter, text):
        options = ["--text", text, "--length", LENGTH, "--device", "cpu"]
        succeed("divide", adapter, *options)
        shown = succeed("divide", adapter, *options, "--among", "heads")
        config = PeftConfig.from_pretrained(str(adapter))
        shares = config.head_shares
        heads = [share for row in shares for share in row]
        assert config.layer_shares is None and len(shares) == 2 and len(set(heads)) > 1
        assert sum(heads) / len(heads) == pytest.approx(1, abs=1e-3)
        assert f"0: {' '.join(f'{share:.2f}' for share in shares[0])}, 1: " in shown
        succeed("finetune", adapter, "--text", text, *QUICK)
        assert PeftConfig.from_pretrained(str(adapter)).head_shares == shares
        succeed("eval", adapter, *options, "--selection", "learned", "--selection", "h2o")
        card = " ".join((adapter / "README.md").read_text().split())
        assert f"a head has {min(heads):.2f} to {max(heads):.2f} times as many" in card
        succeed("divide", adapter, *options)
        assert PeftConfig.from_pretrained(str(adapter)).head_shares is None

    def test_refuses(self, adapter, tmp_path):
        short = tmp_path / "short.txt"
        short.write_text(" ".join(["w1"] * 40))
        error = fail("divide", adapter, "--text", short, "--length", 18, "--device", "cpu")
        assert "nothing is evicted: 18 slots cover the whole text of 18 tokens" in error


class TestUnpatch:
    def test_takes_the_layers_out_that_are_not_sparse(self, tmp_path, base, text):
        folder = tmp_path / "graph"
        succeed("patch", base, *GRAPH, "--lora-rank", "2", "--output", folder)
        succeed("finetune", folder, "--text", text, "--steps", "2", "--graph-steps", "1", *QUICK[4:])
        options = ["--text", text, "--length", LENGTH, "--device", "cpu", "--above", "0.9"]
        before = files(folder)
        shown = succeed("unpatch", folder, *options)
        assert "no layer is above 90%: nothing was changed" in shown and files(folder) == before
        weights = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in weights if name.endswith(".log_scale") and ".layers.0." in name)
        weights[name] -= 5  # next to no logit is left, and almost all keys have weight
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "finetune.json").unlink()
        assert "left dense: 0" in succeed("unpatch", folder, *options)
        assert PeftConfig.from_pretrained(str(folder)).layers == [1]
        left = load_file(folder / "adapter_model.safetensors")
        assert left.keys() == {name for name in weights if ".layers.1." in name} and left
        assert all((left[name] == weights[name]).all() for name in left)
        succeed("eval", folder, "--text", text, "--length", LENGTH, "--chunks", "0:1", "--device", "cpu")

    def test_refuses_an_adapter_of_another_method(self, adapter, text):
        error = fail("unpatch", adapter, "--text", text, "--length", LENGTH, "--device", "cpu")
        assert "holds a SparseK adapter, where all that are attended to have some" in error

    def test_refuses_a_checkpoint_that_was_trained_with_entmax(self, tmp_path, base, text):
        folder = tmp_path / "graph"
        succeed("patch", base, *GRAPH, "--entmax-native", "1.5", "--output", folder)
        error = fail("unpatch", folder, "--text", text, "--length", LENGTH, "--device", "cpu")
        assert "layers that are left dense attend by softmax" in error and "was trained with entmax" in error


class TestEval:
    def test_measures(self, adapter, text, tmp_path):
        copy = tmp_path / "copy.json"
        shown = succeed(
            "eval", adapter, "--text", text, "--length", LENGTH, "--chunks", "1:4", "--json", copy, "--device", "cpu"
        )
        result = json.loads((adapter / "eval.json").read_text())
        assert set(files(adapter)) == ADAPTER | {"eval.json", "quality.png", "README.md"}
        assert result["text"].items() >= {"name": "words.txt (chunks 1:4)", "chunks": 3, "length": LENGTH}.items()
        assert tuple(result["perplexity"]) == CONTENDERS and result["budget"]["slots"] == SLOTS
        for name, value in result["perplexity"].items():
            assert re.search(rf"{name} .*{value:.2f}", shown)
        assert json.loads(copy.read_text()) == result

    def test_dataset(self, adapter, text, tmp_path, monkeypatch):
        """A dataset is measured and reported as the same text from a file, and is called what it is."""
        quick = ["--length", LENGTH, "--device", "cpu"]
        succeed("eval", adapter, "--text", text, *quick, "--selection", "learned")
        of_file = json.loads((adapter / "eval.json").read_text())
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"body": text.read_text()}))
        succeed("eval", adapter, "--dataset", rows, "--column", "body", *quick, "--selection", "learned")
        result = json.loads((adapter / "eval.json").read_text())
        assert result["perplexity"] == of_file["perplexity"]
        assert result["text"] == of_file["text"] | {"name": "rows.jsonl (train)"}  # a path means nothing elsewhere
        monkeypatch.setattr("hf_sparse.texts.read_dataset", lambda *part: text.read_text())
        place = ["--dataset", "me/books", "--dataset-config", "old", "--split", "test"]
        succeed("eval", adapter, *place, *quick, "--selection", "learned")
        assert json.loads((adapter / "eval.json").read_text())["text"]["name"] == "me/books (old, test)"
        succeed("report", adapter, *place, *quick, "--chunks", ":1")
        assert "me/books (old, test) (chunks :1)" in (adapter / "report.html").read_text()
        monkeypatch.undo()
        for verb in ("eval", "report"):
            assert "has no column 'text', it has body" in fail(verb, adapter, "--dataset", rows, *quick)

    def test_names_what_it_measured_on_a_narrow_screen(self, adapter, text):
        options = ["--text", text, "--length", LENGTH, "--chunks", "0:1", "--slots", "5,6,7,8,9", "--device", "cpu"]
        arguments = [str(part) for part in ("eval", adapter, *options, "--selection", "key_difference")]
        result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "80"})
        assert result.exit_code == 0 and result.stdout.count(" key_difference ") == 2  # with the sweep

    def test_numbers_are_those_of_the_weights(self, adapter, text):
        quick = ["--length", LENGTH, "--selection", "dense", "--device", "cpu"]
        succeed("eval", adapter, "--text", text, *quick)
        weights = adapter / "adapter_model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)  # somebody's training
        before = files(adapter)
        tasks = ["--task", "passkey", "--task-samples", "1", "--task-lengths", "30"]
        for arguments in (["eval", adapter, *tasks, *quick], ["report", adapter]):
            assert "eval.json was measured with other weights than adapter_model.safetensors" in fail(*arguments)
        assert files(adapter) == before
        succeed("eval", adapter, "--text", text, *quick)

    def test_a_note_is_on_the_card(self, adapter, text):
        note = "The base model was quantised."
        quick = ["--text", text, "--length", LENGTH, "--selection", "dense", "--device", "cpu"]
        succeed("eval", adapter, *quick, "--note", note)
        assert note in (adapter / "README.md").read_text()
        succeed("eval", adapter, *quick)
        assert note not in (adapter / "README.md").read_text()

    def test_sweeps_what_is_asked_for(self, adapter, text):
        options = ["--slots", "5,20", "--selection", "dense", "--selection", "learned"]
        shown = succeed("eval", adapter, "--text", text, "--length", LENGTH, "--device", "cpu", *options)
        result = json.loads((adapter / "eval.json").read_text())
        assert list(result["perplexity"]) == list(result["divergence"]) == ["dense", "learned"]
        assert [entry["slots"] for entry in result["sweep"]] == [5, 20]
        for entry in result["sweep"]:
            value, apart = entry["perplexity"]["learned"], entry["divergence"]["learned"]
            assert f"{value:.2f} ({apart:.4f})" in shown
        assert "tasks" not in result

    def test_takes_some_chunks_of_a_long_text(self, adapter, text, monkeypatch):
        monkeypatch.setattr(SparseKEvaluation, "chunks", 2)
        quick = ["--text", text, "--length", LENGTH, "--selection", "dense", "--device", "cpu"]
        sums = {}
        for options, count in (([], 2), (["--chunks", ":"], 5), (["--chunks", "0:1"], 1), (["--chunks", "2:3"], 1)):
            succeed("eval", adapter, *quick, *options)
            result = json.loads((adapter / "eval.json").read_text())
            assert result["text"]["chunks"] == count
            sums[count] = sums.get(count, 0) + math.log(result["perplexity"]["dense"])
        assert sums[2] == pytest.approx(sums[1] / 2, rel=1e-5)  # chunks 0 and 2 of 0 to 4

    def test_tasks(self, adapter, text, tmp_path):
        questions = tmp_path / "qa.jsonl"
        questions.write_text(json.dumps({"input": "w1", "context": "w2 " * 99, "answers": ["w3"]}))
        quick = ["--selection", "learned", "--selection", "oracle", "--device", "cpu", "--task-samples", "1"]
        tasks = ["--task", "frequent_words", "--longbench", questions, "--task-lengths", "64,100", "--task-slots", "20"]
        assert "tasks are added to an eval.json" in fail("eval", adapter, *quick, *tasks)
        succeed("eval", adapter, "--text", text, "--length", LENGTH, "--device", "cpu")
        before = json.loads((adapter / "eval.json").read_text())
        shown = succeed("eval", adapter, *quick, *tasks, "--haystack", text)
        result = json.loads((adapter / "eval.json").read_text())
        assert set(result.pop("tasks")) == {"frequent_words, 20 slots", "longbench:qa, 20 slots"} and result == before
        assert "frequent_words, 20 slots: recall" in shown and "longbench:qa, 20 slots: F1" in shown
        # More tasks join the others; a text measured anew replaces everything.
        succeed("eval", adapter, *quick, "--task", "common_words", "--task-lengths", "90")
        tasks = json.loads((adapter / "eval.json").read_text())["tasks"]
        assert set(tasks) == {"frequent_words, 20 slots", "common_words", "longbench:qa, 20 slots"}
        assert tasks["common_words"]["settings"].items() >= {"samples": 1, "slots": SLOTS}.items()
        assert list(tasks["common_words"]["results"]) == ["learned"]  # the oracle cannot generate
        assert tasks["frequent_words, 20 slots"]["results"]["learned"]["lengths"] == [64, 100]
        assert tasks["frequent_words, 20 slots"]["settings"]["haystack"] == "words.txt"
        run = [*quick, "--task", "common_words, frequent_words", "--text", text, "--length", LENGTH]
        succeed("eval", adapter, *run)
        tasks = json.loads((adapter / "eval.json").read_text())["tasks"]
        assert list(tasks) == ["common_words", "frequent_words"]
        assert tasks["common_words"]["results"]["learned"]["lengths"] == [LENGTH // 2, LENGTH]

    def test_refuses_before_it_measures(self, adapter, text, tmp_path, monkeypatch):
        def fail_late(*args, **kwargs):
            pytest.fail("something was measured")

        monkeypatch.setattr(workflow, "evaluate", fail_late)
        broken = tmp_path / "qa.jsonl"
        broken.write_text("{}")
        cases = [
            (["--task", "chess"], "a task is one of passkey"),
            (["--task", "passkey", "--selection", "newest"], "selections must be among dense"),
            (["--task", "passkey", "--selection", "oracle"], "selections must be among dense"),
            (["--task", "passkey", "--task-lengths", "600"], "600 tokens are longer than the 512 positions"),
            (["--task", "passkey", "--task-lengths", SLOTS], f"budget of {SLOTS} slots covers a whole prompt"),
            (["--task", "passkey", "--task-slots", "2"], "with 1 sinks, slots must be at least 3, got 2"),
            (["--task", "passkey", "--task-samples", "0"], "samples must be at least 1, got 0"),
            (["--task", "passkey", "--haystack", tmp_path / "none.txt"], "cannot read the text"),
            (["--longbench", broken], "line 1 of"),
        ]
        for arguments, message in cases:
            assert message in fail("eval", adapter, "--text", text, "--length", LENGTH, *arguments)
        assert set(files(adapter)) == ADAPTER
        assert invoke("eval", adapter, "--text", text, "--slots", "many").exit_code == 2

    def test_refuses(self, adapter, text, tmp_path):
        before = files(adapter)
        cases = [
            (adapter, ["--slots", "20,99", "--length", LENGTH], "nothing is evicted: the budget of 99 slots"),
            (adapter, ["--slots", "2", "--length", LENGTH], "with 1 sinks, slots must be at least 3, got 2"),
            (adapter, ["--selection", "newest"], "selections must be among dense"),
            (adapter, ["--length", "1000"], "has 480 tokens, fewer than one chunk of 1000"),
            (adapter, ["--length", "0"], "length must be at least 2 tokens, got 0"),
            (adapter, ["--length", SLOTS], f"nothing is evicted: the budget of {SLOTS} slots"),
            (adapter, ["--length", LENGTH, "--batch-size", "0"], "batch_size must be at least 1, got 0"),
            (tmp_path / "missing", [], "missing is no folder; `hf-sparse patch MODEL --output"),
            (tmp_path, [], "is not a complete adapter"),
        ]
        for folder, arguments, message in cases:
            assert message in fail("eval", folder, "--text", text, *arguments)
        assert files(adapter) == before
        assert invoke("eval", adapter).exit_code == 2
        result = invoke("eval", adapter, "--text", text, "--json", tmp_path / "none" / "copy.json")
        shown = " ".join(result.stderr.replace("│", " ").split())  # the box may break the line anywhere
        assert result.exit_code == 2 and "is no folder" in shown

    def test_chunks_at_a_time_by_default(self, adapter, text, monkeypatch):
        seen, whole = [], workflow.evaluate

        def spy(*arguments, batch_size, **options):
            seen.append(batch_size)
            return whole(*arguments, batch_size=batch_size, **options)

        monkeypatch.setattr(workflow, "evaluate", spy)
        arguments = ["eval", adapter, "--text", text, "--length", LENGTH, "--selection", "dense", "--selection", "h2o"]
        for limit, expected in ((contenders.LOGITS, 8), (1, 1)):
            monkeypatch.setattr(contenders, "LOGITS", limit)
            assert invoke(*arguments).exit_code == 0 and seen[-1] == expected

    def test_no_such_device(self, adapter, text, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert "no CUDA device" in fail("eval", adapter, "--text", text, "--device", "cuda")


GRAPH = ["--method", "sparsefinder", "--tile", "16", "--window", "4", "--clusters", "4", "--length", str(LENGTH)]


class TestLora:
    @pytest.mark.parametrize("method", [BUDGET, GRAPH], ids=["sparsek", "sparsefinder"])
    def test_from_nothing_to_a_card(self, tmp_path, base, text, method):
        folder = tmp_path / "lora"
        succeed("patch", base, *method, "--lora-rank", "2", "--lora-alpha", "3", "--output", folder)
        config = PeftConfig.from_pretrained(str(folder))
        assert (config.lora_rank, config.lora_alpha) == (2, 3)
        sizes = {name: tensor.numel() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        lora = sum(size for name, size in sizes.items() if "_lora." in name)
        assert lora == 2 * 2 * (4 * 32 + 2 * 32 + 2 * 16)
        stages = ["--graph-steps", "1"] if method is GRAPH else ["--warm-start-steps", "1"]
        quick = ["--steps", "2", "--length", LENGTH, "--device", "cpu", *stages, "--lora-learning-rate", "0.01"]
        succeed("finetune", folder, "--text", text, *quick)
        training = json.loads((folder / "finetune.json").read_text())
        assert training["settings"]["lora_learning_rate"] == 0.01 and training["lora_parameters"] == lora
        succeed("eval", folder, "--text", text, "--length", LENGTH, "--chunks", "0:1", "--device", "cpu")
        card = " ".join((folder / "README.md").read_text().split())
        assert f"{lora:,} of the parameters are LoRA of rank 2" in card and f"{lora:,} of them LoRA's" in card
        assert "the outputs are those of the base model" not in card


class TestSparsefinder:
    @pytest.fixture
    def graph(self, tmp_path, base) -> Path:
        succeed("patch", base, *GRAPH, "--sparsity", "0.5", "--output", tmp_path / "graph")
        return tmp_path / "graph"

    def test_patch(self, graph):
        assert set(files(graph)) == ADAPTER
        config = PeftConfig.from_pretrained(str(graph))
        assert isinstance(config, hf_sparse.SparsefinderConfig)
        assert (config.tile, config.window, config.clusters, config.sparsity, config.length) == (16, 4, 4, 0.5, LENGTH)

    def test_graphs_of_tokens(self, tmp_path, base):
        succeed("patch", base, "--method", "sparsefinder", "--tile", "0", "--output", tmp_path / "graph")
        assert PeftConfig.from_pretrained(str(tmp_path / "graph")).tile is None

    @pytest.mark.parametrize(
        "method, option, message",
        [
            ("sparsefinder", ["--k", "4"], "--k is no option of sparsefinder: see 'Options of SparseK' in --help"),
            ("sparsek", ["--tile", "16"], "--tile is no option of sparsek: see 'Options of Sparsefinder' in --help"),
            ("sparsek", ["--no-learn-alpha"], "--learn-alpha is no option of sparsek"),
        ],
    )
    def test_options_of_the_other_method(self, tmp_path, base, method, option, message):
        result = invoke("patch", base, "--method", method, *option, "--output", tmp_path / "graph")
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
        assert not (tmp_path / "graph").exists()

    def test_settings_out_of_range(self, tmp_path, base):
        line = fail("patch", base, "--method", "sparsefinder", "--alpha", "1", "--output", tmp_path / "graph")
        assert "SparsefinderConfig.alpha must be above 1 and at most 2, got 1.0" in line
        assert not (tmp_path / "graph").exists()

    def test_from_nothing_to_a_report(self, graph, text, tmp_path):
        steps = ["--steps", "2", "--graph-steps", "2", "--graph-rows", "16", "--device", "cpu"]
        shown = succeed("finetune", graph, "--text", text, *steps)
        assert "trained adapter and finetune.json" in shown and f"{4 * LENGTH * 2:,} tokens" in shown
        measure = ["--chunks", "0:1", "--sparsity", "0.3,0.5", "--device", "cpu", "--json", tmp_path / "copy.json"]
        measure += ["--note", "The base model was quantised."]
        shown = succeed("eval", graph, "--text", text, *measure)
        for words in ("full entmax", "longformer", "oracle", "mass recall", "0.5*"):
            assert words in shown
        result = json.loads((graph / "eval.json").read_text())
        assert result == json.loads((tmp_path / "copy.json").read_text())
        assert result["method"] == "sparsefinder" and result["text"]["length"] == LENGTH
        assert [point["sparsity"] for point in result["points"]] == [0.3, 0.5]
        assert set(files(graph)) == ADAPTER | {
            "eval.json",
            "finetune.json",
            "finetune.jsonl",
            "pareto.png",
            "README.md",
        }
        assert "The base model was quantised." in (graph / "README.md").read_text()
        succeed("report", graph, "--text", text, "--device", "cpu")
        assert {"report.html", "graphs.json", "figures/graphs.png"} <= set(files(graph))
        succeed("finetune", graph, "--text", text, *steps)  # another adapter, not measured yet
        assert not {"eval.json", "pareto.png"} & set(files(graph))

    def test_selections(self, tmp_path, base, text):
        succeed("patch", base, *GRAPH, "--predictor", "bound", "--output", tmp_path / "bound")
        chosen = ["--selection", "predicted", "--selection", "oracle", "--chunks", "0:1", "--device", "cpu"]
        succeed("eval", tmp_path / "bound", "--text", text, *chosen, "--sparsity", "0.5", "--seed", "3")
        result = json.loads((tmp_path / "bound" / "eval.json").read_text())
        assert [list(point["results"]) for point in result["points"]] == [["predicted"], ["oracle"]]
        assert result["seed"] == 3
        for columns, widest in (("80", range(81)), (None, range(100, 161))):  # a narrow screen; a file or a pipe
            shown = CliRunner().invoke(cli.app, ["info", str(tmp_path / "bound")], env={"COLUMNS": columns}).stdout
            assert "oracle" in shown and "…" not in shown  # which would stand for digits
            assert max(map(len, shown.splitlines())) in widest

    @pytest.mark.parametrize(
        "verb, options, message",
        [
            ("eval", ["--stride", "16"], "stride is no option of sparsefinder, whose graphs"),
            ("eval", ["--task", "passkey"], "tasks compare contenders at a number of KV slots, got a Sparsefinder"),
            ("eval", ["--selection", "h2o"], "selections must be among predicted"),
            ("eval", ["--sparsity", "1.5"], "sparsities must be a list of numbers, at least 0 and below 1"),
            ("eval", [], "never fitted"),
            ("divide", [], "holds a Sparsefinder adapter, which has none"),
            ("unpatch", ["--above", "1.5"], "above must be a share above 0 and below 1, got 1.5"),
            ("unpatch", ["--above", "0.0001"], "no layer would be left: in each of 2 layers more than 0% of the keys"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else value[:10],
    )
    def test_refuses(self, graph, text, verb, options, message):
        before = files(graph)
        assert re.search(message, fail(verb, graph, "--text", text, *options, "--device", "cpu"))
        assert files(graph) == before

    @pytest.mark.parametrize(
        ("verb", "option"),
        [("finetune", ["--warm-start-steps", "3"]), ("finetune", ["--final-scale", "2"]), ("eval", ["--slots", "16"])],
    )
    def test_options_of_sparsek(self, graph, text, verb, option):
        result = invoke(verb, graph, "--text", text, *option)
        message = f"{option[0]} is no option of sparsefinder: see 'Options of SparseK' in --help"
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())

    @pytest.mark.parametrize("option", [["--sparsity", "0.5"], ["--seed", "0"]])
    def test_sparsities_are_not_for_sparsek(self, adapter, text, option):
        result = invoke("eval", adapter, "--text", text, *option)
        message = f"{option[0]} is no option of sparsek: see 'Options of Sparsefinder' in --help"
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
        result = invoke("eval", adapter, "--text", text, "--sparsity", "half")
        assert result.exit_code == 2 and "expected numbers such as 0.5,0.8" in result.output


class TestDamage:
    def test_a_folder_that_takes_no_files_is_told_before_the_work(self, adapter, text, monkeypatch):
        succeed("eval", adapter, "--text", text, "--length", LENGTH, "--selection", "learned")
        monkeypatch.setattr(workflow, "load_adapter", lambda *args, **kwargs: pytest.fail("the work began"))
        monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
        for verb in ("finetune", "divide", "unpatch", "eval", "report"):
            assert "adapter cannot be written to" in fail(verb, adapter, "--text", text)
        monkeypatch.setattr(workflow, "load_base", lambda *args, **kwargs: pytest.fail("the work began"))
        new = adapter.parent / "new" / "adapter"
        assert f"{new} cannot be made, since {adapter.parent} takes no new" in fail("patch", "demo", "--output", new)

    def test_weights(self, adapter, text):
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        before = files(adapter)
        for verb in ("eval", "finetune"):
            assert "adapter_model.safetensors of" in fail(verb, adapter, "--text", text)
        assert "is damaged" in fail("push", adapter, "tester/damaged")
        assert files(adapter) == before

    def test_configuration(self, adapter, text):
        (adapter / "adapter_config.json").write_text("{")
        assert "adapter_config.json of" in fail("eval", adapter, "--text", text)

    def test_base_is_gone(self, adapter, base, text):
        base.rename(base.with_name("elsewhere"))
        assert "cannot load the base model" in fail("eval", adapter, "--text", text)

    def test_another_base(self, adapter, base, tiny_llama, text):
        tiny_llama(vocab_size=VOCABULARY, hidden_size=64).save_pretrained(base)
        assert "hidden_size: 32 there, 64 here" in fail("eval", adapter, "--text", text)

    def test_no_tokenizer(self, adapter, base, text):
        for path in base.glob("tokenizer*"):
            path.unlink()
        assert "no tokenizer for the base model" in fail("eval", adapter, "--text", text)


class TestPush:
    def test_publishes(self, tmp_path, hub):
        folder = tmp_path / "adapter"
        succeed("patch", "demo", *BUDGET, "--output", folder)
        shown = succeed("push", folder, f"{hub.user}/from-the-command-line")
        assert f"{hub.endpoint}/{hub.user}/from-the-command-line" in shown
        model = hf_sparse.from_pretrained(f"{hub.user}/from-the-command-line")
        assert model.active_peft_config.slots == SLOTS

    def test_full_model(self, tmp_path, hub):
        folder, name = tmp_path / "adapter", f"{hub.user}/full-from-the-command-line"
        succeed("patch", "demo", *BUDGET, "--output", folder)
        shown = succeed("push", folder, name, "--as", "full", "--dry-run")
        assert "uploads model.safetensors.index.json (" in shown and "adapter_config.json" not in shown
        assert "has no LoRA to merge" in fail("push", folder, name, "--as", "merged")
        assert not HfApi().repo_exists(name)
        succeed("push", folder, name, "--as", "full", "--private")
        assert HfApi().model_info(name).private
        assert hf_sparse.from_pretrained(name).active_peft_config.slots == SLOTS

    def test_dry_run_and_pull_request(self, tmp_path, hub):
        folder, name = tmp_path / "adapter", f"{hub.user}/planned"
        succeed("patch", "demo", *BUDGET, "--output", folder)
        shown = succeed("push", folder, name, "--dry-run", "--revision", "v2")
        assert f"creates the repository {name}" in shown and "creates the branch v2" in shown
        assert "uploads adapter_model.safetensors (" in shown
        assert not HfApi().repo_exists(name)
        assert "does not: push without" in fail("push", folder, name, "--create-pr")
        succeed("push", folder, name)
        assert "nothing to open a pull request for" in fail("push", folder, name, "--create-pr")
        succeed("patch", "demo", *BUDGET, "--sinks", "0", "--output", folder, "--force")
        shown = succeed("push", folder, name, "--create-pr", "--revision", "main")
        assert f"opened a pull request with {folder}: {hub.endpoint}/{name}/discussions/1" in shown

    def test_refused(self, tmp_path, hub):
        folder = tmp_path / "adapter"
        succeed("patch", "demo", *BUDGET, "--output", folder)
        before = files(folder)
        assert "this token may not do that" in fail("push", folder, "somebody-else/adapter")
        hub.fail_next("/api/", 401)
        assert "the token is not valid" in fail("push", folder, f"{hub.user}/unlucky")
        assert files(folder) == before

    def test_base_in_a_folder(self, adapter, hub):
        assert "push that model to the Hub first" in fail("push", adapter, f"{hub.user}/local-base")

    def test_takes_no_token(self):
        assert "token" not in inspect.signature(push).parameters


class TestDebug:
    @pytest.mark.full  # the tests of what is refused read the same line from `invoke`
    @pytest.mark.parametrize("debug", [False, True])
    def test_tracebacks_only_on_request(self, tmp_path, debug):
        command = [str(Path(sys.executable).with_name("hf-sparse")), *(["--debug"] if debug else [])]
        command += ["eval", "missing", "--text", "none.txt"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 1
        if debug:
            assert "Traceback" in run.stderr and "DataError" in run.stderr
        else:
            line = "error: cannot read the text none.txt: No such file or directory\n"
            assert run.stderr == line and not run.stdout

    def test_bugs_are_not_hidden(self, adapter, text, monkeypatch):
        def broken(*args, **kwargs):
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(workflow, "evaluate", broken)
        result = invoke("eval", adapter, "--text", text, "--length", LENGTH)
        assert isinstance(result.exception, ZeroDivisionError)

    def test_interrupted(self, adapter, text, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(workflow, "evaluate", interrupted)
        result = invoke("eval", adapter, "--text", text, "--length", LENGTH)
        assert result.exit_code == 130 and result.stderr == "interrupted; files are as they were\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--text", "t.txt", "--split", "test"], "--split has no effect without --dataset"),
        (["eval", "--text", "t.txt", "--task-slots", "9"], "--task-slots has no effect without --task or --longbench"),
        (["eval", "--task", "passkey", "--slots", "9"], "--slots has no effect without --text"),
        (["report", "--chunks", "0:2"], "--chunks has no effect without --text"),
    ],
)
def test_options_about_what_is_not_there(tmp_path, arguments, message):
    result = invoke(arguments[0], tmp_path, *arguments[1:])
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("verb", ["eval", "report", "divide", "unpatch", "push", "patch", "demo"])
def test_one_process_does_what_cannot_be_shared(adapter, text, verb, monkeypatch):
    """Several would write the same files."""
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    before = files(adapter)
    arguments = {"push": [adapter, "me/name"], "patch": ["demo", "--output", adapter], "demo": ["--output", adapter]}
    said = fail(verb, *arguments.get(verb, [adapter, "--text", text]))
    assert f"2 processes were launched, each of which would do all of `hf-sparse {verb}`" in said
    assert files(adapter) == before


def test_version():
    assert succeed("--version") == f"hf-sparse {hf_sparse.__version__}\n"


@pytest.mark.parametrize("verb", ["patch", "finetune", "divide", "unpatch", "eval", "push", "demo"])
def test_help(verb):
    assert verb in succeed("--help")
    assert "Usage" in succeed(verb, "--help")
