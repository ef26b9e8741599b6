"""Weights that cannot be right are refused wherever they pass: loaded, by PEFT too, saved and pushed; both methods."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.adapters.saving import save_adapter
from hf_sparse.errors import HubError, WeightsError
from hf_sparse.hub import write_repo
from hf_sparse.patches import sparse_layers

pytestmark = pytest.mark.versions

CONFIGS = {
    "sparsek": lambda: hf_sparse.SparseKConfig(k=4, window=4, sinks=1),
    "sparsefinder": lambda: hf_sparse.SparsefinderConfig(tile=16, clusters=4, head_budgets=True),
}
FIRST = {"sparsek": "sparsek_scorer.weight", "sparsefinder": "sparsefinder_parameters.log_scale"}
TOKENS = torch.arange(1, 31)[None]

DAMAGES = {
    **{str(dtype)[6:]: lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.int8, torch.int64, torch.bool)},
    "complex64": lambda x: x.to(torch.complex64),
    "float64": lambda x: x.double(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "NaN": lambda x: x.index_fill(-1, torch.tensor([0]), torch.nan),
    "infinity": lambda x: x.index_fill(-1, torch.tensor([0]), torch.inf),
}


@pytest.fixture(params=sorted(CONFIGS))
def method(request) -> str:
    return request.param


@pytest.fixture
def base(tiny_llama, tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def model(method, base) -> PeftModel:
    return get_peft_model(load_base(base), CONFIGS[method]()).eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def in_use(model, method):
    """Sparse where nothing has to be fitted first, dense otherwise."""
    return nullcontext() if method == "sparsek" else model.disable_adapter()


def damage(folder: Path, name: str, change) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    key = next(key for key in sorted(state) if key.endswith(name))
    save_file(state | {key: change(state[key]).contiguous()}, path, metadata={"format": "pt"})


@pytest.mark.cross("values")
@pytest.mark.parametrize("kind", sorted(DAMAGES))
def test_damaged_weights_are_loaded_by_nobody(method, folder, base, kind):
    damage(folder, FIRST[method], DAMAGES[kind])
    message = f"must be finite, got {kind}" if kind in ("NaN", "infinity") else "must be of type float32, bfloat16 or"
    for use in (
        hf_sparse.from_pretrained,
        write_repo,
        lambda path: hf_sparse.push_to_hub(path, "tester/x", base_model="tester/any"),
    ):
        with pytest.raises(HubError, match=message):
            use(folder)
    dense = load_base(base)
    expected = dense(input_ids=TOKENS).logits
    with pytest.raises(WeightsError, match=message):
        PeftModel.from_pretrained(dense, folder)
    assert sparse_layers(dense) == [] and torch.equal(dense(input_ids=TOKENS).logits, expected)
    two = get_peft_model(load_base(base), CONFIGS[method]())
    with in_use(two, method):
        before = two(input_ids=TOKENS).logits
    with pytest.raises(WeightsError, match=message):
        two.load_adapter(folder, "second")
    assert list(two.peft_config) == ["default"]
    with in_use(two, method):
        assert torch.equal(two(input_ids=TOKENS).logits, before)


def test_peft_refuses_missing_and_unexpected_weights(method, folder, base):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    key = next(key for key in sorted(state) if key.endswith(FIRST[method]))
    for changed, message in (
        ({name: x for name, x in state.items() if name != key}, "missing: .*"),
        (state | {"base_model.model.model.norm.weight": torch.ones(32)}, r"unexpected: base_model\.model\.model\.norm"),
        (state | {key: state[key][:1]}, "of another shape: "),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        dense = load_base(base)
        with pytest.raises(WeightsError, match=message):
            PeftModel.from_pretrained(dense, folder)
        assert sparse_layers(dense) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_that_is_not_finite_is_saved(model, method, tmp_path, folder, value, hub):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "sparse_attention" in name).flatten()[0] = value
    for save in (
        lambda: save_adapter(model, folder),
        lambda: save_adapter(model, tmp_path / "new"),
        lambda: model.save_pretrained(tmp_path / "peft"),
        lambda: hf_sparse.push_to_hub(model, "tester/x", base_model="tester/any"),
    ):
        with pytest.raises(WeightsError, match="must be finite, got"):
            save()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists() and not (tmp_path / "peft" / "adapter_model.safetensors").exists()
    model.double()
    with pytest.raises(WeightsError, match="got float64"):
        save_adapter(model, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_loaded(model, folder, dtype):
    save_adapter(model.to(dtype), folder)
    loaded = hf_sparse.from_pretrained(folder).state_dict()
    for key, tensor in model.state_dict().items():
        if "sparse_attention" in key:
            assert torch.equal(loaded[key].nan_to_num(7.0), tensor.float().nan_to_num(7.0))


def test_buffers_are_fitted_or_not_and_nothing_between(tiny_llama, tmp_path, base):
    save_adapter(get_peft_model(load_base(base), CONFIGS["sparsefinder"]()), tmp_path / "adapter")
    hf_sparse.from_pretrained(tmp_path / "adapter")  # NaN all over
    damage(tmp_path / "adapter", "centroids", lambda x: x.index_fill(-1, torch.tensor([0]), 0.5))
    with pytest.raises(HubError, match="centroids must be finite, got NaN"):
        hf_sparse.from_pretrained(tmp_path / "adapter")


# Embeddings.


def test_resized_embeddings_go_there_and_back(method, base, tmp_path):
    """Before patching or after it, tied or not, through PEFT's saving and ours: the same bits."""
    for number, (when, save) in enumerate(
        (when, save) for when in ("before", "after") for save in (save_adapter, PeftModel.save_pretrained)
    ):
        dense = load_base(base)
        if when == "before":
            dense.resize_token_embeddings(72)
        model = get_peft_model(dense, CONFIGS[method]()).eval()
        if when == "after":
            model.get_base_model().resize_token_embeddings(72)
        with torch.no_grad():
            model.get_base_model().get_input_embeddings().weight[70] = 0.5
        folder = tmp_path / f"{number}"
        save(model, str(folder))
        assert json.loads((folder / "adapter_config.json").read_text())["saves_embeddings"] is True
        tokens = torch.arange(42, 72)[None]
        with in_use(model, method):
            expected = model(input_ids=tokens).logits
        loaded = hf_sparse.from_pretrained(folder)
        with in_use(loaded, method):
            assert torch.equal(loaded(input_ids=tokens).logits, expected)
        save_adapter(loaded, tmp_path / f"again-{number}")  # what was brought is not lost
        again = load_file(tmp_path / f"again-{number}" / "adapter_model.safetensors")
        assert sum("embed_tokens" in key or "lm_head" in key for key in again) == 2
        wide = load_base(base)
        with pytest.raises(WeightsError, match=r"call resize_token_embeddings\(72\) on it first"):
            PeftModel.from_pretrained(wide, folder)
        with pytest.raises(ValueError, match=r"call resize_token_embeddings\(72\) on it first"):
            hf_sparse.from_pretrained(folder, base_model=load_base(base))
        wide.resize_token_embeddings(72)
        by_peft = PeftModel.from_pretrained(wide, folder)
        with in_use(by_peft, method):
            assert torch.equal(by_peft(input_ids=tokens).logits, expected)


