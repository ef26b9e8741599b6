"""LLaVA with images: the patches of an image are keys like others, and the vision tower is left alone."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model

import hf_sparse
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.patches import patch, sparse_layers, unpatch

_SPEC = importlib.util.spec_from_file_location("families_of_llava", Path(__file__).parents[1] / "families.py")
_families = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_families)
LLAVA, IMAGE = _families.FAMILIES["llava"], _families.VOCABULARY - 1

PATCHES = 36  # 24 x 24 pixels in patches of 4 x 4
TEXT = torch.randint(3, IMAGE, (1, 60), generator=torch.Generator().manual_seed(1))
IDS = torch.cat([TEXT[:, :5], torch.full((1, PATCHES), IMAGE), TEXT[:, 5:]], 1)
PIXELS = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(2))
BUDGET = {"k": 12, "window": 6, "sinks": 2}


def config(**changes):
    return hf_sparse.SparseKConfig(**BUDGET | changes)


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **{"pixel_values": PIXELS, "use_cache": False} | options).logits


def make(**changes):
    torch.manual_seed(0)
    return patch(LLAVA.make(), config(**changes)).eval()


def test_patched_is_the_text_model_alone():
    base = LLAVA.make()
    dense, implementation = logits(base), base.config.vision_config._attn_implementation
    model = make()
    assert [layer.layer for layer in sparse_layers(model)] == [0, 1]
    assert not any(hasattr(module, "sparse_attention") for module in model.model.vision_tower.modules())
    assert model.config.vision_config._attn_implementation == implementation
    assert (logits(model) - dense).abs().max() > 0.1
    torch.testing.assert_close(logits(make(k=200)), dense, rtol=0, atol=1e-5)  # the budget covers all keys
    assert torch.equal(logits(unpatch(model)), dense)


def test_patches_of_an_image_are_chosen_like_other_keys():
    """They take slots by their scores, and what is read in them reaches the text long after the window."""
    model = make()
    first = model(IDS[:, :50], pixel_values=PIXELS, use_cache=True)
    kept = torch.cat([layer.positions[..., : layer.slots].flatten() for layer in cache_of(first).layers]).unique()
    image = (kept >= 5) & (kept < 5 + PATCHES)
    assert image.any() and (~image).any()
    other = logits(model, pixel_values=-PIXELS)
    assert (logits(model) - other)[:, 60:].abs().max() > 1e-3


def test_decoding_equals_one_forward():
    model = make()
    expected = logits(model)
    with torch.no_grad():
        output = model(IDS[:, :50], pixel_values=PIXELS, use_cache=True)
        steps = [output.logits]
        for i in range(50, IDS.shape[1]):
            output = model(IDS[:, i : i + 1], **with_cache(cache_of(output)), use_cache=True)
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-4)
    answer = model.generate(IDS, pixel_values=PIXELS, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] == IDS.shape[1] + 8


def test_an_adapter_comes_back(tmp_path):
    LLAVA.make().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    base = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype="float32")
    model = get_peft_model(base, config()).train()
    model(IDS, pixel_values=PIXELS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = hf_sparse.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_another_text_model_is_refused_with_the_reason():
    settings = LLAVA.settings | {"text_config": LLAVA.settings["text_config"] | {"model_type": "qwen2"}}
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**settings))
    with pytest.raises(UnsupportedModelError, match="its text model is of type 'qwen2', and its patch is for 'llama'"):
        patch(model, config())
