"""The quirks of each decoder family: what its attention module is called with, and which of its layers are local.

`tests/conformance/` holds every family to the same list of behaviours; here are the variants within a family.
"""

import runpy
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

from hf_sparse import SparsefinderConfig, SparseKConfig, patch, unpatch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.errors import CompatibilityError, UnsupportedModelError
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.patches import sparse_layers, supported_model_types
from hf_sparse.patches.unsupported import REASONS

_ENTRIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))
FAMILIES, NOT_HERE = _ENTRIES["FAMILIES"], _ENTRIES["NOT_HERE"]
BUDGET = {"k": 5, "window": 6, "sinks": 2}
LENGTH = 50
IDS = torch.randint(3, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))
MASKS = {
    "left": torch.arange(LENGTH) >= torch.tensor([0, 9, 31])[:, None],
    "right": torch.arange(LENGTH) < torch.tensor([LENGTH, 37, 18])[:, None],
}

# Name: family, changes of its config, local layers.
UPPER_LOCAL = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
SECOND_LOCAL = {
    "use_sliding_window": True,
    "sliding_window": 12,
    "layer_types": ["full_attention", "sliding_attention"],
}
VARIANTS = {name: (name, {}, family.local) for name, family in FAMILIES.items() if family.causal} | {
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, ()),
    "gpt2, not scaled": ("gpt2", {"scale_attn_weights": False, "attn_implementation": "eager"}, ()),
    "gpt2, reordered": ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}, ()),
    "opt, as 350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, ()),
    "gpt_neox, one residual after another": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}, ()),
    "qwen2, upper layers local": ("qwen2", UPPER_LOCAL, (1, 2)),
    "qwen3, upper layers local": ("qwen3", UPPER_LOCAL, (1, 2)),
    "gemma3_text, first layer full": (
        "gemma3_text",
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
        (1, 2),
    ),
    "smollm3, upper layer local": ("smollm3", SECOND_LOCAL, (1,)),
    "qwen2_moe, upper layer local": ("qwen2_moe", SECOND_LOCAL, (1,)),
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.full if name in FAMILIES else ()) for name in VARIANTS])
def variant(request):
    """Makes base models of one variant; by default `tests/conformance/` alone runs the families themselves."""
    family, changes, local = VARIANTS[request.param]

    def make():
        return FAMILIES[family].make(**changes)

    make.local = local  # type: ignore[attr-defined]
    return make


