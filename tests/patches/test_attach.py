"""Patching a model and taking the patch off again."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from transformers import CTRLConfig, CTRLLMHeadModel, LlamaForCausalLM

from hf_sparse import SparsefinderConfig, SparseKConfig, patch, patched, unpatch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.core.layer import AttentionShape
from hf_sparse.errors import AdapterMismatchError, UnsupportedModelError
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.patches import Family, register_family, sparse_layers, sparse_layers_in_use, supported_model_types

pytestmark = pytest.mark.versions

BUDGET = {"k": 6, "window": 8, "sinks": 2}
IDS = torch.randint(2, 64, (2, 50), generator=torch.Generator().manual_seed(0))


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def anatomy(model):
    """Everything a patch could leave behind."""
    hooks = {
        name: (len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    }
    parameters = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    return hooks, parameters, vars(model.config).copy(), model.config.to_dict(), vars(model.generation_config).copy()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_unpatching_leaves_nothing_behind(tiny_llama, implementation, layers):
    model = tiny_llama(attn_implementation=implementation)
    before, expected = anatomy(model), logits(model)
    assert patch(model, SparseKConfig(**BUDGET, layers=layers)) is model
    assert len(sparse_layers(model)) == (2 if layers is None else 1)
    assert (logits(model) - expected).abs().max() > 0.1, "the patch changed nothing"
    assert unpatch(model) is model
    assert sparse_layers(model) == []
    assert anatomy(model) == before
    assert torch.equal(logits(model), expected)


def test_the_context_manager_unpatches_after_an_exception(tiny_llama):
    model = tiny_llama()
    before, expected = anatomy(model), logits(model)
    with pytest.raises(KeyError, match="mine"), patched(model, SparseKConfig(**BUDGET)) as inside:
        assert inside is model and len(sparse_layers(model)) == 2
        raise KeyError("mine")
    assert anatomy(model) == before
    assert torch.equal(logits(model), expected)


def test_methods_come_in_the_order_of_the_layers(tiny_llama):
    model = patch(tiny_llama(num_hidden_layers=12), SparseKConfig(**BUDGET, layers=[10, 2, 9]))
    assert [method.layer for method in sparse_layers(model)] == [2, 9, 10]


def test_the_configuration_is_filled_in(tiny_llama):
    config = SparseKConfig(**BUDGET)
    model = patch(tiny_llama(), config)
    assert config.base_shape is None  # the caller's own can serve for another model
    assert sparse_layers(model)[0].config.base_shape == {
        "model_type": "llama",
        "hidden_size": 32,
        "num_key_value_heads": 2,
        "num_attention_layers": 2,
        "model_class": "LlamaForCausalLM",
    }


def test_an_adapter_of_another_base_is_refused_before_anything_changes(tiny_llama):
    config = sparse_layers(patch(tiny_llama(), SparseKConfig(**BUDGET)))[0].config
    other = tiny_llama(hidden_size=64, num_hidden_layers=3)
    before = anatomy(other)
    with pytest.raises(
        AdapterMismatchError, match=r"hidden_size: 32 there, 64 here; num_attention_layers: 2 there, 3 here"
    ):
        patch(other, config)
    assert anatomy(other) == before


def test_patching_twice_is_refused(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    with pytest.raises(ValueError, match="has an adapter 'default' already; unpatch it first or choose another name"):
        patch(model, SparseKConfig(**BUDGET))
    assert len(sparse_layers(model)) == 2


def test_unpatching_a_model_that_is_not_patched_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="expected a patched model, got a LlamaForCausalLM without sparse attention"):
        unpatch(tiny_llama())


def test_a_layer_that_is_not_there_is_refused(tiny_llama):
    model = tiny_llama()
    before = anatomy(model)
    with pytest.raises(ValueError, match=r"layers \[2, 7\] do not exist: the model has 2 attention layers"):
        patch(model, SparseKConfig(**BUDGET, layers=[0, 2, 7]))
    assert anatomy(model) == before


@pytest.mark.parametrize("names", ["q_proj", ["q_proj", "v_proj"], ["layers.0.self_attn"], "all-linear"])
@pytest.mark.parametrize("attach", [patch, get_peft_model])
def test_names_of_other_modules_are_refused(tiny_llama, names, attach):
    """They are what LoRA is configured by; here they would choose nothing."""
    model = tiny_llama()
    before = anatomy(model)
    with pytest.raises(
        ValueError, match=r"target_modules is filled in .*'model\.layers\.0\.self_attn'.*layers=\[...\]"
    ):
        attach(model, SparseKConfig(**BUDGET, target_modules=names))
    assert anatomy(model) == before


@pytest.mark.parametrize("names", ["self_attn", ["layers.0.self_attn", "layers.1.self_attn"]])
def test_names_of_what_is_patched_say_the_same(tiny_llama, names):
    assert len(sparse_layers(patch(tiny_llama(), SparseKConfig(**BUDGET, target_modules=names)))) == 2


def test_a_family_without_a_patch_is_refused_with_a_list_of_those_with_one():
    model = CTRLLMHeadModel(CTRLConfig(vocab_size=64, n_embd=32, dff=32, n_layer=1, n_head=2))
    with pytest.raises(
        UnsupportedModelError, match=r"no sparse attention patch for model type 'ctrl'; supported: .*gpt2, .*llama"
    ):
        patch(model, SparseKConfig(**BUDGET))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda llama: torch.nn.Linear(2, 2), "expected a transformers PreTrainedModel, got Linear"),
        (
            lambda llama: __import__("peft").get_peft_model(llama, SparseKConfig(**BUDGET)),
            r"got PeftModel\w* \(merge its adapter first: merge_and_unload\(\), or unload\(\) to drop it",
        ),
    ],
    ids=["Linear", "PeftModel"],
)
def test_what_is_not_a_transformers_model_is_refused(tiny_llama, make, message):
    with pytest.raises(UnsupportedModelError, match=message):
        patch(make(tiny_llama()), SparseKConfig(**BUDGET))


class _Attention(torch.nn.Module):
    """What a family with the defaults looks at."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


