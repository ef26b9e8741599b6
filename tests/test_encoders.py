"""Encoders from the command line: patch, train, measure, push, load elsewhere. Every mistake is one line."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from peft import AutoPeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.models.electra import ElectraConfig, ElectraForPreTraining
from typer.testing import CliRunner

import hf_sparse
from hf_sparse import cli, workflow
from hf_sparse.adapters.load import load_adapter
from hf_sparse.chunks import packed_chunks
from hf_sparse.data import IGNORED
from hf_sparse.errors import DataError
from hf_sparse.methods.sparsek.evaluation import ENCODER_CONTENDERS
from hf_sparse.model_kinds import kind_of

pytestmark = [pytest.mark.usefixtures("blank_pictures"), pytest.mark.versions]

BUDGET = ["--k", "4", "--window", "4", "--sinks", "1"]
SLOTS, LENGTH = 9, 48
QUICK = ["--steps", "2", "--warm-start-steps", "1", "--length", str(LENGTH), "--device", "cpu"]
METRICS = {"BertForMaskedLM": "masked_perplexity", "BertModel": "embedding_similarity"}
PIPELINES = {"BertForMaskedLM": "fill-mask", "BertModel": "feature-extraction"}


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def succeed(*arguments) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*arguments) -> str:
    """The one line on stderr of a command that fails with exit code 1 and shows no traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    return error


@pytest.fixture
def bases(tmp_path, tiny_bert, bert_tokenizer):
    """Makes the folder of a checkpoint of any class."""

    def make(kind) -> Path:
        folder = tmp_path / kind
        tiny_bert(kind).save_pretrained(folder)
        bert_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def text(tmp_path) -> Path:
    generator = random.Random(0)
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{generator.randrange(5, 64)}" for _ in range(5 * LENGTH)))
    return path


@pytest.fixture
def adapters(tmp_path, bases):
    """Makes an untrained adapter for a checkpoint of any class."""

    def make(kind) -> Path:
        folder = tmp_path / f"adapter-{kind}"
        succeed("patch", bases(kind), *BUDGET, "--output", folder)
        return folder

    return make


@pytest.mark.parametrize("kind", METRICS)
def test_from_nothing_to_the_hub(tmp_path, adapters, text, hub, kind):
    folder = adapters(kind)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == kind and config["task_type"] is None
    before = load_file(folder / "adapter_model.safetensors")

    succeed("finetune", folder, "--text", text, *QUICK)
    after = load_file(folder / "adapter_model.safetensors")
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
    history = json.loads((folder / "finetune.json").read_text())["history"]
    assert [row["stage"] for row in history] == ["attention", "distill", "distill"]

    shown = succeed("eval", folder, "--text", text, "--length", LENGTH, "--device", "cpu")
    result = json.loads((folder / "eval.json").read_text())
    assert result["metric"] == METRICS[kind] and tuple(result[METRICS[kind]]) == ENCODER_CONTENDERS
    assert "window" in shown and "forward, tokens/s" in shown and (folder / "quality.png").exists()

    # The base goes to the Hub first, as a user would have it.
    repo, name = f"{hub.user}/{kind.lower()}-sparse", f"{hub.user}/{kind.lower()}-base"
    local = load_adapter(folder, device="cpu")[0]
    HfApi().create_repo(name)
    HfApi().upload_folder(folder_path=tmp_path / kind, repo_id=name)
    succeed("push", folder, repo, "--base-model", name)
    card = ModelCard.load(hf_hub_download(repo, "README.md"))
    assert card.data.pipeline_tag == PIPELINES[kind] and card.data.base_model == name
    assert "KV cache" not in card.text and "nearest tokens on both sides" in card.text

    tokens = torch.randint(5, 64, (2, 30))
    loaded = hf_sparse.from_pretrained(repo)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens)[0], local(input_ids=tokens)[0])
    with torch.no_grad():  # PEFT's own way
        assert torch.equal(AutoPeftModel.from_pretrained(repo).eval()(input_ids=tokens)[0], local(input_ids=tokens)[0])
    assert type(loaded.get_base_model()).__name__ == kind


