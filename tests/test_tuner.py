"""SparseK through PEFT and through transformers' own adapter loaders."""

import json
import pickle
import sys
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_sparse import SparsefinderConfig, SparseKCache, SparseKConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.errors import AdapterMismatchError, UnsupportedModelError
from hf_sparse.methods.sparsek import SparseKCacheLayer
from hf_sparse.methods.sparsek.attention import _warn_of_short_text
from hf_sparse.patches import sparse_layers

pytestmark = pytest.mark.versions

BUDGET = {"k": 6, "window": 8, "sinks": 2}
IDS = torch.randint(2, 64, (2, 50), generator=torch.Generator().manual_seed(0))
SCORERS = [f"base_model.model.model.layers.{i}.self_attn.sparse_attention.sparsek_scorer" for i in range(2)]

# Whether this transformers takes this PEFT in its own add_adapter, set_adapter, ...
ADAPTERS_OF_TRANSFORMERS = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def config(**settings):
    return SparseKConfig(**{**BUDGET, "task_type": "CAUSAL_LM", **settings})


@pytest.fixture
def base_folder(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def model(base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    return get_peft_model(base, config()).eval()


def test_it_is_a_peft_model_with_its_scorers_as_the_only_parameters(model, capsys):
    assert isinstance(model, PeftModel)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    slopes = {f"{name}.default.slope": (2,) for name in SCORERS}
    assert trained == {f"{name}.default.weight": (2, 32) for name in SCORERS} | slopes
    assert model.get_nb_trainable_parameters() == (132, 22_820)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 132 || all params: 22,820 || trainable%: 0.5784")


def test_the_configuration_says_what_was_patched(model):
    assert model.peft_config["default"].target_modules == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert model.peft_config["default"].base_shape["num_attention_layers"] == 2


def test_switched_off_it_is_the_base_model_bit_for_bit(model, tiny_llama):
    expected, sparse = logits(tiny_llama()), logits(model)
    assert (sparse - expected).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        assert torch.equal(
            model.generate(input_ids=IDS, max_new_tokens=10, do_sample=False),
            tiny_llama().generate(IDS, max_new_tokens=10, do_sample=False),
        )
    assert torch.equal(logits(model), sparse)


def test_it_generates_with_constant_slots(model):
    output = model.generate(input_ids=IDS, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    layers = cache_of(output).layers
    assert [type(layer) for layer in layers] == [SparseKCacheLayer] * 2
    assert all(layer.keys.shape[2] == sum(BUDGET.values()) for layer in layers)


def test_unload_gives_the_base_model_back(model, tiny_llama):
    base = model.unload()
    assert sparse_layers(base) == []
    assert torch.equal(logits(base), logits(tiny_llama()))


def test_the_base_model_takes_another_adapter_after_unload(model):
    base = model.unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Already found a `peft_config`|.*for a second time")
        get_peft_model(base, config())


def test_what_asks_each_module_for_a_weight_learns_that_there_is_none(model):
    """PEFT's layers answer with that of the layer they wrap, and one without such a layer asked itself for it."""
    attention = model.get_submodule(SCORERS[0].rpartition(".")[0])
    assert not hasattr(attention, "weight") and not hasattr(attention, "bias")
    prunable = [module for module in model.modules() if hasattr(module, "weight")]
    assert torch.nn.Linear in {type(module) for module in prunable} and attention not in prunable


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(model, merge):
    with pytest.raises(ValueError, match="no weights"):
        getattr(model, merge)()


# Files.

LOADERS = {
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
    "PeftModel, low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, low_cpu_mem_usage=True
    ),
    "PeftModel, trainable": lambda base, folder: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True
    ),
    "AutoPeftModel": lambda base, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "AutoModel": lambda base, folder: AutoModelForCausalLM.from_pretrained(folder),
    "load_adapter": lambda base, folder: _load_adapter(AutoModelForCausalLM.from_pretrained(base), folder),
}


def _load_adapter(model, folder):
    model.load_adapter(str(folder))
    return model


@pytest.mark.cross("values")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("settings", [{}, {"scorer": "mlp", "scorer_hidden_size": 9}, {"layers": [1]}], ids=str)
def test_round_trip(base_folder, tmp_path, loader, settings):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    loaded = LOADERS[loader](base_folder, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad and "sparsek_scorer" in name]
    if loader == "PeftModel, trainable":
        assert trainable
    elif loader.startswith("PeftModel") or loader == "AutoPeftModel":
        assert not trainable
    assert not any(p.is_meta for p in loaded.parameters())


def test_the_files_hold_the_scorers_and_nothing_else(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        f"{name}.{learned}": shape for name in SCORERS for learned, shape in (("weight", (2, 32)), ("slope", (2,)))
    }
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "HF_SPARSE_SPARSEK" and saved["k"] == 6 and saved["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
def test_another_adapter_name_round_trips(base_folder, tmp_path, scorer):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = get_peft_model(base, config(scorer=scorer), adapter_name="mine").eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "mine", adapter_name="yours"
    )
    assert torch.equal(logits(loaded), expected)
    assert sparse_layers(loaded)[0].active == "yours"


def test_an_adapter_of_another_base_is_refused(model, tiny_llama, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"made for another base model \(hidden_size: 32 there, 64 here\)"):
        PeftModel.from_pretrained(tiny_llama(hidden_size=64), tmp_path)


def test_a_bfloat16_base_keeps_float32_scorers(base_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    model = get_peft_model(base, config()).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16), tmp_path
    )
    assert expected.dtype == torch.bfloat16 and torch.equal(logits(loaded), expected)