_ATTENTION = f"{__name__}:_Attention"


def test_the_defaults_of_a_family():
    family = Family(("some",), attention=_ATTENTION, hidden_size=lambda m: 1, num_key_value_heads=lambda m: 1)
    plain, encoder = _Attention(sliding_window=None), _Attention(is_causal=False)
    local, cross = _Attention(sliding_window=4, is_causal=True), _Attention(is_cross_attention=True)
    assert [family.causal(module) for module in (plain, encoder, local)] == [True, False, True]
    assert [family.is_local(module) for module in (plain, encoder, local)] == [False, False, True]
    assert family.refusal(plain) is None
    model = torch.nn.Sequential(plain, torch.nn.Sequential(cross, encoder), local)
    assert list(family.modules(model)) == [("0", plain), ("1.1", encoder), ("2", local)]


@pytest.mark.parametrize("name", ["head_dim", "attention_head_size", "head_size"])
def test_a_family_tells_what_its_modules_look_like(name):
    family = Family(("some",), attention=_ATTENTION, hidden_size=lambda m: 24, num_key_value_heads=lambda m: 2)
    module = _Attention(config=SimpleNamespace(num_attention_heads=6), is_causal=False, **{name: 4})
    expected = AttentionShape(24, num_attention_heads=6, num_key_value_heads=2, head_dim=4, layer=5, causal=False)
    assert family.shape_of(module, layer=5) == expected


def test_methods_are_found_by_kind(tiny_llama):
    model = patch(tiny_llama(), SparsefinderConfig())
    assert sparse_layers(model, SparseKAttention) == sparse_layers_in_use(model, SparseKAttention) == []
    assert len(sparse_layers(model, SparsefinderAttention)) == 2
    assert sparse_layers(model, SparsefinderAttention) == sparse_layers(model) == sparse_layers_in_use(model)


def test_families():
    assert "llama" in supported_model_types()
    with pytest.raises(ValueError, match="model type 'llama' is registered already"):
        register_family(
            Family(
                model_types=("llama",),
                attention="torch.nn:Module",
                hidden_size=lambda module: 1,
                num_key_value_heads=lambda module: 1,
            )
        )


