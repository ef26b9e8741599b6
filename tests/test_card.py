"""The card says what was measured and nothing else."""

import copy
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import hf_sparse
from hf_sparse.errors import DataError

card_text = runpy.run_path(str(Path(__file__).with_name("cards.py")))["card_text"]
CONFIG = hf_sparse.SparseKConfig(k=124, window=128, sinks=4)

EVALUATION: dict[str, Any] = {
    "format": 1,
    "base_model": "demo",
    "budget": {"k": 124, "window": 128, "sinks": 4, "slots": 256},
    "text": {"name": "held_out", "sha256": "c0ffee" * 10, "chunks": 24, "length": 2048, "predicted_tokens": 49128},
    "perplexity": {"dense": 9.812, "recency": 10.934, "random": 11.402, "learned": 10.071},
    "kv_bytes": {"dense": 8388608, "sparse": 1048576, "sparse_bookkeeping": 49152, "tokens": 2048},
    "tokens_per_second": {"dense": 61.24, "sparse": 74.91, "new_tokens": 64},
    "machine": {"system": "Linux", "cpus": 4},
    "versions": {"python": "3.11.7", "hf-sparse": "0.1.0"},
}
TRAINING: dict[str, Any] = {
    "format": 1,
    "objective": "distill",
    "settings": {"objective": "distill", "steps": 300, "length": 2048, "learning_rate": 0.02},
    "trainable_parameters": 3072,
    "all_parameters": 4096000,
    "tokens": 1392640,
    "seconds": 412.3,
    "history": [{"step": 1, "stage": "distill", "loss": 0.5}],
    "machine": {"system": "Linux", "cpus": 8},
    "versions": {"python": "3.11.7", "hf-sparse": "0.1.0"},
}


def card(**changes: Any) -> Any:  # a ModelCard, whose metadata has attributes that its type does not tell
    values: dict[str, Any] = {
        "repo_id": "me/llama-sparsek",
        "base_model": "org/llama",
        "parameters": 3072,
        "evaluation": EVALUATION,
        "training": TRAINING,
    }
    return ModelCard(card_text(CONFIG, **values | changes))