# Several adapters.


def test_two_adapters_switch_and_one_goes(model):
    first = logits(model)
    model.add_adapter("small", config(k=2, window=3, sinks=1, scorer="mlp"))
    assert torch.equal(logits(model), first)
    model.set_adapter("small")
    second = logits(model)
    assert (second - first).abs().max() > 0.1
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.small.{p}" for name in SCORERS for p in ("up", "up_bias", "down", "slope")
    }
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("small")
    assert torch.equal(logits(model), first)
    assert not any("small" in name for name, _ in model.named_parameters())
    assert all(list(method.configs) == ["default"] for method in sparse_layers(model))


def test_deleting_the_active_adapter_goes_back_to_the_other(model):
    first = logits(model)
    model.add_adapter("small", config(k=2))
    model.set_adapter("small")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("small")
    assert torch.equal(logits(model), first)


def test_an_adapter_per_row_is_refused(model):
    model.add_adapter("small", config(k=2))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"all rows .* 'default', and adapter_names asks for one per row"):
            call(input_ids=IDS, adapter_names=["default", "small"])


def test_adapters_for_different_layers(base_folder, tmp_path):
    low, high = (
        get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config(layers=[i])).eval() for i in range(2)
    )
    expected = {"low": logits(low), "high": logits(high)}
    low.save_pretrained(tmp_path / "low")
    high.save_pretrained(tmp_path / "high")
    both = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "low", adapter_name="low"
    )
    assert torch.equal(logits(both), expected["low"])
    both.load_adapter(tmp_path / "high", adapter_name="high")
    assert torch.equal(logits(both), expected["low"])
    for name in ("high", "low"):
        both.set_adapter(name)
        assert torch.equal(logits(both), expected[name])


def test_transformers_own_switches(base_folder, model, tmp_path, tiny_llama):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(base_folder)
    loaded.load_adapter(str(tmp_path), adapter_name="sparse")
    sparse = logits(model)
    assert torch.equal(logits(loaded), sparse)
    if not ADAPTERS_OF_TRANSFORMERS:
        with pytest.raises(ValueError, match=r"please use a version >= 0\.22"):
            loaded.disable_adapters()
        assert torch.equal(logits(loaded), sparse)
        return
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(tiny_llama()))
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), sparse)


@pytest.mark.skipif(not ADAPTERS_OF_TRANSFORMERS, reason="this transformers refuses this PEFT, as another test asserts")
def test_after_its_last_adapter_it_takes_another_for_other_layers(tiny_llama):
    model = tiny_llama()
    model.add_adapter(config())
    model.eval().delete_adapter("default")
    assert torch.equal(logits(model), logits(tiny_llama()))
    with pytest.raises(ValueError, match="no attention of the model is sparse now"):
        SparseKCache(model)
    model.add_adapter(config(layers=[1]), "next")
    model.eval()
    assert [method.is_active for method in sparse_layers(model)] == [False, True]
    assert (logits(model) - logits(tiny_llama())).abs().max() > 0.1