# Layers.


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_layers_that_are_not_named_stay_dense(tiny_llama, layer, padded):
    """Compared with all layers patched, where the others have a budget that covers the sequence."""
    model = patch(tiny_llama(), SparseKConfig(**BUDGET, layers=[layer]))
    reference = patch(tiny_llama(), SparseKConfig(**BUDGET))
    methods = sparse_layers(reference)
    methods[1 - layer].configs["default"] = SparseKConfig(k=500, window=1)
    methods[layer].load_state_dict(sparse_layers(model)[0].state_dict())
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, :13] = 0
    kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    shown = mask.bool()
    torch.testing.assert_close(logits(model, **kwargs)[shown], logits(reference, **kwargs)[shown], rtol=0, atol=1e-5)
    assert (logits(model, **kwargs) - logits(tiny_llama(), **kwargs))[shown].abs().max() > 0.1
    tokens = [m.generate(IDS, attention_mask=mask, max_new_tokens=15, do_sample=False) for m in (model, reference)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("chunks", [[50], [20, 30], [20, 1, 1, 28]])
def test_a_mixed_model_continues_its_cache(tiny_llama, chunks, padded):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET, layers=[1]))
    mask = torch.ones_like(IDS)
    mask[1, : 13 * padded] = 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = logits(model, attention_mask=mask, position_ids=position)
    cache, parts, begin = None, [], 0
    for length in chunks:
        end = begin + length
        with torch.no_grad():
            output = model(
                IDS[:, begin:end],
                attention_mask=mask[:, :end] if padded else None,
                position_ids=position[:, begin:end],
                **with_cache(cache),
                use_cache=True,
            )
        cache, begin = cache_of(output), end
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-5)


# The dense limit.


