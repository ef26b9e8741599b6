"""Full models: pushed and saved in both forms, sparse with hf-sparse, dense and with a warning without it."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import hf_sparse
from hf_sparse import cli
from hf_sparse.adapters.load import load_adapter
from hf_sparse.errors import HubError
from hf_sparse.hub import from_pretrained, plan_push, push_to_hub, save_full_model
from hf_sparse.workflow import evaluate_adapter

pytestmark = [pytest.mark.usefixtures("blank_pictures_in_module"), pytest.mark.versions]

TOKENS = torch.arange(1, 41)[None] * 7 % 64  # longer than what a query attends to below
CONFIGS = {
    "sparsek": lambda **more: hf_sparse.SparseKConfig(k=4, window=4, sinks=1, **more),
    "sparsefinder": lambda **more: hf_sparse.SparsefinderConfig(
        tile=8, tiles_per_query=1, window=1, predictor="bound", **more
    ),
}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base_id(hub, tiny_llama) -> str:
    """A tiny random Llama on the loopback Hub, in three shards or so, with a license."""
    name = f"{hub.user}/full-model-llama"
    tiny_llama().push_to_hub(name, max_shard_size="20KB")
    HfApi().upload_file(path_or_fileobj=b"use it well", path_in_repo="LICENSE", repo_id=name)
    return name


@pytest.fixture
def make(base_id):
    """Makes a model with random parameters of an adapter."""

    def model(method: str = "sparsek", lora_rank: int = 2, base=base_id) -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(base) if isinstance(base, str) else base
        return scrambled(get_peft_model(base, CONFIGS[method](lora_rank=lora_rank)))

    return model


def scrambled(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def content(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.cross("values")
@pytest.mark.parametrize("form", ["full", "merged"])
@pytest.mark.parametrize("method", CONFIGS)
def test_there_and_back(make, base_id, hub, tmp_path, caplog, method, form):
    caplog.set_level(logging.WARNING, "transformers")  # which verbs of the command line make less
    model, name = make(method), f"{hub.user}/{method}-{form}"
    expected = logits(model)
    push_to_hub(model, name, form=form)
    save_full_model(model, tmp_path / "saved", form=form)
    loaded = from_pretrained(name, cache_dir=tmp_path / "cache")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert torch.equal(logits(loaded), logits(from_pretrained(tmp_path / "saved")))
    offline = from_pretrained(name, cache_dir=tmp_path / "cache", local_files_only=True)
    assert torch.equal(logits(loaded), logits(offline))
    if form == "full":
        assert torch.equal(logits(loaded), expected)
    else:
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)
        assert loaded.active_peft_config.lora_rank == 0
    # Saved by itself, the adapter goes on with what is dense in the full model.
    assert loaded.active_peft_config.base_model_name_or_path == name and not hasattr(loaded.config, "hf_sparse")
    loaded.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(from_pretrained(tmp_path / "adapter")), logits(loaded))

    caplog.clear()
    plain, base = AutoModelForCausalLM.from_pretrained(name), AutoModelForCausalLM.from_pretrained(base_id)
    assert "hf_sparse.model.layers." in caplog.text and "UNEXPECTED" in caplog.text
    with loaded.disable_adapter():
        assert torch.equal(logits(plain), logits(loaded))
    assert torch.equal(logits(plain), logits(base)) == (form == "full")


def test_what_it_is_can_be_read(make, base_id, tmp_path):
    """Without this library: the key in config.json, the index, the shards, and the card."""
    model = make()
    save_full_model(model, tmp_path / "model")
    inside = content(tmp_path / "model" / "config.json")["hf_sparse"]
    assert inside["form"] == "full" and inside["adapter"]["peft_type"] == "HF_SPARSE_SPARSEK"
    assert inside["adapter"]["base_model_name_or_path"] == base_id
    index = content(tmp_path / "model" / INDEX)
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2 and shards == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    held, size = {}, 0
    for shard in shards:
        tensors = load_file(tmp_path / "model" / shard)
        held |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == held and index["metadata"]["total_size"] == size
    assert {key.startswith("hf_sparse.") for key, shard in held.items() if shard == shards[-1]} == {True}
    assert not any(key.startswith("hf_sparse.") for key, shard in held.items() if shard != shards[-1])
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "**Without the library `hf-sparse` this is a DENSE model.**" in card and "PeftModel" not in card
    data: Any = ModelCard(card).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("hf-sparse", base_id, "finetune")
    assert f"base_model:finetune:{base_id}" in data.tags
    assert (tmp_path / "model" / "LICENSE").read_text() == "use it well"


def test_merged_weights_are_rounded_sums(make, tiny_llama, tmp_path):
    """In a checkpoint of bfloat16, and of what LoRA does not change no bit does."""
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = make(base=str(tmp_path / "base"))
    save_full_model(model, tmp_path / "model", form="merged")
    before, adapter = load_file(tmp_path / "base" / "model.safetensors"), model.state_dict()
    after = load_file(tmp_path / "model" / "model-00001-of-00002.safetensors")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        if (layer := key.removesuffix(".weight").rpartition(".")[::2]) and layer[1].endswith("_proj"):
            lora = f"base_model.model.{layer[0]}.sparse_attention.sparsek_lora.default.{layer[1]}"
            if f"{lora}_A" in adapter:
                weight = (weight.float() + 2 * adapter[f"{lora}_B"] @ adapter[f"{lora}_A"]).to(torch.bfloat16)
                assert not torch.equal(weight, before[key])
        assert torch.equal(weight, after[key]), key
    with safe_open(tmp_path / "model" / "model-00002-of-00002.safetensors", "pt") as file:
        assert not any("lora" in key for key in file.keys())  # noqa: SIM118


def test_merged_conv1d_under_shorter_names(make, tmp_path):
    """GPT-2 stores weights the other way round, and checkpoints of it lack the first part of their names."""
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    base = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, bos_token_id=1, eos_token_id=2))
    base.base_model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(content(path) | {"architectures": ["GPT2LMHeadModel"]}))
    model = make(base=str(tmp_path / "base"))
    save_full_model(model, tmp_path / "model", form="merged")
    loaded = from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


def test_head_comes_along(tiny_bert, tmp_path):
    tiny_bert("BertModel").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    config = CONFIGS["sparsek"](task_type="SEQ_CLS")
    model = scrambled(get_peft_model(base, config))
    save_full_model(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert loaded.config.num_labels == 3 and torch.equal(logits(loaded), logits(model))


def test_base_model_in_a_folder_and_verbs(make, tiny_llama, word_tokenizer, hub, tmp_path):
    """An adapter of a base that was never published is pushed as a full model; a tokenizer and no code come along."""
    tiny_llama().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(content(path) | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))
    (tmp_path / "base" / "evil.py").write_text("raise SystemExit('code ran')")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"no pickle is read")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")  # of images
    model = make(lora_rank=0, base=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(HubError, match="or push as full, with that model inside"):
        push_to_hub(tmp_path / "adapter", f"{hub.user}/full-of-a-folder")
    push_to_hub(tmp_path / "adapter", f"{hub.user}/full-of-a-folder", form="full")
    assert not [
        name for name in HfApi().list_repo_files(f"{hub.user}/full-of-a-folder") if name.endswith((".py", ".bin"))
    ]
    assert "base_model" not in ModelCard.load(f"{hub.user}/full-of-a-folder").data.to_dict()
    assert torch.equal(logits(from_pretrained(f"{hub.user}/full-of-a-folder")), logits(model))

    save_full_model(tmp_path / "adapter", tmp_path / "model")
    assert (tmp_path / "model" / "preprocessor_config.json").exists()
    shutil.rmtree(tmp_path / "base")
    assert "auto_map" not in content(tmp_path / "model" / "config.json")
    shown = CliRunner().invoke(cli.app, ["info", str(tmp_path / "model"), "--json"])
    assert json.loads(shown.stdout)["base_model"] == str((tmp_path / "model").resolve())
    loaded, tokenizer = load_adapter(tmp_path / "model")  # what `generate` and `chat` load
    assert torch.equal(logits(loaded), logits(model)) and tokenizer("w5 w6").input_ids
    with pytest.raises(HubError, match=r"it is a full model, which hf_sparse\.from_pretrained loads"):
        evaluate_adapter(tmp_path / "model", "w5 w6", "words")


def test_code_and_pickles_in_a_full_model_are_not_read(make, tmp_path):
    save_full_model(make(lora_rank=0), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('code ran')")
    evil = content(path) | {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    path.write_text(json.dumps(evil))
    from_pretrained(tmp_path / "model")
    path.write_text(json.dumps(evil | {"model_type": "evil"}))
    with pytest.raises(HubError, match="contains custom code which must be executed"):
        from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code=True is refused"):
        from_pretrained(tmp_path / "model", trust_remote_code=True)
    path.write_text(json.dumps(evil | {"transformers_weights": "pytorch_model.bin"}))
    with pytest.raises(HubError, match="expected a file of safetensors"):
        from_pretrained(tmp_path / "model")


def test_private_branch_pull_request_and_plan(make, hub):
    model, api, name = make(), HfApi(), f"{hub.user}/full-options"
    plan = plan_push(model, name, form="full", revision="sparse")
    assert not api.repo_exists(name) and hub.count("PUT", "/lfs/") == 0
    assert plan.creates == (f"the repository {name}", "the branch sparse") and INDEX in plan.uploads
    push_to_hub(model, name, form="full", private=True, revision="sparse")
    assert api.model_info(name).private and INDEX not in api.list_repo_files(name)
    assert {*plan.uploads} <= {*api.list_repo_files(name, revision="sparse")}
    assert torch.equal(logits(from_pretrained(name, revision="sparse")), logits(model))
    other = make("sparsefinder")
    url = push_to_hub(other, name, form="merged", revision="sparse", create_pr=True)
    assert url.endswith(f"{name}/discussions/1")
    assert from_pretrained(name, revision="refs/pr/1").active_peft_config.lora_rank == 0
    assert torch.equal(logits(from_pretrained(name, revision="sparse")), logits(model))


def test_a_repository_holds_what_was_pushed_last(make, base_id, hub):
    """As an adapter, then as a full model, then as an adapter again; another's model is not replaced."""
    model, api, name = make(), HfApi(), f"{hub.user}/full-and-back"
    push_to_hub(model, name)
    push_to_hub(model, name, form="full")
    assert not [file for file in api.list_repo_files(name) if file.startswith("adapter")]
    push_to_hub(model, name)
    assert sorted(api.list_repo_files(name)) == [
        ".gitattributes",
        *("LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json"),
    ]
    before = api.model_info(base_id).sha
    with pytest.raises(HubError, match="holds another model"):
        push_to_hub(model, base_id, form="full")
    assert api.model_info(base_id).sha == before


