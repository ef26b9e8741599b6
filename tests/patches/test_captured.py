"""Recorded steps generate what transformers' loop generates; on a machine without a GPU the steps run one by one."""

import functools

import peft
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import hf_sparse
from hf_sparse import CapturedDecoding, SparsefinderConfig, SparseKCache, SparseKConfig, patch
from hf_sparse._compat import with_cache
from hf_sparse.core.overrides import overwrite
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.captured import argmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET = {"k": 6, "window": 8, "sinks": 2}
IDS = torch.randint(2, 64, (3, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
LEFT = (torch.arange(40) >= torch.tensor([0, 17, 30])[:, None]).long().to(DEVICE)


@pytest.fixture
def model(tiny_llama):
    return patch(tiny_llama().to(DEVICE), SparseKConfig(**BUDGET))


HEADS = [[0.5, 1.5], [1.25, 0.75]]


def test_heads_with_budgets_of_their_own(tiny_llama):
    model = patch(tiny_llama().to(DEVICE), SparseKConfig(**BUDGET, head_shares=HEADS))
    options = {"attention_mask": LEFT, "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, custom_generate=CapturedDecoding(model, steps=7), **options), expected)
    equal = patch(tiny_llama().to(DEVICE), SparseKConfig(**BUDGET))
    assert not torch.equal(equal.generate(IDS, **options), expected)


@pytest.mark.versions
@pytest.mark.parametrize("steps", [1, 7, 16])
def test_greedy_tokens_are_those_of_generate(model, steps):
    decode = CapturedDecoding(model, steps=steps)
    for mask, length, new in ((torch.ones_like(IDS), 40, 30), (LEFT, 40, 30), (LEFT[:, :33], 33, 1)):
        options = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False}
        expected = model.generate(IDS[:, :length], **options)
        assert torch.equal(model.generate(IDS[:, :length], custom_generate=decode, **options), expected)


@pytest.mark.versions
@pytest.mark.parametrize("ends", [1, 6, 25])
def test_texts_end_as_in_generate(model, ends):
    """The first texts end while others go on, and the loop with the last of them."""
    plain = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(IDS, **plain)[:, 40:]
    rows = {"one": tokens[:1, ends].tolist(), "all": tokens[:, ends].tolist()}
    decode = CapturedDecoding(model, steps=8)
    for end_tokens in rows.values():
        expected = model.generate(IDS, eos_token_id=end_tokens, **plain)
        found = model.generate(IDS, eos_token_id=end_tokens, custom_generate=decode, **plain)
        assert torch.equal(found, expected)
    assert expected.shape[1] <= 40 + ends + 1


@pytest.mark.parametrize("count", [7, 64, 1000, 1009])
def test_the_likeliest_token_is_the_first_of_equal_ones(count):
    numbers = torch.randint(0, 9, (5, count), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    assert torch.equal(argmax(numbers), torch.stack([(row == row.max()).nonzero()[0, 0] for row in numbers]))


def test_samples_are_drawn_as_generate_draws_them(model):
    decode = CapturedDecoding(model)
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    found = []
    for loop in ({}, {"custom_generate": decode}, {"custom_generate": decode}):
        torch.manual_seed(0)
        found.append(model.generate(IDS, **loop, **options))
    if DEVICE == "cpu":
        assert torch.equal(found[1], found[0])
    assert found[1].shape == (3, 60)
    assert model.generate(IDS, custom_generate=decode, **options).ne(found[1]).any()


def test_it_reads_weights_as_they_are(model):
    decode = CapturedDecoding(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    before = model.generate(IDS, custom_generate=decode, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    after = model.generate(IDS, custom_generate=decode, **options)
    assert torch.equal(after, model.generate(IDS, **options))
    assert not torch.equal(before, after)


def test_a_peft_model_and_its_switches(tiny_llama):
    model = peft.get_peft_model(tiny_llama().to(DEVICE), SparseKConfig(**BUDGET)).eval()
    decode = CapturedDecoding(model)
    options = {"input_ids": IDS, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**options)
    assert torch.equal(model.generate(custom_generate=decode, **options), expected)
    with model.disable_adapter(), pytest.raises(ValueError, match="no attention of the model is sparse now"):
        model.generate(custom_generate=decode, **options)
    assert torch.equal(model.generate(custom_generate=decode, **options), expected)


def test_other_models_and_adapters_are_told_apart(tiny_llama):
    one, other = (peft.get_peft_model(tiny_llama().to(DEVICE), SparseKConfig(**BUDGET)).eval() for _ in range(2))
    one.add_adapter("narrow", SparseKConfig(k=2, window=3, sinks=1))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    decode = CapturedDecoding(one)
    options = {"input_ids": IDS, "max_new_tokens": 12, "do_sample": False}
    found = []
    for model, adapter in ((one, "default"), (other, "default"), (one, "narrow"), (one, "default")):
        model.set_adapter(adapter)
        found.append(model.generate(custom_generate=decode, **options))
        assert torch.equal(found[-1], model.generate(**options))
    assert torch.equal(found[3], found[0]) and not torch.equal(found[1], found[0])


@pytest.mark.parametrize(
    "changed", [{"head_shares": HEADS}, {"slope_length": 3}], ids=lambda changed: next(iter(changed))
)
def test_what_finetune_changes_is_noticed(model, changed):
    layers = sparse_layers(model)
    with torch.no_grad():
        for layer in layers:
            layer.sparsek_scorer["default"].slope.copy_(torch.tensor([9.0, -5.0]))
    decode, options = CapturedDecoding(model), {"max_new_tokens": 12, "do_sample": False}
    model.generate(IDS, custom_generate=decode, **options)
    loop = decode._loop
    overwrite([layers[0].config], **changed)
    assert torch.equal(model.generate(IDS, custom_generate=decode, **options), model.generate(IDS, **options))
    assert decode._loop is not loop
    loop = decode._loop
    model.generate(IDS, custom_generate=decode, **options)
    assert decode._loop is loop


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "know no beams"),
        ({"return_dict_in_generate": True}, "return tokens only"),
        ({"repetition_penalty": 1.3}, "got RepetitionPenaltyLogitsProcessor"),
        ({"logits_processor": LogitsProcessorList([Nothing()])}, "got Nothing"),
        ({"max_time": 1.0}, "know the stopping criteria max_length and eos_token_id"),
    ],
)
def test_what_it_does_not_know_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(IDS, custom_generate=CapturedDecoding(model), max_new_tokens=3, **options)


def test_a_cache_that_came_is_refused(model):
    cache = SparseKCache(model)
    with pytest.raises(ValueError, match="cannot go on with the one that was given"):
        model.generate(IDS, custom_generate=CapturedDecoding(model), max_new_tokens=3, **with_cache(cache))


def test_a_cache_that_grows_is_refused(tiny_llama):
    model = patch(tiny_llama(), SparsefinderConfig(predictor="full"))
    with pytest.raises(ValueError, match="which grows"):
        CapturedDecoding(model)
    with pytest.raises(ValueError, match="no attention of the model is sparse"):
        CapturedDecoding(tiny_llama())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        hf_sparse.CapturedDecoding(model, steps=0)


def test_compiled_steps(model, monkeypatch):
    if DEVICE == "cpu":  # inductor would call a compiler of C++
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    decode = CapturedDecoding(model, compiled=True)
    options = {"max_new_tokens": 20, "do_sample": False}
    found = [model.generate(ids, custom_generate=decode, **options) for ids in (IDS, IDS[:, :33])]
    assert torch.equal(found[0], model.generate(IDS, **options))
    assert torch.equal(found[1], model.generate(IDS[:, :33], **options))