def test_trained_embeddings_are_kept(base, tmp_path):
    model = get_peft_model(load_base(base), CONFIGS["sparsek"]()).eval()
    weight = model.get_base_model().get_input_embeddings().weight
    weight.requires_grad_(True)
    weight.data[3] = 2.0
    save_adapter(model, tmp_path / "adapter")
    loaded = hf_sparse.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_tied_embeddings_have_one_name_or_two(tiny_llama, tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    dense = load_base(tmp_path / "tied")
    dense.resize_token_embeddings(72)
    model = get_peft_model(dense, CONFIGS["sparsek"]()).eval()
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    names = [key for key in state if "sparse_attention" not in key]
    assert names == ["base_model.model.model.embed_tokens.weight"]
    expected = model(input_ids=TOKENS).logits
    assert torch.equal(hf_sparse.from_pretrained(tmp_path / "adapter")(input_ids=TOKENS).logits, expected)
    other = "base_model.model.lm_head.weight"
    save_file(state | {other: state[names[0]].clone()}, path, metadata={"format": "pt"})
    assert torch.equal(hf_sparse.from_pretrained(tmp_path / "adapter")(input_ids=TOKENS).logits, expected)
    save_file(state | {other: state[names[0]] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="are one parameter of the base model, and differ"):
        hf_sparse.from_pretrained(tmp_path / "adapter")


def test_part_of_the_embeddings_is_unexpected(base, tmp_path):
    save_adapter(get_peft_model(load_base(base), CONFIGS["sparsek"]()), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.zeros(64, 32)}, path)
    with pytest.raises(HubError, match=r"unexpected: base_model\.model\.lm_head\.weight"):
        hf_sparse.from_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    save_adapter(get_peft_model(load_base(base), CONFIGS["sparsek"]()), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"saves_embeddings": True}))
    with pytest.raises(HubError, match="missing: the embeddings that it brings"):
        hf_sparse.from_pretrained(tmp_path / "adapter")
