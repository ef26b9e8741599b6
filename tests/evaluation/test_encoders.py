"""Evaluation of encoders: perplexity of hidden tokens, likeness of embeddings, baselines with a two-sided window."""

import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from rich.console import Console

import hf_sparse
from hf_sparse.data import IGNORED, fingerprint
from hf_sparse.errors import DataError
from hf_sparse.evaluation import (
    embeddings,
    evaluate,
    evaluation_of,
    masked_perplexity,
    table,
    using,
)
from hf_sparse.methods.sparsek.evaluation import CONTENDERS, ENCODER_CONTENDERS
from hf_sparse.patches import sparse_layers

K, WINDOW, SINKS = 5, 6, 1
SLOTS = K + WINDOW + SINKS
LENGTH = 40


@pytest.fixture
def chunks():
    return torch.randint(5, 64, (3, LENGTH))


@pytest.fixture
def masked(chunks):
    """Chunks with hidden tokens, not equally many in each."""
    hidden = torch.rand(chunks.shape) < 0.2
    hidden[:, 7] = True
    return {"input_ids": chunks.masked_fill(hidden, 4), "labels": chunks.masked_fill(~hidden, IGNORED)}


@pytest.fixture
def adapted(tiny_bert):
    """Makes a tiny BERT with SparseK."""

    def make(kind="BertForMaskedLM"):
        return get_peft_model(tiny_bert(kind), hf_sparse.SparseKConfig(k=K, window=WINDOW, sinks=SINKS)).eval()

    return make


def reach(window):
    """`[T, T]` bool, the keys within a two-sided window, and the sinks."""
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    offset = key - query + window // 2
    return ((offset >= 0) & (offset < window)) | (key < SINKS)


class TestMaskedPerplexity:
    def test_dense_is_the_loss_of_transformers(self, adapted, tiny_bert, masked):
        with torch.no_grad():
            expected = math.exp(tiny_bert()(**masked).loss)
        for size in (1, 2, 3):
            with using(model := adapted(), "dense"):
                found = masked_perplexity(model, masked["input_ids"], masked["labels"], batch_size=size)
            assert found == pytest.approx(expected, rel=1e-5)

    def test_window_is_a_wider_window(self, adapted, tiny_bert, masked):
        mask = reach(WINDOW + K)[None, None].expand(3, -1, -1, -1)
        with torch.no_grad():
            expected = math.exp(tiny_bert()(**masked, attention_mask=mask).loss)
        result = evaluate(adapted(), masked, progress=False)["masked_perplexity"]
        assert result["window"] == pytest.approx(expected, rel=1e-4)
        assert len({round(value, 4) for value in result.values()}) == 4  # each selection is another one

    def test_result(self, adapted, masked):
        result = evaluate(adapted(), masked, batch_size=2, progress=False, text_name="noise")
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert result["metric"] == "masked_perplexity" and tuple(result["masked_perplexity"]) == ENCODER_CONTENDERS
        assert result["text"]["predicted_tokens"] == int((masked["labels"] != IGNORED).sum())
        assert result["text"]["sha256"] == fingerprint(masked["input_ids"], masked["labels"])
        assert "kv_bytes" not in result and "perplexity" not in result
        speed = result["tokens_per_second"]
        assert speed["dense"] > 0 and speed["sparse"] > 0
        assert speed.items() >= {"batch_size": 2, "length": LENGTH}.items()