@pytest.mark.skipif(not ADAPTERS_OF_TRANSFORMERS, reason="this transformers refuses this PEFT, as another test asserts")
def test_without_its_last_adapter_a_model_of_transformers_is_the_base_model(base_folder, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.add_adapter(config())
    assert not torch.equal(logits(model.eval()), logits(tiny_llama()))
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(model.generate(IDS, max_new_tokens=4), tiny_llama().generate(IDS, max_new_tokens=4))
    model.add_adapter(config())
    assert not torch.equal(logits(model.eval()), logits(tiny_llama()))


def test_pickled_whole(model, tiny_llama):
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(loaded), logits(model))
    with loaded.disable_adapter():  # switches itself, not the model that it was made of
        assert torch.equal(logits(loaded), logits(tiny_llama()))
        assert not torch.equal(logits(model), logits(tiny_llama()))


# Training.


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
def test_a_training_step_changes_all_scorers_and_only_them(tiny_llama, scorer):
    model = get_peft_model(tiny_llama(), config(scorer=scorer)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("sparsek_scorer" in name), name


def test_sequences_within_the_budget_teach_nothing_and_say_so_once(tiny_llama, recwarn):
    _warn_of_short_text.cache_clear()
    model = get_peft_model(tiny_llama(), config()).train()
    for length in (10, 12, 16, 30):
        short = IDS[:, :length]
        model.zero_grad()
        model(short, labels=short).loss.backward()
        learned = [p.grad.any() for p in model.parameters() if p.requires_grad]
        assert any(learned) == (length > 16)
    warned = [str(warning.message) for warning in recwarn if "KV slots" in str(warning.message)]
    assert len(warned) == 1 and "fits into the 16 KV slots" in warned[0]


def test_the_trainer_trains_it(tiny_llama, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(tiny_llama(), config())
    before = logits(model.eval())
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = torch.randint(2, 64, (8, 40)).tolist()
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}))
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    model.eval()
    after = logits(model)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")), after)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))


def test_data_parallel_is_refused(model, monkeypatch):
    """Its copies have no parameters, so that in one of two GPUs a scorer would get no gradient."""
    replicate = sys.modules["torch.nn.parallel.replicate"]
    copies = lambda tensors, devices, detach=False: [tensors for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)  # without GPUs
    with pytest.raises(ValueError, match="one process per GPU"):
        replicate.replicate(model, [0, 1])


def test_peft_knows_the_method():
    assert peft.PeftType("HF_SPARSE_SPARSEK") == "HF_SPARSE_SPARSEK"
    assert type(peft.get_peft_config({"peft_type": "HF_SPARSE_SPARSEK", "k": 3})) is SparseKConfig


# What is frozen, and what a forward can teach.


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", [SparseKConfig, SparsefinderConfig])
def test_switching_off_and_on_changes_nothing_that_is_frozen(tiny_llama, kind, frozen):
    model = get_peft_model(tiny_llama(), kind(inference_mode=frozen))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter():
        pass
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert any(before.values()) is not frozen


def test_a_backward_in_eval_mode_names_train(model):
    with pytest.raises(ValueError, match=r"scorers are trainable and get no gradient.*call model.train\(\)"):
        model(IDS, labels=IDS).loss.backward()
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_backward_in_eval_mode_for_something_else_warns(model):
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    loss = model(IDS, labels=IDS).loss
    with pytest.warns(UserWarning, match=r"call model.train\(\) before the forward, or freeze them"):
        loss.backward()
    assert embedding.grad.any()


def test_a_frozen_adapter_lets_gradients_through(tiny_llama, recwarn):
    model = get_peft_model(tiny_llama(), config(inference_mode=True)).eval()
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    assert embedding.grad.any() and not [w for w in recwarn if "scorers" in str(w.message)]


def test_adapters_for_some_layers_name_train_too(tiny_llama):
    model = get_peft_model(tiny_llama(num_hidden_layers=3), config(layers=[1, 0])).eval()
    assert [method.last_for for method in sparse_layers(model)] == [set(), {"default"}]
    with pytest.raises(ValueError, match=r"call model.train\(\)"):
        model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("make", [SparseKConfig, SparsefinderConfig])