def test_weights_of_other_names(make, tiny_llama, hub, tmp_path):
    """Shards of a base model are those that its index names; a single file in the repository would hide the shards."""
    api, base, name = HfApi(), f"{hub.user}/odd-shards", f"{hub.user}/odd-shards-full"
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    index = content(tmp_path / INDEX)
    for shard in {*index["weight_map"].values()}:
        (tmp_path / shard).rename(tmp_path / shard.replace("model-", "model.safetensors-"))
    odd = {key: shard.replace("model-", "model.safetensors-") for key, shard in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(index | {"weight_map": odd}))
    api.create_repo(base)
    api.upload_folder(repo_id=base, folder_path=tmp_path)
    model = make(base=str(tmp_path))  # so that nothing of the repository is in the cache
    push_to_hub(model, name, form="full", base_model=base)
    assert torch.equal(logits(from_pretrained(name)), logits(model))

    AutoModelForCausalLM.from_pretrained(name).push_to_hub(name)  # by transformers alone, which reads one file first
    assert "model.safetensors" in api.list_repo_files(name)
    push_to_hub(model, name, form="full", base_model=base)
    assert "model.safetensors" not in api.list_repo_files(name)

    weights = f"{hub.user}/weights-alone"
    api.create_repo(weights)
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="model.safetensors", repo_id=weights)
    with pytest.raises(HubError, match=r"holds another model \(model\.safetensors\)"):
        push_to_hub(model, weights, form="full")