class TestEmbeddingSimilarity:
    @pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification"])
    def test_by_hand(self, adapted, tiny_bert, chunks, kind):
        model = adapted(kind)
        result = evaluate(model, chunks, batch_size=2, progress=False)["embedding_similarity"]
        with torch.no_grad():
            dense = tiny_bert(kind).base_model(input_ids=chunks).last_hidden_state.mean(1)
            sparse = model(input_ids=chunks, output_hidden_states=True).hidden_states[-1].mean(1)
        assert result["dense"] == pytest.approx(1)
        assert result["learned"] == pytest.approx(F.cosine_similarity(dense, sparse).mean().item(), abs=1e-5)
        assert 0 < result["random"] < 1 and 0 < result["window"] < 1

    def test_window_is_a_wider_window(self, adapted, tiny_bert, chunks):
        with torch.no_grad():
            mask = reach(WINDOW + K)[None, None].expand(3, -1, -1, -1)
            expected = tiny_bert("BertModel")(input_ids=chunks, attention_mask=mask).last_hidden_state.mean(1)
        with using(model := adapted("BertModel"), "window"):
            torch.testing.assert_close(embeddings(model, chunks, batch_size=2), expected, atol=1e-5, rtol=0)

    def test_only_those_asked_for(self, adapted, chunks):
        result = evaluate(adapted("BertModel"), chunks, selections=("learned",), progress=False)
        assert list(result["embedding_similarity"]) == ["learned"]
        assert "predicted_tokens" not in result["text"]


def test_a_causal_model_without_a_head(tiny_llama, chunks):
    model = get_peft_model(tiny_llama().model, hf_sparse.SparseKConfig(k=K, window=WINDOW, sinks=SINKS)).eval()
    result = evaluate(model, chunks, progress=False)
    assert tuple(result["embedding_similarity"]) == CONTENDERS


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel"])
def test_table(adapted, chunks, masked, kind):
    result = evaluate(adapted(kind), masked if kind == "BertForMaskedLM" else chunks, progress=False)
    console = Console(width=120, file=io.StringIO())
    console.print(table(result))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for name, value in result[result["metric"]].items():
        assert name in shown and f"{value:.{4 if kind == 'BertModel' else 2}f}" in shown
    assert "forward, tokens/s" in shown and "KV cache" not in shown and f"up to {SLOTS}" in shown


def test_the_model_comes_back(adapted, chunks):
    model = adapted("BertModel").train()
    before = (
        [(m.baseline, m.disable_adapters, m.training) for m in sparse_layers(model)],
        model.config._attn_implementation,
    )
    evaluate(model, chunks, progress=False)
    after = (
        [(m.baseline, m.disable_adapters, m.training) for m in sparse_layers(model)],
        model.config._attn_implementation,
    )
    assert before == after and all(module.training for module in model.modules())


def test_same_data_same_numbers(adapted, masked):
    model = adapted()
    first, second = (evaluate(model, masked, progress=False)["masked_perplexity"] for _ in range(2))
    assert first == second


def test_sweep(adapted, masked):
    result = evaluate(adapted(), masked, slots=(8,), progress=False)
    (entry,) = result["sweep"]
    assert (entry["k"], entry["window"], entry["sinks"]) == (3, 4, 1)
    own = hf_sparse.patch(adapted().unload(), hf_sparse.SparseKConfig(k=3, window=4, sinks=1))
    expected = evaluate(own, masked, selections=("dense", "window", "random"), progress=False)["masked_perplexity"]
    assert expected.items() <= entry["masked_perplexity"].items()


def test_refusals(adapted, chunks, masked):
    with pytest.raises(ValueError, match="selections must be among dense, window, random, learned"):
        evaluate(adapted(), masked, selections=("recency",), progress=False)
    with pytest.raises(ValueError, match="got 'recency'"), using(adapted(), "recency"):
        pytest.fail("entered the block")
    with pytest.raises(DataError, match="hidden tokens and their labels"):
        evaluate(adapted(), chunks, progress=False)
    with pytest.raises(DataError, match="129 tokens are longer than the 128 positions"):
        evaluate(adapted("BertModel"), torch.full((1, 129), 5), progress=False)
    with pytest.raises(DataError, match="nothing is evicted: the budget of 12 slots"):
        evaluate(adapted("BertModel"), chunks[:, :SLOTS], progress=False)
    assert evaluation_of(model := adapted()).contenders(model) == ENCODER_CONTENDERS