def test_the_head_that_was_patched_is_the_one_that_loads(tmp_path, bases, tiny_bert):
    """An adapter made on another head than the checkpoint names, which it brings."""
    base = bases("BertModel")
    config = hf_sparse.SparseKConfig(k=4, window=4, sinks=1, modules_to_save=["classifier"])
    model = get_peft_model(tiny_bert("BertForTokenClassification"), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert (
        type(hf_sparse.from_pretrained(tmp_path / "adapter").get_base_model()).__name__ == "BertForTokenClassification"
    )


@torch.no_grad()
def test_an_electra_that_tells_replaced_tokens(tmp_path):
    """As it is on the Hub: a head for pretraining that holds none for masked tokens. It learns as an encoder does."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ElectraForPreTraining(ElectraConfig(**sizes, embedding_size=32, vocab_size=64)).save_pretrained(tmp_path / "base")
    succeed("patch", tmp_path / "base", "--k", "4", "--window", "4", "--sinks", "1", "--output", tmp_path / "adapter")
    model = hf_sparse.from_pretrained(tmp_path / "adapter")
    assert type(model.get_base_model()) is ElectraForPreTraining and kind_of(model) == "features"
    model.save_pretrained(tmp_path / "again")
    tokens = torch.randint(5, 64, (2, 30))
    again = hf_sparse.from_pretrained(tmp_path / "again")
    assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize("kind", METRICS)
def test_a_killed_run_resumes(adapters, text, tmp_path, monkeypatch, kind):
    folder = adapters(kind)
    whole = shutil.copytree(folder, tmp_path / "whole")
    run = ["--text", text, *QUICK, "--checkpoint-every", "2"]
    succeed("finetune", whole, *run)

    real = workflow.finetune

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(workflow, "finetune", interrupted)
        assert invoke("finetune", folder, *run).exit_code == 130
    succeed("finetune", folder, *run, "--resume")
    weights = [load_file(path / "adapter_model.safetensors") for path in (folder, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_chunks_are_what_encoders_know(adapters, text, monkeypatch):
    seen = {}

    def note(name):
        def stop(model, data, *args, **kwargs):
            seen[name] = data
            raise KeyboardInterrupt

        return stop

    masked, bare = adapters("BertForMaskedLM"), adapters("BertModel")
    for folder in (masked, bare):
        for verb, function in (("finetune", "finetune"), ("eval", "evaluate")):
            monkeypatch.setattr(workflow, function, note((folder, verb)))
            assert invoke(verb, folder, "--text", text, "--device", "cpu").exit_code == 130
    chunks = seen[bare, "eval"]
    assert torch.equal(chunks, seen[bare, "finetune"])
    assert chunks.shape == (1, 128)  # as long as the model's context
    assert (chunks[:, 0] == 2).all() and (chunks[:, -1] == 3).all() and (chunks[:, 1:-1] > 4).all()
    for verb in ("finetune", "eval"):
        inputs, labels = seen[masked, verb].values()
        assert torch.equal(inputs.where(labels == IGNORED, labels), chunks)
    hidden = seen[masked, "eval"]["labels"] != IGNORED
    assert (seen[masked, "eval"]["input_ids"][hidden] == 4).all()


def test_refusals(adapters, text):
    folder = adapters("BertModel")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    objective = [*QUICK, "--objective", "lm"]
    assert "needs a model with a language modelling head" in fail("finetune", folder, "--text", text, *objective)
    assert "130 tokens are longer than the 128 positions" in fail("eval", folder, "--text", text, "--length", "130")
    assert f"a budget of {SLOTS} slots" in fail("finetune", folder, "--text", text, *QUICK, "--length", SLOTS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_mask_token(adapters, bert_tokenizer, text, tmp_path):
    folder = adapters("BertForMaskedLM")
    bert_tokenizer.mask_token = None
    bert_tokenizer.save_pretrained(tmp_path / "BertForMaskedLM")
    assert "has no mask token" in fail("eval", folder, "--text", text, "--length", LENGTH)


def test_bos_is_refused_for_an_encoder(tiny_bert, bert_tokenizer):
    model = get_peft_model(tiny_bert(), hf_sparse.SparseKConfig(k=6, window=8, sinks=1))
    with pytest.raises(DataError, match="bos is for decoders"):
        packed_chunks(model, bert_tokenizer, "w5 w6 " * 200, 64, bos=True)
    assert packed_chunks(model, bert_tokenizer, "w5 w6 " * 200, 64, bos=None)[:, 0].tolist() == [2] * 6
