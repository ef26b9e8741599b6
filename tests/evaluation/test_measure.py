"""Evaluation: the numbers are what they claim to be, and the model comes back as it was."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from torch import nn
from transformers import LlamaForCausalLM

import hf_sparse
from hf_sparse.errors import DataError
from hf_sparse.evaluation import evaluate, perplexity, readable_bytes, table, using
from hf_sparse.methods.sparsek.baselines import BASELINES
from hf_sparse.methods.sparsek.evaluation import CONTENDERS
from hf_sparse.patches import sparse_layers

K, WINDOW, SINKS = 5, 6, 2
SLOTS = K + WINDOW + SINKS
LENGTH = 40


@pytest.fixture
def base(tiny_llama) -> LlamaForCausalLM:
    return tiny_llama(max_position_embeddings=64)


@pytest.fixture
def model(base):
    return get_peft_model(base, hf_sparse.SparseKConfig(k=K, window=WINDOW, sinks=SINKS))


@pytest.fixture
def chunks() -> torch.Tensor:
    return torch.randint(0, 64, (3, LENGTH))


def masked_perplexity(base: LlamaForCausalLM, chunks: torch.Tensor, mask: torch.Tensor) -> float:
    """Perplexity of the base model under an explicit `[T, T]` mask, by transformers' own loss."""
    whole = mask[None, None].expand(len(chunks), -1, -1, -1)
    with torch.no_grad():
        return math.exp(base(input_ids=chunks, attention_mask=whole, labels=chunks).loss)


class TestPerplexity:
    class Fixed(nn.Module):
        """Predicts one distribution, whatever it is shown."""

        def __init__(self, probabilities: list[float]) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(probabilities).log() + 3.0)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_by_hand(self, batch_size):
        chunks = torch.tensor([[3, 0, 1], [2, 2, 0]])  # predicted: 0, 1 and 2, 0; 3 and the first 2 are only seen
        model = self.Fixed([1 / 2, 1 / 4, 1 / 8, 1 / 8])
        expected = (1 / 2 * 1 / 4 * 1 / 8 * 1 / 2) ** (-1 / 4)
        assert perplexity(model, chunks, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)

    def test_longer_than_a_slice(self):
        chunks = torch.zeros(2, 1300, dtype=torch.int64)
        chunks[:, 700:] = 1
        expected = math.exp(-(699 * math.log(0.75) + 600 * math.log(0.25)) / 1299)
        assert perplexity(self.Fixed([0.75, 0.25]), chunks, batch_size=2) == pytest.approx(expected, rel=1e-6)

    def test_half_precision_is_summed_in_float32(self):
        # In bfloat16 the sum of 1000 equal terms would stop growing long before the end.
        model = self.Fixed([0.5, 0.5]).to(torch.bfloat16)
        assert perplexity(model, torch.zeros(1, 1001, dtype=torch.int64)) == pytest.approx(2, rel=1e-6)


class TestSelections:
    def test_dense_is_the_base_model(self, base, chunks):
        with torch.no_grad():
            expected = math.exp(base(input_ids=chunks, labels=chunks).loss)
        model = get_peft_model(base, hf_sparse.SparseKConfig(k=K, window=WINDOW, sinks=SINKS))
        result = evaluate(model, chunks, progress=False)["perplexity"]
        assert result["dense"] == pytest.approx(expected, rel=1e-6)
        assert len({round(value, 4) for value in result.values()}) == len(CONTENDERS)  # each is another one

    def test_recency_is_a_wider_window(self, base, chunks):
        query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        mask = (key <= query) & ((key > query - (WINDOW + K)) | (key < SINKS))
        expected = masked_perplexity(base, chunks, mask)
        hf_sparse.patch(base, hf_sparse.SparseKConfig(k=K, window=WINDOW, sinks=SINKS))
        result = evaluate(base, chunks, batch_size=2, progress=False)["perplexity"]
        assert result["recency"] == pytest.approx(expected, rel=1e-5)

    def test_a_model_without_peft_measures_the_same(self, base, model, chunks):
        expected = evaluate(model, chunks, progress=False)["perplexity"]
        weights = [method.sparsek_scorer["default"].state_dict() for method in sparse_layers(model)]
        plain = hf_sparse.patch(model.unload(), hf_sparse.SparseKConfig(k=K, window=WINDOW, sinks=SINKS))
        for method, weight in zip(sparse_layers(plain), weights, strict=True):
            method.sparsek_scorer["default"].load_state_dict(weight)
        assert evaluate(plain, chunks, progress=False)["perplexity"] == expected

    def test_only_those_asked_for(self, model, chunks):
        result = evaluate(model, chunks, selections=("learned", "dense"), progress=False)
        assert list(result["perplexity"]) == ["learned", "dense"]


def test_adapters_with_layers_of_their_own(base, chunks):
    model = get_peft_model(base, hf_sparse.SparseKConfig(k=6, window=8, sinks=2, layers=[0]))
    model.add_adapter("other", hf_sparse.SparseKConfig(k=4, window=8, sinks=2, layers=[1]))
    model.set_adapter("other")
    assert evaluate(model, chunks, progress=False, selections=["learned"])["budget"]["k"] == 4


