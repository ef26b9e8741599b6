"""Sparsefinder through PEFT, transformers' loaders, and hf_sparse.from_pretrained."""

import json
import runpy
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparsefinderConfig, SparseKConfig, patch
from hf_sparse.errors import AdapterMismatchError, HubError
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
from hf_sparse.patches import sparse_layers, sparse_layers_in_use

pytestmark = [pytest.mark.usefixtures("blank_pictures"), pytest.mark.versions]

FAMILIES = runpy.run_path(str(Path(__file__).parent / "families.py"))["FAMILIES"]
IDS = torch.randint(3, 64, (2, 70), generator=torch.Generator().manual_seed(0))
SIZES = {"tile": 16, "tiles_per_query": 3, "window": 1, "clusters": 5, "bins": 4}
MODULE = "base_model.model.model.layers.{}.self_attn.sparse_attention.sparsefinder_parameters"
SETTINGS = {
    "clustering": {"layers": [1]},
    "quantization": {"predictor": "quantization", "shared_projection": True},
    "learned alpha": {"predictor": "bound", "learn_alpha": True},
}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def fitted(model, adapter="default", **settings):
    """With an adapter none of whose tensors is as it was made."""
    model = get_peft_model(model, SparsefinderConfig(**SIZES | settings), adapter_name=adapter).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    fit_predictors(sparse_layers_in_use(model, SparsefinderAttention), lambda: model(input_ids=IDS))
    return model


@pytest.fixture
def base_folder(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_adapter(model, folder):
    model.load_adapter(str(folder))
    return model.eval()


LOADERS = {
    "hf_sparse": lambda base, folder: hf_sparse.from_pretrained(folder),
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
    "PeftModel, low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, low_cpu_mem_usage=True
    ),
    "AutoPeftModel": lambda base, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "AutoModel": lambda base, folder: AutoModelForCausalLM.from_pretrained(folder),
    "load_adapter": lambda base, folder: load_adapter(AutoModelForCausalLM.from_pretrained(base), folder),
}


@pytest.mark.cross("values")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_loader_brings_everything_back(base_folder, tmp_path, loader, settings):
    model = fitted(AutoModelForCausalLM.from_pretrained(base_folder), **SETTINGS[settings])
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = LOADERS[loader](base_folder, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.cross("values")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_families_round_trip(tmp_path, name, settings):
    model = fitted(FAMILIES[name].make(), "mine", **SETTINGS[settings])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = hf_sparse.from_pretrained(tmp_path / "mine", base_model=FAMILIES[name].make(), adapter_name="yours")
    assert torch.equal(logits(loaded), expected)
    assert sparse_layers(loaded)[0].active == "yours"


def test_the_files_hold_what_was_learned_and_nothing_else(tiny_llama, tmp_path):
    fitted(tiny_llama(), head_budgets=True).save_pretrained(tmp_path)
    held = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    shapes = {
        "log_scale": (4,),
        "query_projection": (4, 8, 4),
        "query_bias": (4, 4),
        "key_projection": (2, 8, 4),
        "centroids": (2, 5, 4),
        "profile": (4, 40),
        "budgets": (4, 64),
    }
    assert held == {f"{MODULE.format(i)}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "HF_SPARSE_SPARSEFINDER"
    assert saved["base_shape"] == {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_attention_layers": 2,
        "model_class": "LlamaForCausalLM",
    }


def test_peft_knows_the_method():
    assert type(peft.get_peft_config({"peft_type": "HF_SPARSE_SPARSEFINDER", "rank": 2})) is SparsefinderConfig


def test_an_adapter_of_another_base_is_refused(tiny_llama, tmp_path):
    fitted(tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match="num_attention_heads: 4 there, 8 here; head_dim: 8 there, 4 here"):
        hf_sparse.from_pretrained(tmp_path, base_model=tiny_llama(num_attention_heads=8))


def test_a_file_that_does_not_fit_its_configuration_is_refused(tiny_llama, tmp_path):
    fitted(tiny_llama(), head_budgets=True).save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    del held[f"{MODULE.format(1)}.centroids"]
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(HubError, match=r"does not hold the parameters for .*missing: .*layers\.1.*centroids"):
        hf_sparse.from_pretrained(tmp_path, base_model=tiny_llama())


def test_an_adapter_without_measurements_has_a_card(tiny_llama, tmp_path):
    fitted(tiny_llama()).save_pretrained(tmp_path)
    hf_sparse.hub.write_repo(tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "Predicted entmax attention" in text and "this repository has no `eval.json`" in text


# Switching.


def test_off_it_is_the_base_model_and_unload_gives_it_back(tiny_llama):
    model, expected = fitted(tiny_llama()), logits(tiny_llama())
    sparse = logits(model)
    assert (sparse - expected).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), sparse)
    base = model.unload()
    assert sparse_layers(base) == [] and torch.equal(logits(base), expected)


def test_two_adapters_switch_and_one_goes(tiny_llama):
    model = fitted(tiny_llama())
    first = logits(model)
    model.add_adapter("second", SparsefinderConfig(**SIZES, predictor="bound", alpha=2.0))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert (logits(model) - first).abs().max() > 0.01
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any("second" in name for name in model.state_dict())
    assert all(list(method.identities) == ["default"] for method in sparse_layers(model))


ONE_METHOD = r"the model has {} attention already, and a model has one method at a time: take it off first .* add {}"


@pytest.mark.parametrize(
    "here, other, names",
    [
        (SparseKConfig(), SparsefinderConfig(), ("SparseK", "Sparsefinder")),
        (SparsefinderConfig(), SparseKConfig(), ("Sparsefinder", "SparseK")),
    ],
    ids=["SparseK first", "Sparsefinder first"],
)
def test_a_model_has_one_method_at_a_time(tiny_llama, here, other, names):
    model = patch(tiny_llama(), here)
    with pytest.raises(ValueError, match=ONE_METHOD.format(*names)):
        patch(model, other, adapter="other")
    assert {tuple(method.configs) for method in sparse_layers(model)} == {("default",)}
    with (
        pytest.warns(UserWarning, match="modify a model with PEFT for a second time"),
        pytest.raises(ValueError, match=ONE_METHOD.format(*names)),
    ):
        get_peft_model(model, other)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        get_peft_model(tiny_llama(), here).add_adapter("other", other)


def test_only_configurations_of_a_method_patch(tiny_llama):
    with pytest.raises(TypeError, match="expected a SparsefinderConfig or a SparseKConfig, got LoraConfig"):
        patch(tiny_llama(), peft.LoraConfig())


@pytest.mark.parametrize(
    "settings, message",
    [({"rank": 9}, "rank must be at most the size of a head, 8, got 9"), ({"balanced": True}, "has not seen")],
    ids=str,
)
def test_settings_that_do_not_fit_change_nothing(tiny_llama, settings, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        patch(model, SparsefinderConfig(**settings))
    assert sparse_layers(model) == [] and model.config._attn_implementation == "sdpa"


# Training.


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_logit_scales_are_trained_without_a_graph(tiny_llama, settings):
    model = get_peft_model(tiny_llama(), SparsefinderConfig(**SIZES | SETTINGS[settings])).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2, weight_decay=0)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name.rpartition(".")[2] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    unfitted = {"centroids", "boundaries", "profile", "budgets"}  # NaN, which equals nothing
    assert changed - unfitted == {"log_scale"} | ({"alpha_logit"} if settings == "learned alpha" else set())
