"""A base model whose files are a stranger's: what config.json asks for is bounded, and what it names is not fetched."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.adapters.load import load_adapter, load_base
from hf_sparse.adapters.saving import save_adapter
from hf_sparse.base_model import open_base
from hf_sparse.errors import HubError, UnsupportedModelError
from hf_sparse.patches import sparse_layers
from hf_sparse.workflow import create_adapter

pytestmark = pytest.mark.versions

TOKENS = torch.arange(1, 31)[None]
CONFIGS = {
    "sparsek": lambda: hf_sparse.SparseKConfig(k=4, window=4, sinks=1),
    "sparsefinder": lambda: hf_sparse.SparsefinderConfig(predictor="full"),
}


@pytest.fixture
def base(tiny_llama, tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=sorted(CONFIGS))
def folder(base, tmp_path, request) -> Path:
    create_adapter(str(base), CONFIGS[request.param](), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.cross("values")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1024, got 1000000000"),
        ({"num_labels": 10**9}, "num_labels must be at most 1048576"),
        ({"vocab_size": 10**18}, "vocab_size must be at most 2147483647"),
        ({"rope_parameters": {"x": [10**30]}}, "a list must be at most 2147483647"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4}, "its config.json cannot be used|is damaged"),
        ({"num_attention_heads": 0}, "config.json cannot be used"),
        ({"hidden_size": "wide"}, "config.json cannot be used"),
        ({"hidden_size": [1]}, "config.json cannot be used"),
        ({"model_type": 3}, "base"),
        ({"model_type": []}, "base"),
        ({"transformers_weights": "weights.bin"}, "expected a file of safetensors"),
        ({"rope_parameters": []}, "config.json cannot be used"),
    ],
)
def test_configuration_that_no_model_has(folder, base, changes, message):
    edit(base / "config.json", **changes)
    for load in (hf_sparse.from_pretrained, load_adapter, lambda _: load_base(str(base), CONFIGS["sparsek"]())):
        with pytest.raises((HubError, UnsupportedModelError), match=message) as error:
            load(folder)
        assert "\n" not in str(error.value)


@pytest.mark.cross("values")
@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '"x"', "NaN", " " * (2**24 + 1)])
@pytest.mark.parametrize("name", ["adapter_config.json", "config.json"])
def test_json_that_is_none(folder, base, name, content):
    (base if name == "config.json" else folder).joinpath(name).write_text(content)
    with pytest.raises(HubError) as error:
        hf_sparse.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_large_file_is_not_read(folder, base):
    for path in (folder / "adapter_config.json", base / "config.json"):
        before = path.read_bytes()
        with path.open("wb") as file:
            file.truncate(2**29)
        with pytest.raises(HubError, match="must have at most 16777216 bytes, got 536870912"):
            hf_sparse.from_pretrained(folder)
        path.write_bytes(before)


@pytest.mark.cross("values")
@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"attn_implementation": name}
            for name in ("kernels-community/flash-attn", "flash_attention_2", "paged|sdpa")
        ),
        {"attn_implementation": ["sdpa"]},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation_internal": "kernels-community/flash-attn"},
        {"experts_implementation": "kernels-community/moe", "_experts_implementation": "kernels-community/moe"},
    ],
)
def test_attention_that_a_base_names_is_not_obeyed(folder, base, changes):
    with torch.no_grad():
        expected = hf_sparse.from_pretrained(folder)(input_ids=TOKENS).logits
    edit(base / "config.json", **changes)
    for model in (hf_sparse.from_pretrained(folder), hf_sparse.from_pretrained(folder, attn_implementation="eager")):
        with torch.no_grad():
            assert torch.allclose(model(input_ids=TOKENS).logits, expected, atol=1e-5)
    asked = model.get_base_model()
    with model.disable_adapter():
        assert asked.config._attn_implementation == "eager"
    assert load_base(str(base), CONFIGS["sparsek"]()).config._attn_implementation == "sdpa"


def test_kernels_from_the_hub_are_refused(folder):
    with pytest.raises(
        HubError, match=r"attn_implementation must be one of eager, sdpa, .*hf-sparse fetches no kernels"
    ):
        hf_sparse.from_pretrained(folder, attn_implementation="kernels-community/flash-attn")
    with pytest.raises(ValueError, match="use_kernels=True is refused"):
        hf_sparse.from_pretrained(folder, use_kernels=True)


def test_options_of_a_configuration_change_it(base):
    opened = open_base(str(base), use_cache=False, dtype=torch.bfloat16)
    model, missing = opened.load()
    assert not missing
    assert model.config.use_cache is False and model.dtype == torch.bfloat16


# Other PEFT adapters.


def test_an_option_that_nobody_knows_is_named(folder):
    """It is no fault of the files."""
    message = r"AutoModelForCausalLM.from_pretrained takes no max_memry=, and the configuration has no such field"
    with pytest.raises(HubError, match=message):
        hf_sparse.from_pretrained(folder, max_memry={"cpu": "1GB"})


def test_lora_that_is_not_merged_is_refused(base, folder):
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"got PeftModel \(merge its adapter first: merge_and_unload"):
        hf_sparse.patch(lora, CONFIGS["sparsek"]())
    inside = lora.get_base_model()
    for use in (
        lambda: hf_sparse.patch(inside, CONFIGS["sparsek"]()),
        lambda: get_peft_model(inside, CONFIGS["sparsefinder"]()),
        lambda: hf_sparse.from_pretrained(folder, base_model=inside),
    ):
        with pytest.raises(ValueError, match=r"layers of another PEFT adapter \(peft\.tuners\.lora.*merge them first"):
            use()
        assert sparse_layers(inside) == []
    merged = lora.merge_and_unload()
    assert isinstance(hf_sparse.from_pretrained(folder, base_model=merged), PeftModel)


@pytest.fixture
def lora(base, tmp_path):
    """A folder of a LoRA adapter that changes something."""
    settings = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def over(base, lora):
    """A base model with a frozen LoRA adapter, in its own PeftModel."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_sparse_attention_over_a_frozen_lora(base, lora, tmp_path, method):
    """Trained over it, and each saved and loaded by itself."""
    below = over(base, lora)
    dense = below(input_ids=TOKENS).logits
    model = get_peft_model(below.get_base_model(), CONFIGS[method]()).train()
    for layer in sparse_layers(model):
        layer.train()
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached and all("sparse_attention" in name for name in reached)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in reached:
                parameter.add_(0.3 * torch.ones_like(parameter))
    expected = model.eval()(input_ids=TOKENS).logits
    assert (expected - dense).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(input_ids=TOKENS).logits, dense)
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "sparse_attention" not in name)
    save_adapter(model, tmp_path / "sparse")
    assert all("sparse_attention" in key for key in load_file(tmp_path / "sparse" / "adapter_model.safetensors"))
    for loaded in (
        PeftModel.from_pretrained(over(base, lora).get_base_model(), tmp_path / "sparse").eval(),
        hf_sparse.from_pretrained(tmp_path / "sparse", base_model=over(base, lora).get_base_model()),
    ):
        assert torch.equal(loaded(input_ids=TOKENS).logits, expected)
    model.unload()
    assert torch.equal(below(input_ids=TOKENS).logits, dense)
    below.save_pretrained(tmp_path / "again")
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", lora))
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)
    with pytest.warns(UserWarning, match=r"made over another PEFT adapter \(lora\).*load that one first"):
        hf_sparse.from_pretrained(tmp_path / "sparse")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_a_frozen_lora_stays_where_sparse_attention_is_taken_off(base, lora, method):
    """patch, without PEFT; lora_rank would change only the linear layers that the other adapter left alone."""
    model = over(base, lora).get_base_model()
    expected = model(input_ids=TOKENS).logits
    with pytest.raises(ValueError, match=r"lora_rank must be 0 over another PEFT adapter \(peft\.tuners\.lora"):
        hf_sparse.patch(model, type(CONFIGS[method]())(lora_rank=2))
    hf_sparse.patch(model, CONFIGS[method]())
    assert sparse_layers(model)
    hf_sparse.unpatch(model)
    assert torch.equal(model(input_ids=TOKENS).logits, expected)


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_lora_trained_around_sparse_attention_is_refused_at_its_first_step(tiny_llama, method):
    model = hf_sparse.patch(tiny_llama(), CONFIGS[method]())
    lora = get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"is trained around sparse attention.*use lora_rank"):
        lora(input_ids=TOKENS)
    with torch.no_grad():
        lora(input_ids=TOKENS)  # somebody's LoRA, used but not trained
    lora.requires_grad_(False)
    lora(input_ids=TOKENS)


def test_merged_lora_is_a_base_like_any_other(base, tmp_path):
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    lora.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model = get_peft_model(merged, CONFIGS["sparsek"]()).eval()
    save_adapter(model, tmp_path / "adapter")
    loaded = hf_sparse.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_a_subfolder_is_that_of_the_weights_too(tmp_path, tiny_llama):
    root, inner = tiny_llama(), tiny_llama()
    with torch.no_grad():
        inner.lm_head.weight.fill_(7)
    root.save_pretrained(tmp_path / "two")
    inner.save_pretrained(tmp_path / "two" / "sub")
    model, missing = open_base(str(tmp_path / "two"), subfolder="sub").load()
    assert not missing and model.lm_head.weight[0, 0] == 7