def test_refusals(make, tiny_llama, base_id, hub, tmp_path):
    plain = make(lora_rank=0)
    with pytest.raises(HubError, match=r"^the adapter has no LoRA to merge \(lora_rank is 0\)"):
        push_to_hub(plain, f"{hub.user}/refused", form="merged")
    with pytest.raises(ValueError, match="form must be one of adapter, full, merged, got 'dense'"):
        push_to_hub(plain, f"{hub.user}/refused", form="dense")
    with pytest.raises(HubError, match="the token that was passed"):
        save_full_model(plain, tmp_path / "model", token="hf_with a space")
    with pytest.raises(HubError, match="there is no adapter to push"):
        save_full_model(tmp_path / "nothing", tmp_path / "model")
    assert not HfApi().repo_exists(f"{hub.user}/refused") and not any(tmp_path.iterdir())

    save_full_model(plain, tmp_path / "model")
    with pytest.raises(ValueError, match=r"not an empty folder; choose another$"):  # it has no force
        save_full_model(plain, tmp_path / "model")
    with pytest.raises(ValueError, match="base_model= is of no use"):
        from_pretrained(tmp_path / "model", base_model=base_id)

    frozen = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], inference_mode=True))
    over = get_peft_model(frozen.get_base_model(), CONFIGS["sparsek"]())
    over.active_peft_config.base_model_name_or_path = base_id
    over.save_pretrained(tmp_path / "over")
    with pytest.raises(HubError, match="made over another PEFT adapter"):
        save_full_model(tmp_path / "over", tmp_path / "other")


