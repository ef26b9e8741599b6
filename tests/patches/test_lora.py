"""LoRA beside a method: what it adds, when it is on, and that it goes with its adapter.

The reference is the same model with the change merged into the weights of the linear layers.
"""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call

from hf_sparse import SparsefinderConfig, SparseKConfig, patch, unpatch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.evaluation import using
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.lora import check_lora

pytestmark = pytest.mark.versions

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
IDS = torch.randint(5, 64, (2, 40), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "sparsek": lambda **changes: SparseKConfig(**{"k": 5, "window": 6, "sinks": 2, **changes}),
    "sparsefinder": lambda **changes: SparsefinderConfig(**{"predictor": "full", **changes}),
}
PAIRS = [
    pytest.param(name, method, marks=pytest.mark.full if family.kin else ())
    for name, family in FAMILIES.items()
    for method in CONFIGS
]


def disturb(model):
    """LoRA that changes something, the same each time."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "_lora." in name:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.2 * drawn)
    return model


def changes_of(model, adapter="default"):
    """By name of a linear weight, its change `[outputs, inputs]`, a function of the LoRA parameters."""
    found = {}
    for module_name, module in model.named_modules():
        for method in (
            sparse_layers(nn.ModuleList([module.sparse_attention])) if hasattr(module, "sparse_attention") else []
        ):
            low_rank = method.lora[adapter]
            for name in method.linears:
                down, up = (getattr(low_rank, f"{name}_{part}") for part in "AB")
                found[f"{module_name}.{name}.weight"] = low_rank.scale * up @ down
    return found


def merged(model, plain):
    """`functional_call` of a model without LoRA, with the changes of another merged into its weights."""
    weights = dict(plain.named_parameters())
    for name, change in changes_of(model).items():
        is_linear = isinstance(plain.get_submodule(name.removesuffix(".weight")), nn.Linear)
        weights[name] = weights[name] + (change if is_linear else change.T)
    return functional_call(plain, weights, (IDS,)).logits


def pair(family, method, **changes):
    """A model with LoRA that changes something, and the same one without."""
    config, models = CONFIGS[method], []
    for rank in (3, 0):
        torch.manual_seed(1)
        models.append(patch(FAMILIES[family].make().requires_grad_(False), config(lora_rank=rank, **changes)))
    with_lora, plain = models
    learned = {name: p for name, p in with_lora.state_dict().items() if "_lora." not in name}
    plain.load_state_dict(learned)
    return disturb(with_lora).eval(), plain.eval()


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_new_adapter_changes_nothing(family, method):
    model, plain = pair(family, method)
    changed = model(IDS).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_B"):
                parameter.zero_()
    expected = plain(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert (changed - expected).abs().max() > 1e-2


@pytest.mark.cross("values")
@pytest.mark.parametrize("training", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_output_and_gradients_are_those_of_merged_weights(family, method, training):
    """Through soft gates and hard selection, and through entmax with learned scales."""
    model, plain = (one.double() for one in pair(family, method, lora_alpha=4.5))
    for one in (model, plain):  # the products of experts that transformers takes by default know no float64
        if "num_experts" in FAMILIES[family].settings:
            one.set_experts_implementation("eager")
    assert sparse_layers(model)[0].lora["default"].scale == 1.5
    for one in (model, plain):
        for attention in sparse_layers(one):
            attention.train(training)
    found, expected = model(IDS).logits, merged(model, plain)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(4)).double()
    learned = {name: p for name, p in model.named_parameters() if "_lora." in name}
    gradients = torch.autograd.grad((found * weight).sum(), list(learned.values()))
    references = torch.autograd.grad((expected * weight).sum(), list(learned.values()))
    for name, gradient, reference in zip(learned, gradients, references, strict=True):
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_switched_off_or_taken_off_it_is_the_base_model_bit_for_bit(tiny_llama, method):
    expected = tiny_llama()(IDS).logits
    model = disturb(get_peft_model(tiny_llama(), CONFIGS[method](lora_rank=3))).eval()
    sparse = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, sparse) and not torch.equal(sparse, expected)
    with pytest.raises(ValueError, match="no weights"):
        model.merge_and_unload()
    base = model.unload()
    assert torch.equal(base(IDS).logits, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_a_baseline_has_the_lora_and_dense_has_not(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(k=64, lora_rank=3))
    disturb(model)
    learned = model(IDS).logits
    with using(model, "recency"):  # everything fits, so all that differs from the base is LoRA
        torch.testing.assert_close(model(IDS).logits, learned, rtol=0, atol=1e-5)
    with using(model, "dense"):
        dense = model(IDS).logits
    assert torch.equal(dense, tiny_llama()(IDS).logits)
    assert (learned - dense).abs().max() > 0.1


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip(tiny_llama, tmp_path, method, low_cpu_mem_usage):
    model = disturb(get_peft_model(tiny_llama(), CONFIGS[method](lora_rank=3, lora_alpha=5.0))).eval()
    model.save_pretrained(tmp_path)
    kept = {name.rpartition(".")[2]: p for name, p in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert tuple(kept["q_proj_A"].shape) == (3, 32) and tuple(kept["k_proj_B"].shape) == (16, 3)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_only_the_adapter_is_trainable(tiny_llama):
    model = get_peft_model(tiny_llama(), SparseKConfig(lora_rank=3))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(".sparsek_" in name for name in trained)
    assert sum(".sparsek_lora.default." in name for name in trained) == 2 * 4 * 2
    assert len(trained) == 2 * (4 * 2 + 2)


def test_adapters_of_different_ranks_switch(tiny_llama):
    model = get_peft_model(tiny_llama(), CONFIGS["sparsek"]()).eval()
    without = model(IDS).logits
    for name, rank in (("three", 3), ("five", 5)):
        model.add_adapter(name, CONFIGS["sparsek"](lora_rank=rank))
    disturb(model)
    assert torch.equal(model(IDS).logits, without)
    seen = {}
    for name, rank in (("three", 3), ("five", 5)):
        model.set_adapter(name)
        seen[name] = model(IDS).logits
        assert sparse_layers(model)[0].lora[name].q_proj_A.shape == (rank, 32)
        assert all(f".{name}." in n for n, p in model.named_parameters() if p.requires_grad)
    assert not torch.equal(seen["three"], seen["five"]) and not torch.equal(seen["three"], without)
    model.set_adapter("three")
    assert torch.equal(model(IDS).logits, seen["three"])
    model.delete_adapter("five")
    assert torch.equal(model(IDS).logits, seen["three"])
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, without)


@pytest.mark.parametrize("method", CONFIGS)
def test_decoding_reads_what_a_forward_reads(tiny_llama, method):
    model = disturb(patch(tiny_llama(), CONFIGS[method](lora_rank=3)))
    expected = model(IDS).logits
    output = model(IDS[:, :25], use_cache=True)
    found = [output.logits]
    for step in range(25, IDS.shape[1]):
        output = model(IDS[:, step : step + 1], **with_cache(cache_of(output)), use_cache=True)
        found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-5)


def test_layers_that_are_not_patched_have_none(tiny_llama):
    model = patch(tiny_llama(), CONFIGS["sparsek"](lora_rank=3, layers=[1]))
    names = [name for name, _ in model.named_parameters() if "_lora." in name]
    assert len(names) == 8 and all(".layers.1." in name for name in names)
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks


def test_a_copy_has_changes_of_its_own(tiny_llama):
    model = disturb(patch(tiny_llama(), CONFIGS["sparsek"](lora_rank=3)))
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, expected)
    with torch.no_grad():
        sparse_layers(model)[0].lora["default"].v_proj_B.zero_()
    assert not torch.equal(model(IDS).logits, expected)
    assert torch.equal(twin(IDS).logits, expected)


def test_bfloat16_base_and_autocast(tiny_llama):
    """The change is computed in the dtype of its input, or in autocast's; what is learned stays float32."""
    model = disturb(patch(tiny_llama().bfloat16(), CONFIGS["sparsek"](k=64, lora_rank=3)))
    assert {p.dtype for name, p in model.named_parameters() if "_lora." in name} == {torch.float32}
    found = model(IDS).logits
    assert found.dtype == torch.bfloat16
    exact = disturb(patch(tiny_llama(), CONFIGS["sparsek"](k=64, lora_rank=3)))
    expected = exact(IDS).logits
    bound = 0.1 * expected.std()
    assert (found - expected).abs().mean() < bound
    with torch.autocast("cpu", torch.bfloat16):
        assert (exact(IDS).logits - expected).abs().mean() < bound
    assert (tiny_llama()(IDS).logits - expected).abs().mean() > 2 * bound


@pytest.mark.parametrize("method", CONFIGS)
def test_refusals(tiny_llama, method):
    make = CONFIGS[method]
    with pytest.raises(ValueError, match=r"Config.lora_rank must be an integer of at least 0, got -1"):
        make(lora_rank=-1)
    with pytest.raises(ValueError, match=r"Config.lora_rank must be an integer of at least 0, got 1.5"):
        make(lora_rank=1.5)
    with pytest.raises(ValueError, match=r"Config.lora_alpha must be None or a number above 0, got 0"):
        make(lora_alpha=0)
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"lora_rank must be at most 16, the width of k_proj, got 17"):
        patch(model, make(lora_rank=17))
    assert sparse_layers(model) == []
    patch(model, make(lora_rank=16))
    assert sparse_layers(model)[0].lora["default"].scale == 2  # lora_alpha is twice the rank
    unpatch(model)
    with pytest.raises(ValueError, match="lora_rank must be 0: Sequential has no linear layers of its own"):
        check_lora(nn.Sequential(nn.LayerNorm(4)), 1)