class TestTheModelComesBack:
    @staticmethod
    def state(model):
        methods = sparse_layers(model)
        return (
            [(method.baseline, method.disable_adapters) for method in methods],
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            model.config._attn_implementation,
        )

    @pytest.mark.parametrize("disabled", [False, True])
    def test_after_evaluating(self, model, chunks, disabled):
        model.eval()
        first, second = sparse_layers(model)
        first.train()
        second.baseline = BASELINES["random"]
        for method in (first, second):
            method.switch(not disabled)
        before = self.state(model)
        evaluate(model, chunks, progress=False)
        assert self.state(model) == before

    @pytest.mark.parametrize("name", CONTENDERS)
    def test_after_an_exception(self, model, name):
        sparse_layers(model)[0].baseline = BASELINES["random"]
        before = self.state(model)
        with pytest.raises(KeyboardInterrupt), using(model, name):
            raise KeyboardInterrupt
        assert self.state(model) == before

    def test_after_a_failing_forward(self, model, chunks, monkeypatch):
        before = self.state(model)

        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(sparse_layers(model)[1], "score", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate(model, chunks, progress=False)
        assert self.state(model) == before


class TestSweep:
    def test_each_budget_as_an_adapter_of_its_own(self, base, model, chunks):
        scorers = [method.sparsek_scorer["default"].state_dict() for method in sparse_layers(model)]
        result = evaluate(model, chunks, selections=("dense", "learned", "h2o"), slots=(9, 20), progress=False)
        assert [(e["slots"], e["k"], e["window"], e["sinks"]) for e in result["sweep"]] == [
            (9, 3, 4, 2),
            (20, 9, 9, 2),
        ]
        base = model.unload()
        for entry in result["sweep"]:
            own = hf_sparse.SparseKConfig(**{name: entry[name] for name in ("k", "window", "sinks")})
            hf_sparse.patch(base, own)
            for method, weight in zip(sparse_layers(base), scorers, strict=True):
                method.sparsek_scorer["default"].load_state_dict(weight)
            expected = evaluate(base, chunks, selections=("dense", "learned", "h2o"), progress=False)
            hf_sparse.unpatch(base)
            assert entry["perplexity"] == expected["perplexity"] and entry["divergence"] == expected["divergence"]

    def test_the_own_budget_does_not_change(self, model, chunks):
        alone = evaluate(model, chunks, selections=("learned",), progress=False)
        swept = evaluate(model, chunks, selections=("learned",), slots=(20,), progress=False)
        for name in ("budget", "perplexity", "divergence", "by_position", "kv_bytes"):
            assert swept[name] == alone[name]
        assert "sweep" not in alone and sparse_layers(model)[0].config.slots == SLOTS

    def test_refusals(self, model, chunks):
        with pytest.raises(DataError, match="nothing is evicted: the budget of 40 slots"):
            evaluate(model, chunks, slots=(9, 40), progress=False)
        with pytest.raises(ValueError, match="with 2 sinks, slots must be at least 4, got 3"):
            evaluate(model, chunks, slots=(3,), progress=False)

    def test_the_budget_comes_back(self, model, chunks, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(sparse_layers(model)[1], "score", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate(model, chunks, selections=("learned",), slots=(20,), progress=False)
        assert sparse_layers(model)[0].config.slots == SLOTS


class TestMemoryAndSpeed:
    def test_bytes(self, model, chunks):
        result = evaluate(model, chunks, selections=("learned",), speed_tokens=4, progress=False)
        layers, heads, dim, float32 = 2, 2, 8, 4
        assert result["kv_bytes"] == {
            "dense": 2 * layers * heads * LENGTH * dim * float32,
            "sparse": 2 * layers * heads * SLOTS * dim * float32,
            "sparse_bookkeeping": layers * heads * SLOTS * (4 + 8),  # float32 scores, int64 positions
            "tokens": LENGTH,
        }
        speed = result["tokens_per_second"]
        assert speed["new_tokens"] == 4 and speed["dense"] > 0 and speed["sparse"] > 0

    def test_layers_that_are_not_patched_keep_everything(self, base, chunks):
        hf_sparse.patch(base, hf_sparse.SparseKConfig(k=K, window=WINDOW, sinks=SINKS, layers=[1]))
        memory = evaluate(base, chunks, selections=("learned",), progress=False)["kv_bytes"]
        assert memory["sparse"] == memory["dense"] // 2 + memory["dense"] // 2 * SLOTS // LENGTH

    def test_short_chunks_decode_fewer_tokens(self, model):
        result = evaluate(model, torch.zeros(1, SLOTS + 1, dtype=torch.int64), progress=False)
        assert result["tokens_per_second"]["new_tokens"] == SLOTS

    @pytest.mark.parametrize(
        ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 * 2**40, "5.00 TiB")]
    )
    def test_readable_bytes(self, count, text):
        assert readable_bytes(count) == text


def test_result(model, chunks):
    result = evaluate(model, chunks, progress=False, text_name="noise")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["budget"] == {"k": K, "window": WINDOW, "sinks": SINKS, "slots": SLOTS}
    assert result["text"].items() >= {"name": "noise", "chunks": 3, "length": LENGTH, "predicted_tokens": 117}.items()
    assert tuple(result["perplexity"]) == CONTENDERS
    assert {"machine", "versions", "base_model", "format"} <= result.keys()

    console = Console(width=120, file=io.StringIO())
    console.print(table(result))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for name, value in result["perplexity"].items():
        assert f"{value:.2f}" in shown and f"{result['divergence'][name]:.4f}" in shown
    assert "noise" in shown and readable_bytes(result["kv_bytes"]["sparse"]) in shown


def test_same_data_same_numbers(model, chunks):
    first, second = (evaluate(model, chunks, progress=False) for _ in range(2))
    assert first["perplexity"] == second["perplexity"] and first["text"] == second["text"]
    other = evaluate(model, chunks.roll(1, 0), progress=False)
    assert other["text"]["sha256"] != first["text"]["sha256"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("chunks", "message"),
        [
            (torch.zeros(LENGTH, dtype=torch.int64), r"expected chunks \[N, T\].*\[40\]"),
            (torch.zeros(1, LENGTH), r"expected chunks \[N, T\].*float32"),
            (torch.zeros(0, LENGTH, dtype=torch.int64), r"\[0, 40\]"),
            (torch.zeros(1, SLOTS, dtype=torch.int64), "nothing is evicted: the budget of 13 slots"),
            (torch.zeros(1, 65, dtype=torch.int64), "65 tokens are longer than the 64 positions"),
            (torch.full((1, LENGTH), 64), "tokens must be 0 to 63, got 64 to 64"),
            (torch.full((1, LENGTH), -1), "tokens must be 0 to 63, got -1 to -1"),
        ],
    )
    def test_chunks(self, model, chunks, message):
        with pytest.raises(DataError, match=message):
            evaluate(model, chunks, progress=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"selections": ("dense", "newest")}, r"selections must be among dense, recency, random, .*, learned"),
            ({"selections": ()}, "selections must be among"),
            ({"selections": "oracle"}, r"selections must be a list of names, such as \['oracle'\], got 'oracle'"),
            ({"slots": 20}, r"slots must be a list of integers, such as \[128, 256\], got 20"),
            ({"slots": [20.0]}, r"slots must be a list of integers, .*got \[20.0\]"),
            ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
            ({"batch_size": "2"}, "batch_size must be an integer of at least 1, got '2'"),
            ({"speed_tokens": 0}, "speed_tokens must be an integer of at least 1, got 0"),
            ({"stride": 2.5}, "stride is for causal language models, 1 to .* got 2.5 for a model of the kind 'causal'"),
        ],
    )
    def test_options(self, model, chunks, options, message):
        with pytest.raises(ValueError, match=message):
            evaluate(model, chunks, progress=False, **options)

    def test_unpatched(self, base, chunks):
        with pytest.raises(ValueError, match="expected a model with sparse attention, got a LlamaForCausalLM without"):
            evaluate(base, chunks, progress=False)

    def test_unknown_selection(self, model):
        with pytest.raises(ValueError, match="got 'newest'"), using(model, "newest"):
            pytest.fail("entered the block")