def sparse(make, **budget):
    """A patched model whose scorers tell keys apart."""
    model = patch(make(), SparseKConfig(**{**BUDGET, **budget}, position_slope=1e-3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for method in sparse_layers(model):
            method.sparsek_scorer["default"].weight.normal_(std=0.3, generator=generator)
    return model


def positions(mask):
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def logits(model, ids=IDS, mask=None, **kwargs):
    if mask is not None:
        kwargs.update(attention_mask=mask.long(), position_ids=positions(mask))
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_chunks(model, chunks, mask=None, cache=None, **kwargs):
    parts, begin = [], 0
    for length in chunks:
        end = begin + length
        if mask is not None:
            kwargs.update(attention_mask=mask[:, :end].long(), position_ids=positions(mask)[:, begin:end])
        output = model(IDS[:, begin:end], **with_cache(cache), use_cache=True, **kwargs)
        parts.append(output.logits)
        cache, begin = cache_of(output), end
    return torch.cat(parts, 1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_every_supported_model_type_has_a_tiny_model():
    assert sorted([*FAMILIES, *NOT_HERE]) == supported_model_types()
    assert all(family.make().config.model_type == name for name, family in FAMILIES.items())


def test_full_layers_are_patched_and_local_ones_left_alone(variant):
    model = sparse(variant)
    layers = [method.layer for method in sparse_layers(model)]
    assert layers == [i for i in range(model.config.get_text_config().num_hidden_layers) if i not in variant.local]
    assert (logits(model) - logits(variant())).abs().max() > 0.1


def test_unpatching_restores_every_bit(variant):
    base = variant()
    expected, modules = logits(base), [name for name, _ in base.named_modules()]
    model = sparse(variant)
    assert not torch.equal(logits(model), expected)
    unpatch(model)
    assert torch.equal(logits(model), expected)
    assert [name for name, _ in model.named_modules()] == modules
    assert model.config._attn_implementation == base.config._attn_implementation


@pytest.mark.cross("values")
@pytest.mark.parametrize("padding", [None, *MASKS])
def test_budget_of_the_length_is_the_base_model(variant, padding):
    """The local layers' windows are far shorter than the text: had a patch widened them, it would show."""
    mask = None if padding is None else MASKS[padding]
    shown = slice(None) if mask is None else mask
    model = sparse(variant, k=LENGTH)
    close(logits(model, mask=mask)[shown], logits(variant(), mask=mask)[shown])
    close(in_chunks(model, [20, 10, *[1] * 20], mask)[shown], logits(variant(), mask=mask)[shown])


@pytest.mark.cross("values")
@pytest.mark.parametrize("chunks", [[30, *[1] * 20], [7, 1, 22, 20]], ids=["decode", "pieces"])
def test_any_split_equals_one_forward(variant, chunks):
    model = sparse(variant)
    close(in_chunks(model, chunks), logits(model))
    close(in_chunks(model, chunks, cache=DynamicCache()), logits(model))  # it does not know of local layers


@pytest.mark.cross("values")
@pytest.mark.parametrize("padding", MASKS)
def test_padding_equals_each_row_alone(variant, padding):
    model, mask = sparse(variant), MASKS[padding]
    whole, split = logits(model, mask=mask), in_chunks(model, [40, *[1] * 10], mask)
    for row in range(len(IDS)):
        alone = logits(model, IDS[row : row + 1, mask[row]])[0]
        close(whole[row, mask[row]], alone)
        close(split[row, mask[row]], alone)


@pytest.mark.cross("values")
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(variant, beams):
    model = sparse(variant)
    settings = {"attention_mask": MASKS["left"].long(), "max_new_tokens": 10, "do_sample": False, "num_beams": beams}
    expected = model.generate(IDS, **settings, use_cache=False)
    assert torch.equal(model.generate(IDS, **settings), expected)
    assert torch.equal(model.generate(IDS, **settings, cache_implementation="static", disable_compile=True), expected)


def test_attention_matrices_are_refused(variant):
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        sparse(variant)(IDS, output_attentions=True)


# Local layers.


@pytest.mark.parametrize("layers", [[1], [3], [1, 3]])
def test_layers_are_numbered_as_the_model_numbers_them(layers):
    model = patch(FAMILIES["gemma3_text"].make(), SparseKConfig(**BUDGET, layers=layers))
    assert [method.layer for method in sparse_layers(model)] == layers
    patched = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.self_attn, "sparse_attention")]
    assert patched == layers
    close(in_chunks(model, [30, *[1] * 20]), logits(model))


def test_naming_a_local_layer_is_refused():
    model = FAMILIES["gemma3_text"].make()
    with pytest.raises(ValueError, match=r"layers \[0, 2\] attend within a sliding window.*choose among \[1, 3\]"):
        patch(model, SparseKConfig(**BUDGET, layers=[0, 1, 2]))
    assert sparse_layers(model) == []


@pytest.mark.cross("values")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("window", [30, 100])
def test_a_prompt_shorter_than_the_local_window(window, cache):
    model = sparse(lambda: FAMILIES["gemma3_text"].make(sliding_window=window))
    settings = {"max_new_tokens": 40, "do_sample": False, "disable_compile": True}
    tokens = model.generate(IDS[:, :20], **settings, cache_implementation=cache)
    assert torch.equal(tokens, model.generate(IDS[:, :20], **settings, use_cache=False))


@pytest.mark.parametrize("family", ["mistral", "phi3", "mixtral", "starcoder2", "ministral3"])
def test_a_model_with_local_layers_only_is_refused(family):
    with pytest.raises(UnsupportedModelError, match=r"every attention layer .* local already .*20 tokens.*=None"):
        patch(FAMILIES[family].make(sliding_window=20), SparseKConfig(**BUDGET))


@pytest.mark.cross("values")
@pytest.mark.parametrize(
    "family, layers", [("bert", [1]), ("modernbert", [2]), ("gpt_neox", [1]), ("gemma3_text", [3])]
)
@pytest.mark.parametrize("padding", MASKS)
def test_unpatched_full_layers_see_the_padding_and_their_direction(family, layers, padding):
    mask, make = MASKS[padding], FAMILIES[family].make
    dense = patch(make(), SparseKConfig(k=LENGTH, window=6, layers=layers))
    close(logits(dense, mask=mask)[mask], logits(make(), mask=mask)[mask])
    model = patch(make(), SparseKConfig(**BUDGET, layers=layers))
    whole = logits(model, mask=mask)
    for row in range(len(IDS)):
        close(whole[row, mask[row]], logits(model, IDS[row : row + 1, mask[row]])[0])


# Cross-attention.


def test_cross_attention_stays_dense_and_works():
    def make():
        return FAMILIES["gpt2"].make(add_cross_attention=True)

    generator = torch.Generator().manual_seed(2)
    encoder = {
        "encoder_hidden_states": torch.randn(3, 9, 32, generator=generator),
        "encoder_attention_mask": (torch.arange(9) < torch.tensor([9, 5, 1])[:, None]).long(),
    }
    base = logits(make(), **encoder)
    close(logits(sparse(make, k=LENGTH), **encoder), base)
    model = sparse(make)
    assert len(sparse_layers(model)) == 2
    whole = logits(model, **encoder)
    assert (whole - base).abs().max() > 0.1 and (whole - logits(model)).abs().max() > 0.1
    close(logits(model, IDS[1:2], encoder_hidden_states=encoder["encoder_hidden_states"][1:2, :5]), whole[1:2])
    close(in_chunks(model, [30, *[1] * 20], **encoder), whole)
    settings = {**encoder, "max_new_tokens": 15, "do_sample": False, "num_beams": 3}
    assert torch.equal(model.generate(IDS, **settings), model.generate(IDS, **settings, use_cache=False))


# Refusals.


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, r"soft-capped \(attn_logit_softcapping=50.0\)"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "its attention is bidirectional"),
        ("gemma", {"use_bidirectional_attention": True}, "its attention is bidirectional"),
    ],
)
def test_models_that_would_come_out_wrong_are_refused(family, changes, message):
    model = FAMILIES[family].make(**changes)
    with pytest.raises(UnsupportedModelError, match=rf"Gemma\d?ForCausalLM cannot be patched: .*{message}"):
        patch(model, SparseKConfig(**BUDGET))
    assert sparse_layers(model) == []


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config, model, settings, message",
    [
        ("BloomConfig", "BloomForCausalLM", {}, "ALiBi adds a bias by distance"),
        ("MptConfig", "MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "ALiBi adds a bias by distance"),
        ("FalconConfig", "FalconForCausalLM", {}, "without the AttentionInterface, with ALiBi in some checkpoints"),
        ("GPTNeoConfig", "GPTNeoForCausalLM", {"num_layers": 2, "attention_types": [[["global"], 2]]}, "Interface"),
        ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 2, "intermediate_size": 32}, "a learned sink"),
        ("DebertaConfig", "DebertaForMaskedLM", {}, "logits depend on relative positions"),
        ("DebertaV2Config", "DebertaV2ForMaskedLM", {}, "logits depend on relative positions"),
    ],
)
def test_a_family_that_cannot_be_patched_is_refused_with_the_reason(config, model, settings, message):
    config = getattr(transformers, config)(**SMALL | settings)
    with pytest.raises(UnsupportedModelError, match=rf"'{config.model_type}' \(.*{message}.*\); supported: .*llama"):
        patch(getattr(transformers, model)(config), SparseKConfig(**BUDGET))


