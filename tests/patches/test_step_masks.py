"""Masks of decoding steps are those of transformers, and come without its detours."""

import pytest
import torch
from transformers import StaticCache
from transformers.masking_utils import create_masks_for_generate
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM

from hf_sparse import SparseCache, SparsefinderConfig, SparseKConfig, patch, unpatch
from hf_sparse._compat import with_cache
from hf_sparse.patches import switch

IDS = torch.randint(2, 64, (2, 30), generator=torch.Generator().manual_seed(0))
METHODS = [SparseKConfig(k=6, window=8, sinks=2), SparsefinderConfig(predictor="full", tile=4)]


def qwen(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **changes, bos_token_id=None, eos_token_id=None)).eval()


def arguments(model, cache, mask, **others):
    named = {"config": model.config, "inputs_embeds": torch.empty(2, 1, 0), "attention_mask": mask, **with_cache(cache)}
    return named | others


def padded(length):
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, :5] = 0
    return mask


@pytest.mark.parametrize("method", METHODS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("newest", [0, 1])
def test_masks_are_those_of_transformers(newest, is_static, family, method, tiny_llama, monkeypatch):
    model = patch(tiny_llama() if family == "llama" else qwen(), method)
    cache = StaticCache(config=model.config, max_cache_len=40) if is_static else SparseCache(model)
    mask = padded(31)
    mask[0, 30] = newest  # a row that has ended
    with torch.no_grad():
        model(IDS, attention_mask=mask[:, :30], use_cache=True, **with_cache(cache))
    for tokens in (mask, torch.ones_like(mask)):
        named = arguments(model, cache, tokens)
        expected = create_masks_for_generate(**named)
        monkeypatch.setattr(switch, "create_masks_for_generate", None)  # which is not called
        found = model.create_masks_for_generate(**named)
        monkeypatch.undo()
        assert type(found) is type(expected)
        pairs = [(found, expected)] if not isinstance(found, dict) else [(found[k], expected[k]) for k in expected]
        assert len(pairs) == 1
        for ours, theirs in pairs:
            assert (ours is None) == (theirs is None)
            assert ours is None or (torch.equal(ours, theirs) and ours.stride() == theirs.stride())


def test_other_masks_are_left_to_transformers(tiny_llama, monkeypatch):
    called = []
    monkeypatch.setattr(switch, "create_masks_for_generate", lambda **named: called.append(named))
    model = patch(tiny_llama(), METHODS[0])
    windows = patch(qwen(use_sliding_window=True, sliding_window=8, max_window_layers=1), METHODS[0])
    cache, mask = SparseCache(model), padded(31)
    for asked in (
        arguments(model, cache, mask, inputs_embeds=torch.empty(2, 2, 0)),
        arguments(model, cache, mask, or_mask_function=lambda *_: True),
        arguments(model, cache, mask[:, None, None]),
        arguments(model, cache, None),
        arguments(model, None, mask),
        arguments(windows, SparseCache(windows), mask),
    ):
        before = len(called)
        (windows if asked["config"] is windows.config else model).create_masks_for_generate(**asked)
        assert len(called) == before + 1


def test_a_model_makes_its_masks_by_itself_after_it_is_taken_back(tiny_llama):
    model = patch(tiny_llama(), METHODS[0])
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    vars(model).pop("create_masks_for_generate")
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), expected)
    assert not hasattr(unpatch(patch(unpatch(model), METHODS[0])), "create_masks_for_generate")
