"""Sparsefinder in whole models: patched and unpatched, padded, in steps with a cache, in beams."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from hf_sparse import SparsefinderConfig, SparseKCache, patch, unpatch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.core.overrides import override
from hf_sparse.methods.sparsefinder import SparsefinderAttention, SparsefinderCacheLayer, fit_predictors
from hf_sparse.methods.sparsefinder.static_cache import StaticSparsefinderCacheLayer
from hf_sparse.patches import sparse_layers

pytestmark = pytest.mark.versions

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
# Of 6 tiles, each query tile lists its own, the first, and a predicted one.
SIZES = {"tile": 16, "tiles_per_query": 3, "window": 1, "clusters": 5, "top_clusters": 1, "bins": 4}
PREDICTORS = {
    "clustering": {},
    "clustering of tokens": {"tile": None},
    "quantization by group": {"predictor": "quantization", "per_group": True, "shared_projection": True},
    "complete": {"complete": True, "tiles_per_query": 1, "learn_alpha": True},
    "bound": {"predictor": "bound"},
}
LENGTH = 90
LENGTHS = (LENGTH, 41, 7)
IDS = torch.randint(3, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def sparse(name="llama", predictor="clustering", layers=None, **changes):
    model = patch(FAMILIES[name].make(**changes), SparsefinderConfig(**SIZES | PREDICTORS[predictor], layers=layers))
    text = torch.randint(3, 64, (2, 64), generator=torch.Generator().manual_seed(1))
    fit_predictors(sparse_layers(model, SparsefinderAttention), lambda: model(text))
    return model


@pytest.fixture(params=PREDICTORS)
def predictor(request):
    return request.param


def padded(side):
    """Ids, attention mask, and where the tokens of each row stand."""
    rows = [slice(LENGTH - n, LENGTH) if side == "left" else slice(0, n) for n in LENGTHS]
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, (place, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        ids[row, place] = IDS[row, :length]
        mask[row, place] = 1
    return ids, mask, rows


def positions(name, mask):
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    return counted + 1 if name == "roberta" else counted  # pad_token_id + 1


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_patched_and_unpatched(name):
    family = FAMILIES[name]
    model = family.make()
    before, config = logits(model), model.config.to_dict()
    patch(model, SparsefinderConfig(predictor="full"))
    shapes = [method.shape for method in sparse_layers(model, SparsefinderAttention)]
    text = model.config.get_text_config()
    query_heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", 4)
    assert {(shape.num_attention_heads, shape.num_key_value_heads) for shape in shapes} == {(query_heads, kv_heads)}
    assert {shape.head_dim for shape in shapes} == {family.settings.get("head_dim", 8)}
    assert [shape.layer for shape in shapes] == [
        i for i in range(len(shapes) + len(family.local)) if i not in family.local
    ]
    assert (logits(model) - before).abs().max() > 0.05
    unpatch(model)
    assert torch.equal(logits(model), before) and model.config.to_dict() == config


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * family.kin) for name, family in FAMILIES.items()]
)
def test_the_bound_is_exact_in_every_family(name):
    dense = logits(patch(FAMILIES[name].make(), SparsefinderConfig(predictor="full")))
    torch.testing.assert_close(logits(sparse(name, "bound")), dense, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(sparse(name, "complete")), dense, rtol=0, atol=1e-4)
    assert (logits(sparse(name, "clustering")) - dense).abs().max() > 1e-2


def test_steps_follow_an_alpha_that_is_overridden():
    model = patch(FAMILIES["llama"].make(), SparsefinderConfig(predictor="full"))
    configs = [layer.config for layer in sparse_layers(model)]

    def error_of_a_step():
        with torch.no_grad():
            cache = cache_of(model(IDS[:, :-1]))
            step = model(IDS[:, -1:], **with_cache(cache)).logits
            return (step - model(IDS).logits[:, -1:]).abs().max()

    assert error_of_a_step() < 1e-4  # and the layers keep what a step needs
    with override(configs, alpha=1.9):
        assert error_of_a_step() < 1e-4


@pytest.mark.cross("values")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "modernbert"])
def test_padding_equals_each_row_alone(name, side, predictor):
    model = sparse(name, predictor)
    ids, mask, rows = padded(side)
    together = logits(model, ids, attention_mask=mask, position_ids=positions(name, mask))
    assert torch.isfinite(together).all()
    for row, (place, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        alone = logits(model, IDS[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1, place], alone, rtol=0, atol=1e-4)


# Generation.


@pytest.mark.cross("values")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_steps_with_a_cache_equal_one_forward(name, predictor):
    model = sparse(name, predictor)
    ids, mask, _ = padded("left")
    position = positions(name, mask)
    whole = logits(model, ids, attention_mask=mask, position_ids=position, use_cache=False)
    cache, parts, begin = None, [], 0
    for length in (40, 1, 1, 28, *[1] * 20):
        new = slice(begin, begin + length)
        inputs = {"attention_mask": mask[:, : new.stop], "position_ids": position[:, new], **with_cache(cache)}
        with torch.no_grad():
            output = model(ids[:, new], use_cache=True, **inputs)
        cache, begin = cache_of(output), new.stop
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-4)
    patched = {method.layer for method in sparse_layers(model)}
    assert {i for i, layer in enumerate(cache.layers) if type(layer) is SparsefinderCacheLayer} == patched


@pytest.mark.cross("values")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "one layer"])
def test_generate_with_a_cache_equals_generate_without(predictor, layers, options):
    model = sparse("llama", predictor, layers)
    ids, mask, _ = padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **options}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)


def test_assisted_generation_crops_the_cache():
    model = sparse()
    text = IDS[:1, :10].repeat(1, 4)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(text, prompt_lookup_num_tokens=4, **options), model.generate(text, **options))


@pytest.mark.parametrize("make", [SparseKCache, lambda model: DynamicCache()], ids=["SparseKCache", "DynamicCache"])
def test_a_cache_of_ones_own_across_turns(make):
    model = sparse()
    cache, text = make(model), IDS[:1, :30]
    for _ in range(2):
        answer = model.generate(text, **with_cache(cache), max_new_tokens=8, do_sample=False)
        assert torch.equal(answer, model.generate(text, max_new_tokens=8, do_sample=False))
        text = torch.cat([answer, IDS[1:2, :15]], 1)
    assert {type(layer) for layer in cache.layers} == {SparsefinderCacheLayer}


def test_dense_steps_in_between_are_noticed():
    model = sparse()
    cache = cache_of(model(IDS[:, :30], use_cache=True))
    for method in sparse_layers(model):
        method.switch(False)
    dense = model(IDS[:, 30:40], **with_cache(cache)).logits
    assert torch.isfinite(dense).all() and cache.get_seq_length() == 40
    for method in sparse_layers(model):
        method.switch(True)
    with pytest.raises(ValueError, match="start a new cache after switching adapters"):
        model(IDS[:, 40:], **with_cache(cache))


STATIC = {
    "clustering": {"tile": 8, "window": 1, "global_tokens": 0},
    "a list per query, of a group": {"tile": 8, "query_tile": 1, "per_group": True, "global_tokens": 9},
    "quantization, budgets of heads": {"tile": 8, "predictor": "quantization", "head_budgets": True},
    "distance": {"tile": 8, "query_tile": 2, "predictor": "distance", "learn_alpha": True, "window": 12},
    "complete": {"tile": 8, "complete": True},
    "bound": {"predictor": "bound"},
    "all keys": {"predictor": "full"},
}


@pytest.fixture
def nothing_is_compiled_twice():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[pytest.mark.full] * (name not in ("clustering", "all keys")))
        for name, settings in STATIC.items()
    ],
)
def test_a_static_cache_compiles_and_equals_the_ordinary_one(settings, nothing_is_compiled_twice):
    model = patch(FAMILIES["llama"].make().eval(), SparsefinderConfig(**SIZES | settings, initial_scale=3.0))
    fit_predictors(sparse_layers(model, SparsefinderAttention), lambda: model(IDS, use_cache=False))
    ids, mask, _ = padded("left")
    predicts = settings.get("predictor", "clustering") not in ("bound", "full") and "complete" not in settings
    ids, mask = (IDS, torch.ones_like(IDS)) if predicts else (ids, mask)
    text = {"input_ids": ids, "attention_mask": mask}
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**text, **options)
    compiled = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    for changes in ({"disable_compile": True}, {"compile_config": compiled}):
        output = model.generate(**text, **options, **changes, cache_implementation="static")
        assert {type(layer) for layer in cache_of(output).layers} == {StaticSparsefinderCacheLayer}
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_a_static_cache_in_chunks_beams_and_again():
    model = sparse(predictor="quantization by group")
    options = {"max_new_tokens": 10, "do_sample": False}
    for changes in ({"prefill_chunk_size": 16}, {"num_beams": 2}):
        expected = model.generate(IDS, **options, **changes)
        assert torch.equal(model.generate(IDS, **options, **changes, cache_implementation="static"), expected)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 10)
    for begin in (0, 7):
        text = IDS[:, begin:]
        assert torch.equal(model.generate(text, **options, **with_cache(cache)), model.generate(text, **options))
        cache.reset()


def test_what_a_static_cache_refuses():
    ids, mask, _ = padded("left")
    options = {"max_new_tokens": 2, "cache_implementation": "static"}
    with pytest.raises(ValueError, match=r"predicted graphs takes texts without padding, .* use the ordinary cache"):
        sparse().generate(ids, attention_mask=mask, **options)
    with pytest.raises(ValueError, match=r"joins single tokens \(`tile=None`\): use the ordinary cache"):
        sparse(predictor="clustering of tokens").generate(IDS, **options)
    with pytest.raises(ValueError, match=r"needs every full-attention layer patched, .* use the ordinary cache"):
        sparse(layers=[0]).generate(IDS, **options)


def test_dense_steps_in_a_static_cache_are_noticed():
    model = sparse(predictor="bound")
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(IDS[:, :30], **with_cache(cache))
    for method in sparse_layers(model):
        method.switch(False)
    with pytest.raises(RuntimeError, match=r"static cache belongs to sparse attention.*: start a new cache"):
        model(IDS[:, 30:40], **with_cache(cache))


def test_switched_off_a_static_cache_is_dense():
    model = sparse()
    for method in sparse_layers(model):
        method.switch(False)
    ids, mask, _ = padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), model.generate(ids, **options))


def test_complete_goes_on_after_steps():
    """Steps keep no codes; what comes after them is exact all the same."""
    model = sparse(predictor="complete")
    cache = cache_of(model(IDS[:, :30], use_cache=True))
    with torch.no_grad():
        for begin, end in ((30, 31), (31, 32), (32, 80), (80, LENGTH)):
            logits = model(IDS[:, begin:end], **with_cache(cache)).logits
    torch.testing.assert_close(logits, model(IDS).logits[:, 80:], rtol=1e-4, atol=1e-4)


def test_an_encoder_takes_no_cache():
    model = sparse("bert", model="BertModel")
    with pytest.raises(ValueError, match="has no KV cache: pass none"):
        model(IDS, **with_cache(DynamicCache()))


@pytest.mark.parametrize("chunk", [7, 16])
@pytest.mark.parametrize("settings", [{"predictor": "bound"}, {"predictor": "bound", "tile": 8, "query_tile": 1}])
def test_padded_rows_in_chunks_and_turns(settings, chunk):
    model = patch(FAMILIES["llama"].make().eval(), SparsefinderConfig(**settings))
    ids = torch.randint(3, 64, (3, 30), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :3] = 0, 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    whole = model.generate(**options)
    assert torch.equal(model.generate(**options, prefill_chunk_size=chunk), whole)