def test_damaged(make, tmp_path):
    """Saved again by transformers alone, or with parts that are not what they should be."""
    save_full_model(make(lora_rank=0), tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    with pytest.raises(HubError, match="something that does not know hf-sparse saved it again"):
        from_pretrained(tmp_path / "again")
    path = tmp_path / "model" / INDEX
    good, last = content(path), max(content(path)["weight_map"].values())

    def change(new: dict[str, str]) -> None:
        path.write_text(json.dumps(good | {"weight_map": new}))

    dense = {key: name for key, name in good["weight_map"].items() if name != last}
    sparse = [key for key, name in good["weight_map"].items() if name == last]
    for weights, message in (
        (dense, "are those of the dense base model alone"),
        (dense | dict.fromkeys(sparse, "../outside.safetensors"), "must name files of safetensors in the folder"),
        (dense | dict.fromkeys(sparse, "pytorch_model.bin"), "must name files of safetensors in the folder"),
        (dense | dict.fromkeys(sparse, last) | {sparse[0]: "model-0.safetensors"}, r"model-0\.safetensors .* damaged"),
    ):
        change(weights)
        with pytest.raises(HubError, match=message):
            from_pretrained(tmp_path / "model")
    change(good["weight_map"])
    (tmp_path / "model" / last).write_bytes(b"not safetensors")
    with pytest.raises(HubError, match=f"{last} of .* is damaged"):
        from_pretrained(tmp_path / "model")


def test_damaged_base_model(make, tiny_llama, tmp_path):
    """Weights that are missing, pickled or cut off: one error, and no folder."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = make(base=str(tmp_path / "base"))
    path = tmp_path / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(HubError, match=r"^cannot make a full model with the base model .*: "):
        save_full_model(model, tmp_path / "model", form="merged")
    path.rename(tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(HubError, match=r"expected the base model's weights in model\.safetensors or"):
        save_full_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.full
def test_a_base_model_that_is_a_full_model(make, tmp_path):
    """Its dense part is a base model as any other, and transformers warns of nothing when it is loaded as one."""
    first = make("sparsefinder", lora_rank=0)
    save_full_model(first, tmp_path / "first")
    second = from_pretrained(tmp_path / "first").unload()
    second = scrambled(get_peft_model(second, CONFIGS["sparsek"]()))
    second.active_peft_config.base_model_name_or_path = str(tmp_path / "first")
    save_full_model(second, tmp_path / "second")
    keys = content(tmp_path / "second" / INDEX)["weight_map"]
    assert not any("sparsefinder" in key for key in keys)
    assert torch.equal(logits(from_pretrained(tmp_path / "second")), logits(second))