def test_reasons_are_of_families_without_a_patch():
    assert not REASONS.keys() & set(supported_model_types())
    assert REASONS.keys() <= set(transformers.CONFIG_MAPPING)


def test_an_attention_module_without_the_interface_is_refused(monkeypatch):
    monkeypatch.setattr(transformers.GPTJForCausalLM, "_supports_attention_backend", False)
    config = transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    with pytest.raises(UnsupportedModelError, match=r"GPTJForCausalLM cannot .* without the AttentionInterface"):
        patch(transformers.GPTJForCausalLM(config), SparseKConfig(**BUDGET))


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"softcap": 30.0}, r"LlamaAttention asks for soft-capped attention logits \(softcap\), which .* cannot do"),
        ({"s_aux": torch.zeros(4)}, r"learned attention sinks \(s_aux\)"),
        ({"position_bias": torch.zeros(1, 4, LENGTH, LENGTH)}, r"a position bias \(position_bias\)"),
        ({"sliding_window": 8}, r"a sliding window \(sliding_window\)"),
        ({"is_causal": False}, "is_causal=False was asked of a LlamaAttention patched as is_causal=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_ignored_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        logits(sparse(FAMILIES["llama"].make), **keywords)


def test_the_guide_shows_a_family_as_it_is():
    root = Path(__file__).parents[2]
    guide = "\n".join(line.removeprefix("   ") for line in (root / "CONTRIBUTING.md").read_text().splitlines())
    assert f"```python\n{(root / 'patches' / 'opt.py').read_text()}```\n" in guide


@pytest.mark.cross("values")
@pytest.mark.parametrize("config", [SparseKConfig(**BUDGET), SparsefinderConfig(predictor="full")], ids=["k", "finder"])
@pytest.mark.parametrize("filled_by", ["forward", "generate", "a dynamic cache", "the old name"])
def test_no_patched_layer_keeps_an_ordinary_cache_layer(variant, config, filled_by):
    model = patch(variant(), config)
    if filled_by == "forward":
        cache = cache_of(model(IDS, use_cache=True))
    elif filled_by == "generate":
        cache = cache_of(model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True))
    else:
        cache = DynamicCache()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from transformers 5.24 on
            model(IDS, **(with_cache(cache) if filled_by == "a dynamic cache" else {"past_key_values": cache}))
    for method in sparse_layers(model):
        assert type(cache.layers[method.layer]) is method.cache_layer_type
    assert [i for i, layer in enumerate(cache.layers) if type(layer) not in _OURS] == list(variant.local)


_OURS = {SparseKAttention.cache_layer_type, SparsefinderAttention.cache_layer_type}


def test_a_cache_under_an_unknown_name_is_refused(variant):
    model = patch(variant(), SparseKConfig(**BUDGET))
    cache = DynamicCache()
    module = next(module for module in model.modules() if hasattr(module, "sparse_attention"))

    def rename(module, args, kwargs):
        return args, {"memory" if value is cache else name: value for name, value in kwargs.items()}

    hook = module.register_forward_pre_hook(rename, with_kwargs=True, prepend=True)
    with pytest.raises(CompatibilityError, match="was called with a DynamicCache as memory, and hf-sparse knows"):
        model(IDS, **with_cache(cache))
    hook.remove()
    module.register_forward_pre_hook(
        lambda module, args, kwargs: (
            (*args, *(value for value in kwargs.values() if value is cache)),
            {name: value for name, value in kwargs.items() if value is not cache},
        ),
        with_kwargs=True,
        prepend=True,
    )
    with pytest.raises(CompatibilityError, match="a DynamicCache as its positional argument"):
        model(IDS, **with_cache(cache))
