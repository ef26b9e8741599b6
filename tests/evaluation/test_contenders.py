"""Check what a method brings to be measured: defaults that need no code, options of its own, and clear refusals."""

from dataclasses import fields, replace

import pytest
import torch
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse.core import registry
from hf_sparse.demo import CHECKPOINT
from hf_sparse.errors import DataError
from hf_sparse.evaluation import Evaluation, evaluate, evaluation_of, tables, task_table, using
from hf_sparse.evaluation.settings import settings_from
from hf_sparse.evaluation.tasks import Suite
from hf_sparse.patches import sparse_layers


class Plain(Evaluation):
    """Measure a method with what every method gets: no baselines, no budget, no options."""

    name = "plain"


@pytest.fixture
def model(tiny_llama):
    base = tiny_llama(vocab_size=4096)
    return hf_sparse.patch(base, hf_sparse.SparseKConfig(k=5, window=6, sinks=2)).eval()


@pytest.fixture
def plain(model, monkeypatch):
    """A model of a method whose evaluation adds nothing."""
    method = registry.method_of(sparse_layers(model)[0].config)
    monkeypatch.setitem(registry._METHODS, method.peft_type, replace(method, evaluation=Plain))
    return model


@pytest.fixture
def chunks():
    return torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))


class TestDefaults:
    def test_dense_and_the_method_are_compared(self, model, chunks, plain):
        result = evaluate(plain, chunks, stride=20, progress=False)
        assert result["method"] == "plain" and "budget" not in result and "sweep" not in result
        assert list(result["perplexity"]) == ["dense", "learned"] and result["divergence"]["dense"] == 0
        assert result["divergence"]["learned"] > 0 and result["kv_bytes"]["sparse_bookkeeping"] == 0
        (view,) = tables(result)
        assert view.row_count == 2 and "plain" in view.title

    def test_numbers_are_those_of_a_method_with_more(self, model, chunks, monkeypatch):
        expected = evaluate(model, chunks, progress=False)["perplexity"]
        method = registry.method_of(sparse_layers(model)[0].config)
        monkeypatch.setitem(registry._METHODS, method.peft_type, replace(method, evaluation=Plain))
        assert evaluate(model, chunks, progress=False)["perplexity"].items() <= expected.items()

    def test_tasks(self, plain):
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
        suite = Suite(("multi_key",), lengths=(200,), samples=1)
        answers = suite.run(plain, tokenizer, progress=False)
        assert list(answers) == ["multi_key"] and "slots" not in answers["multi_key"]["settings"]
        assert list(answers["multi_key"]["results"]) == ["dense", "learned"]
        assert "slots" not in task_table("multi_key", answers["multi_key"]).title
        with pytest.raises(DataError, match="expected slots=None for plain, which has none, got 20"):
            replace(suite, slots=20).run(plain, tokenizer, progress=False)

    def test_an_unknown_contender(self, plain):
        message = "a contender is one of dense, learned, got 'oracle'"
        with pytest.raises(ValueError, match=message), using(plain, "oracle"):
            pytest.fail("entered the block")


class TestSettings:
    def test_none_is_the_default(self, model):
        evaluation = evaluation_of(model)
        assert settings_from(evaluation, {"slots": None}) == evaluation.settings_type()
        assert settings_from(evaluation, {"slots": [20]}).slots == [20]

    def test_an_option_of_no_method(self, model, chunks):
        with pytest.raises(TypeError, match="expected slots; did you mean 'slots'"):
            evaluate(model, chunks, slot=[20])

    def test_a_method_without_options(self, plain, chunks):
        with pytest.raises(ValueError, match="'seed' is an option of sparsefinder: a plain model is"):
            evaluate(plain, chunks, seed=1)


@pytest.mark.parametrize("method", registry.registered_methods().values(), ids=lambda method: method.name)
def test_every_method(method):
    evaluation = method.evaluation()
    assert isinstance(evaluation, Evaluation) and evaluation.name == method.name
    assert all(field.metadata["help"] for field in fields(evaluation.settings_type))
    config = method.config()
    assert evaluation.length(config) > 0 and evaluation.chunks > 0


def test_results_tell_their_method():
    with pytest.raises(ValueError, match="the result is of the method 'chess', which is not registered"):
        tables({"method": "chess"})