@pytest.mark.parametrize("budget", [(50, 1, 0), (1, 50, 0), (30, 16, 4), (500, 500, 500)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_budget_of_the_length_is_the_base_model(tiny_llama, budget, training):
    k, window, sinks = budget
    expected = logits(tiny_llama())
    model = patch(tiny_llama(), SparseKConfig(k=k, window=window, sinks=sinks)).train(training)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_budget_of_the_length_generates_like_the_base_model(tiny_llama):
    expected = tiny_llama().generate(IDS, max_new_tokens=30, do_sample=False)
    model = patch(tiny_llama(), SparseKConfig(k=40, window=36, sinks=4))
    assert torch.equal(model.generate(IDS, max_new_tokens=30, do_sample=False), expected)


# Copies, devices and dtypes.


def test_a_deep_copy_is_independent(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        for method in sparse_layers(twin):
            method.sparsek_scorer["default"].weight.normal_()
    assert (logits(twin) - expected).abs().max() > 0.1
    unpatch(twin)
    assert torch.equal(logits(twin), logits(tiny_llama()))
    assert torch.equal(logits(model), expected)
    assert sparse_layers(model) and not sparse_layers(twin)


@pytest.mark.parametrize("order", ["patch, then move", "move, then patch"])
def test_bfloat16(tiny_llama, order, monkeypatch):
    model = tiny_llama()
    if order == "patch, then move":
        model = patch(model, SparseKConfig(**BUDGET)).to(torch.bfloat16)
    else:
        model = patch(model.to(torch.bfloat16), SparseKConfig(**BUDGET))
    seen = []
    score = SparseKAttention.score

    def watched(self, *args):
        seen.append(score(self, *args))
        return seen[-1]

    monkeypatch.setattr(SparseKAttention, "score", watched)
    output = model.generate(IDS, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert {scores.dtype for scores in seen} == {torch.float32} and len(seen) >= 2  # of the prompt, in two layers
    assert {layer.scores.dtype for layer in cache_of(output).layers} == {torch.float32}
    assert {layer.keys.dtype for layer in cache_of(output).layers} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_patching_follows_the_mode_of_the_model(tiny_llama):
    for training in (True, False):
        model = patch(tiny_llama().train(training), SparseKConfig(**BUDGET))
        assert all(method.training == training for method in sparse_layers(model))


def test_a_second_adapter_waits_until_it_is_chosen(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    first = logits(model)
    patch(model, SparseKConfig(k=2, window=3, sinks=1), adapter="small")
    assert torch.equal(logits(model), first)
    for method in sparse_layers(model):
        method.set_adapter("small")
    assert (logits(model) - first).abs().max() > 0.1
    unpatch(model)
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_an_adapter_for_other_layers_leaves_the_first_ones_dense(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET, layers=[0]), adapter="low")
    low = logits(model)
    patch(model, SparseKConfig(**BUDGET, layers=[1]), adapter="high")
    assert torch.equal(logits(model), low)
    for chosen, layer in (("high", 1), ("low", 0)):
        for method in sparse_layers(model):
            method.set_adapter(chosen)
        alone = patch(tiny_llama(), SparseKConfig(**BUDGET, layers=[layer]))
        scorer = sparse_layers(model)[layer].sparsek_scorer[chosen]
        sparse_layers(alone)[0].sparsek_scorer["default"].load_state_dict(scorer.state_dict())
        torch.testing.assert_close(logits(model), logits(alone), rtol=0, atol=1e-6)
        assert torch.equal(
            model.generate(IDS, max_new_tokens=10, do_sample=False),
            alone.generate(IDS, max_new_tokens=10, do_sample=False),
        )


def test_an_offloaded_base_is_refused(tiny_llama):
    model = tiny_llama()
    cpu_offload(model, "cpu")
    with pytest.raises(UnsupportedModelError, match="the base model is offloaded"):
        patch(model, SparseKConfig(**BUDGET))


def test_another_attention_implementation_is_refused(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET)).eval()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="was changed to 'sdpa', which would ignore its sparse attention"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_models_that_share_a_config_are_refused(tiny_llama):
    first = patch(tiny_llama(), SparseKConfig(**BUDGET))
    with pytest.raises(ValueError, match="config is shared with another patched model"):
        patch(type(first)(first.config), SparseKConfig(**BUDGET))


def test_patched_refuses_a_patched_model(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET), adapter="mine")
    with pytest.raises(ValueError, match="patched already"), patched(model, SparseKConfig(**BUDGET)):
        pass
    assert all(method.active == "mine" for method in sparse_layers(model))


def test_unpatch_sends_peft_models_to_unload(tiny_llama):
    model = get_peft_model(tiny_llama(), SparseKConfig(**BUDGET))
    with pytest.raises(UnsupportedModelError, match=r"got PeftModel: its unload\(\) returns the base model"):
        unpatch(model)
    assert sparse_layers(model.unload()) == []


# Saving.


@pytest.fixture(params=[SparseKConfig(**BUDGET), SparsefinderConfig()], ids=["SparseK", "Sparsefinder"])
def a_config(request):
    return request.param


@pytest.mark.parametrize(
    ("made_by", "call"),
    [
        ("get_peft_model", "save_pretrained"),
        ("patch", "save_pretrained and push"),
        *((made_by, "push_to_hub") for made_by in ("patch", "get_peft_model", "deepcopy", "pickle")),
    ],
)
def test_a_patched_model_publishes_no_checkpoint_that_loads_dense(tiny_llama, a_config, made_by, call, tmp_path):
    """Nor writes one; what `patch` patched is saved with its adapter (tests/patches/test_saving.py)."""
    model = tiny_llama()
    model = get_peft_model(model, a_config).get_base_model() if made_by == "get_peft_model" else patch(model, a_config)
    if made_by == "deepcopy":
        model = copy.deepcopy(model)
    if made_by == "pickle":
        model = pickle.loads(pickle.dumps(model))
    target = tmp_path / "saved"
    name, _, pushes = call.partition(" ")
    with pytest.raises(ValueError, match=r" save the PeftModel .* attention off first") as caught:
        getattr(model, name)(str(target), **{"push_to_hub": True} if pushes else {})
    assert "\n" not in str(caught.value) and not target.exists()
    unpatch(model)
    assert not {"save_pretrained", "load_state_dict", "push_to_hub"} & vars(model).keys()
    model.save_pretrained(target)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(target)), logits(tiny_llama()))


def test_a_patched_model_that_no_name_holds_writes_none_either(tiny_llama, a_config, tmp_path):
    with pytest.raises(ValueError, match="take sparse attention off first"):
        patch(tiny_llama(), a_config).save_pretrained(tmp_path / "saved")


def test_what_stands_around_it_does_not_save_it_either(tiny_llama, a_config, tmp_path):
    model = get_peft_model(tiny_llama(), a_config)
    with pytest.raises(ValueError, match="take sparse attention off first"):
        model.base_model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    model.unload().save_pretrained(tmp_path / "base")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "base")), logits(tiny_llama()))


def test_a_patched_model_goes_with_its_last_user(tiny_llama):
    gc.collect()
    gc.disable()  # counting references must do
    try:
        model = patch(tiny_llama(), SparseKConfig(**BUDGET))
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()