def rows(text: str) -> dict[str, list[str]]:
    """Cells of every table row by its first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip("* "): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_metadata():
    data = card().data
    assert data.base_model == "org/llama" and data.base_model_relation == "adapter"
    assert data.library_name == "peft" and data.pipeline_tag == "text-generation"
    assert {"hf-sparse", "sparsek", "sparse-attention"} <= set(data.tags)


@pytest.mark.parametrize("base_model", ["demo", None])
def test_base_that_is_not_on_the_hub_is_left_out_of_the_metadata(base_model):
    data = card(base_model=base_model).data
    assert data.base_model is None and "base_model_relation" not in data.to_dict()


def test_tables_hold_the_measurements():
    found = rows(card().text)
    assert found["all (dense attention of the base model)"][0] == "9.812"
    assert found["256: window, sinks, and the best-scored older ones (this adapter)"] == ["10.071", "+2.6 %"]
    assert found["256: the most recent ones, and sinks"] == ["10.934", "+11.4 %"]
    assert found["256: window, sinks, and older ones at random"] == ["11.402", "+16.2 %"]
    assert found["KV cache after 2,048 tokens"] == ["8.0 MiB", "1.0 MiB"]
    assert found["tokens per second, over 64 new tokens"] == ["61.2", "74.9"]
    assert found["best-scored older tokens, per KV head (k)"] == ["124"]
    assert found["learning_rate"] == ["0.02"]


def test_whole(golden):
    golden("card/sparsek.md", str(card()))


def test_no_measurement_no_numbers(golden):
    text = card(evaluation=None, training=None).text
    assert "quality.png" not in text and "perplexity" not in text and not re.search(r"\d %", text)
    golden("card/sparsek-unmeasured.md", text)


def test_some_measurements_only(golden):
    evaluation = {**EVALUATION, "perplexity": {"learned": 10.071}, "kv_bytes": None}
    text = card(evaluation=evaluation, training=None).text
    assert "10.071" in text and "%" not in text and "74.9" in text
    golden("card/sparsek-some-measured.md", text)


def test_examples_are_python_and_import_hf_sparse_first():
    for base_model, loads in (
        ("org/llama", 'from_pretrained("me/llama-sparsek")'),
        ("demo", 'from_pretrained("me/llama-sparsek")'),
        (None, 'from_pretrained("me/llama-sparsek", base_model="path/to/the/base")'),
    ):
        text = card(base_model=base_model).text
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        compile(code, "card", "exec")
        assert code.startswith("import hf_sparse") and loads in code
        assert "KeyError: 'HF_SPARSE_SPARSEK'" in text


ENCODER_EVALUATION: dict[str, Any] = {
    **{key: EVALUATION[key] for key in ("format", "base_model", "budget", "machine", "versions")},
    "text": {"name": "held_out", "sha256": "c0ffee" * 10, "chunks": 24, "length": 512},
    "metric": "embedding_similarity",
    "embedding_similarity": {"dense": 1.0, "window": 0.8927, "random": 0.8175, "learned": 0.92412},
    "tokens_per_second": {"dense": 3885.71, "sparse": 2439.42, "batch_size": 4, "length": 512},
}
ENCODER_CONFIG = hf_sparse.SparseKConfig(k=124, window=128, sinks=4, base_shape={"model_type": "bert"})


def test_other_budgets_and_tasks_are_told(golden):
    learned = {"lengths": [2048, 4096], "depths": [0.0, 0.5], "values": [[0.0, 0.5], [1.0, 1.0]]}
    results = {
        "dense": {**learned, "values": [[1.0, 1.0], [1.0, 1.0]]},
        "learned": learned,
        "snapkv": {**learned, "values": [[1.0, 0.5], [1.0, 0.75]]},
        "recency": {**learned, "values": [[0.0, 0.0], [0.0, 0.0]]},
    }
    divergence = {"dense": 0.0, "recency": 0.2, "random": 0.3, "learned": 0.1}
    smaller = {"k": 60, "window": 64, "sinks": 4, "slots": 128}
    evaluation = {
        **EVALUATION,
        "divergence": divergence,
        "sweep": [{**smaller, "perplexity": {"dense": 9.812, "learned": 10.5}, "divergence": divergence}],
        "tasks": {
            "passkey": {"metric": "exact_match", "settings": {"samples": 2, "slots": 512}, "results": results},
            "longbench": {"metric": "f1", "settings": {}, "results": {"dense": 0.4, "learned": 0.3, "recency": 0.2}},
        },
    }
    text = card(evaluation=evaluation).text
    found = rows(text.replace("perplexity per token, lower", ""))
    assert found["perplexity (KL from dense, nats)"] == ["128", "256"]
    assert found["exact match, 512 slots"] == ["2,048 tokens", "4,096 tokens"]
    golden("card/sparsek-budgets-and-tasks.md", text)


def encoder_card(model_class: str, **changes: Any) -> Any:
    values: dict[str, Any] = {"repo_id": "me/x", "base_model": "org/bert", "parameters": 3072, "training": TRAINING}
    return ModelCard(
        card_text(ENCODER_CONFIG, **values | {"evaluation": ENCODER_EVALUATION, "model_class": model_class} | changes)
    )


class TestEncoders:
    def test_bare(self, golden):
        card = encoder_card("BertModel")
        assert card.data.pipeline_tag == "feature-extraction" and "kv-cache" not in card.data.tags
        found = rows(card.text)
        assert found["256: window, sinks, and the best-scored other ones (this adapter)"] == ["0.9241"]
        assert found["256: the nearest ones, and sinks"] == ["0.8927"]
        assert found["tokens per second, 4 x 512 tokens at a time"] == ["3885.7", "2439.4"]
        assert found["nearest tokens on both sides, its own included (window)"] == ["128"]
        golden("card/encoder.md", str(card))
        for foreign in ("KV cache", "generat", "perplexity", "evicted", "predicted tokens"):
            assert foreign not in card.text, foreign

    def test_masked(self, golden):
        evaluation = {**ENCODER_EVALUATION, "metric": "masked_perplexity"}
        evaluation["masked_perplexity"] = {"dense": 8.0, "window": 10.0, "random": 12.0, "learned": 9.0}
        evaluation["text"] = {**evaluation["text"], "predicted_tokens": 1800}
        card = encoder_card("BertForMaskedLM", evaluation=evaluation)
        assert card.data.pipeline_tag == "fill-mask"
        assert rows(card.text)["256: the nearest ones, and sinks"] == ["10.000", "+25.0 %"]
        golden("card/encoder-masked.md", str(card))

    def test_a_causal_model_without_a_head(self, golden):
        text = card_text(
            hf_sparse.SparseKConfig(base_shape={"model_type": "llama"}),
            repo_id="x",
            base_model=None,
            parameters=1,
            model_class="LlamaModel",
        )
        golden("card/decoder-without-a-head.md", text)

    @pytest.mark.parametrize("model_class", ["BertModel", "BertForMaskedLM"])
    def test_the_example_is_python(self, model_class):
        (code,) = re.findall(r"```python\n(.*?)```", encoder_card(model_class, evaluation=None).text, re.DOTALL)
        compile(code, "card", "exec")
        assert code.startswith("import hf_sparse") and "generate" not in code

    @pytest.mark.parametrize("missing", ["embedding_similarity", "tokens_per_second"])
    def test_incomplete_measurement(self, missing):
        broken = {key: value for key, value in ENCODER_EVALUATION.items() if key != missing}
        with pytest.raises(DataError, match=f"is not what hf-sparse writes: .*{missing}"):
            encoder_card("BertModel", evaluation=broken)

    def test_unknown_metric(self):
        with pytest.raises(DataError, match=r"is not what hf-sparse writes: .*beauty"):
            encoder_card("BertModel", evaluation={**ENCODER_EVALUATION, "metric": "beauty"})


def test_lora(golden):
    """It is counted apart, and what does not hold with it is not said."""
    config = hf_sparse.SparseKConfig(k=124, window=128, sinks=4, lora_rank=8)
    training = {**TRAINING, "trainable_parameters": 13_072, "lora_parameters": 10_000}
    values: dict[str, Any] = {"repo_id": "me/x", "base_model": None, "parameters": 13_072, "lora_parameters": 10_000}
    text = card_text(config, **values, evaluation=EVALUATION, training=training)
    assert "10,000 of" in text and "LoRA" not in card().text
    golden("card/sparsek-lora.md", text)
    merged = card_text(config, **values, form="merged")
    assert "as its attention is sparse" in text.replace("\n", " ") and "module, merged into them here; with" in merged
    shared = hf_sparse.SparseKConfig(layer_shares=[0.5, 1.5])
    full = card_text(shared, repo_id="x", base_model=None, parameters=1, form="full")
    assert "`layer_shares` in config.json" in full and "adapter_config.json" not in full


def test_unequal_budgets():
    """A card with shares of heads says from how many tokens on something is left out, and that numbers are means."""
    config = hf_sparse.SparseKConfig(k=100, window=20, sinks=4, head_shares=[[0.5, 1.5], [1.7, 0.3]])
    text = card_text(config, repo_id="me/x", base_model="org/llama", parameters=8)
    assert "**124 keys** on average" in text and "**124 slots on average that never grow**" in text
    assert "up to\n54 tokens nothing is left out" in text and "past 54 tokens" in text
    assert "a head has 0.30 to\n1.70 times as many" in text


def test_a_teacher_within_a_window_is_told():
    """It is told where texts were longer than two windows, and in no card of a run without the setting."""
    told = "The dense model attended to at least 512 tokens before each, to fewer than 1,024, and to the first ones"
    for settings, is_told in (({"teacher_window": 512}, True), ({"teacher_window": 1024}, False), ({}, False)):
        training = TRAINING | {"settings": TRAINING["settings"] | settings}
        assert (told in str(card(training=training))) == is_told
        assert ("teacher" in str(card(training=training))) == bool(settings)


def test_what_was_added_to_the_objective_is_told():
    told = "Added to it was 0.1 times the next-token cross-entropy and 2 times the distance of the hidden states."
    for settings, is_told in (({"lm_weight": 0.1, "hidden_weight": 2.0}, True), ({"lm_weight": 0.0}, False)):
        training = TRAINING | {"settings": TRAINING["settings"] | settings}
        assert (told in str(card(training=training))) == ("Added to it" in str(card(training=training))) == is_told


def test_layers(golden):
    config = hf_sparse.SparseKConfig(layers=[3, 0])
    golden("card/sparsek-some-layers.md", card_text(config, repo_id="x", base_model=None, parameters=1))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("evaluation", ["perplexity"]),
        ("evaluation", ["text", "sha256"]),
        ("evaluation", ["kv_bytes", "tokens"]),
        ("evaluation", ["machine"]),
        ("evaluation", ["versions"]),
        ("training", ["settings"]),
        ("training", ["tokens"]),
        ("training", ["objective"]),
    ],
)
def test_incomplete_measurement(name, path):
    broken = copy.deepcopy({"evaluation": EVALUATION, "training": TRAINING}[name])
    *above, last = path
    place = broken
    for key in above:
        place = place[key]
    del place[last]
    with pytest.raises(DataError, match=f"is not what hf-sparse writes: .*{last}"):
        card(**{name: broken})