def test_generation_in_train_mode_selects_as_in_eval_mode(tiny_llama, make):
    settings = BUDGET if make is SparseKConfig else {"predictor": "bound", "tile": 4, "window": 4}
    model = get_peft_model(tiny_llama(), make(**settings)).eval()
    options = {"input_ids": IDS, "max_new_tokens": 6, "do_sample": False}
    steps = {"output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(model.generate(**options, **steps).logits)
    found = torch.stack(model.train().generate(**options, **steps).logits)
    assert torch.equal(found, expected)
    dense = torch.stack(tiny_llama().generate(IDS, max_new_tokens=6, do_sample=False, **steps).logits)
    assert not torch.equal(found, dense)


# A model that has an adapter already.


@pytest.mark.parametrize("make", ["patch", "get_base_model"])
def test_a_patched_model_is_not_wrapped_anew(tiny_llama, make):
    """Refuse what would draw the learned parameters anew and train all of the base model."""
    plain = (
        patch(tiny_llama(), config()) if make == "patch" else get_peft_model(tiny_llama(), config()).get_base_model()
    )
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with pytest.raises(ValueError, match=r"has SparseK attention already \(adapter default\), and what it learned"):
        get_peft_model(plain, config(k=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert [layer.configs["default"].k for layer in sparse_layers(plain)] == [6, 6]


@pytest.mark.parametrize("inner", [LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), config()], ids=type)
def test_a_peft_model_is_not_wrapped(tiny_llama, inner):
    wrapped = get_peft_model(tiny_llama(), inner)
    before = dict(wrapped.peft_config)
    with pytest.raises(UnsupportedModelError, match=r"got PeftModelForCausalLM .* what its get_base_model"):
        get_peft_model(wrapped, config())
    assert dict(wrapped.peft_config) == before


# Beside an adapter of another type, in transformers' own hands.


def test_of_two_types_the_one_that_is_reported_runs(base_folder, tmp_path, tiny_llama):
    lora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    sparse = get_peft_model(tiny_llama(), config()).eval()
    expected = {"lora": logits(lora), "sparse": logits(sparse)}
    lora.save_pretrained(tmp_path / "lora")
    sparse.save_pretrained(tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    for name in ("sparse", "lora"):
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    assert torch.equal(logits(model), expected["lora"])
    other = AutoModelForCausalLM.from_pretrained(base_folder)
    other.load_adapter(str(tmp_path / "lora"), adapter_name="lora")
    with pytest.raises(ValueError, match="merge_and_unload"):  # in this order it would be a base with LoRA inside
        other.load_adapter(str(tmp_path / "sparse"), adapter_name="sparse")
    if ADAPTERS_OF_TRANSFORMERS:
        assert model.active_adapters() == ["lora"]
        for name in ("sparse", "lora", "sparse"):
            model.set_adapter(name)
            assert model.active_adapters() == [name]
            assert torch.equal(logits(model), expected[name])
            ids = model.generate(IDS, max_new_tokens=4, do_sample=False)
            assert torch.equal(
                ids, {"lora": lora, "sparse": sparse}[name].generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
            )


@pytest.mark.full  # the test before asks the same of a forward that is not compiled
def test_a_compiled_forward_knows_which_of_two_types_runs(base_folder, tmp_path, tiny_llama):
    """torch 2.11 cannot trace the weak reference to the model, so that no torch may see it."""
    lora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    lora.save_pretrained(tmp_path / "lora")
    get_peft_model(tiny_llama(), config()).save_pretrained(tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    traced = []

    def reference():
        traced.append(torch.compiler.is_dynamo_compiling())
        return model

    for name in ("sparse", "lora"):
        model.load_adapter(str(tmp_path / name), adapter_name=name)
        sparse_layers(model)[0].model_switch.model = reference
        compiled = torch.compile(model, backend="eager")(IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
        torch.testing.assert_close(compiled.logits, logits(model))
    assert traced
    assert not any(traced)


def test_transformers_says_which_peft_its_own_methods_need(tiny_llama):
    """`load_adapter` works with every supported PEFT; the others need 0.22 from transformers 5.24 on."""
    model = tiny_llama()
    if ADAPTERS_OF_TRANSFORMERS:
        model.add_adapter(config())
        assert model.active_adapters() == ["default"]
    else:
        with pytest.raises(ValueError, match=r"please use a version >= 0\.22"):
            model.add_adapter(config())
        assert sparse_layers(model) == []


def test_a_refused_step_leaves_the_cache_as_it_was(tiny_llama):
    model = get_peft_model(tiny_llama(), config()).eval()
    model.add_adapter("other", config(k=8))
    cache = SparseKCache(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits[:, -1]
        model(input_ids=IDS[:, :-1], **with_cache(cache))
        model.set_adapter("other")
        with pytest.raises(ValueError, match="another adapter chose"):
            model(input_ids=IDS[:, -1:], **with_cache(cache))
        model.set_adapter("default")
        torch.testing.assert_close(
            model(input_ids=IDS[:, -1:], **with_cache(cache)).logits[:, -1], expected, rtol=0, atol=1e-5
        )