class TestStride:
    def test_counts_the_last_tokens_of_overlapping_chunks(self, base, model):
        tokens = torch.randint(0, 64, (100,), generator=torch.Generator().manual_seed(5))
        chunks = tokens.unfold(0, LENGTH, 15)
        found = evaluate(model, chunks, selections=("dense", "learned"), stride=15, slots=(20,), progress=False)
        assert found["text"]["stride"] == 15 and found["text"]["predicted_tokens"] == 15 * len(chunks)
        edges = found["by_position"]["edges"]
        assert (edges[0], edges[-1]) == (LENGTH - 15, LENGTH) and len(found["by_position"]["learned"]) == 15
        with torch.no_grad():
            for name in ("dense", "learned"):
                with using(model, name):
                    logits = model(chunks).logits[:, :-1].log_softmax(-1)
                nats = -logits.gather(-1, chunks[:, 1:, None])[..., 0][:, -15:].double()
                assert found["perplexity"][name] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
                assert found["by_position"][name][-1] == pytest.approx(math.exp(nats[:, -1].mean()), rel=1e-5)
        assert found["sweep"][0]["perplexity"]["dense"] == found["perplexity"]["dense"]

    @pytest.mark.parametrize("stride", [0, LENGTH, -3])
    def test_refuses(self, model, chunks, stride):
        with pytest.raises(ValueError, match=f"stride is for causal language models, 1 to 39 tokens.*got {stride}"):
            evaluate(model, chunks, stride=stride)
