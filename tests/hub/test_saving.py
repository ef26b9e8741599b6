"""PEFT's and the Trainer's own saving and pushing leave our card, and claim nothing of other weights."""

import copy
import json
import pickle
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_sparse
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.hub import push_to_hub, write_repo

pytestmark = [pytest.mark.usefixtures("blank_pictures_in_module"), pytest.mark.versions]

BASE = "tester/saving-llama"
CONFIGS = {
    "sparsek": lambda **task: hf_sparse.SparseKConfig(k=4, window=4, sinks=1, **task),
    "sparsefinder": lambda **task: hf_sparse.SparsefinderConfig(
        tile=16, tiles_per_query=2, window=1, clusters=4, **task
    ),
}
SAID = {"sparsek": "Learned sparse attention for", "sparsefinder": "Predicted entmax attention for"}
MEASURED = {
    "format": 1,
    "base_model": BASE,
    "budget": {"k": 4, "window": 4, "sinks": 1, "slots": 9},
    "text": {"name": "held out", "sha256": "ab" * 32, "chunks": 2, "length": 40, "predicted_tokens": 78},
    "perplexity": {"dense": 10.0, "recency": 11.0, "random": 12.0, "learned": 10.5},
    "kv_bytes": {"dense": 40960, "sparse": 9216, "sparse_bookkeeping": 200, "tokens": 40},
    "tokens_per_second": {"dense": 100.0, "sparse": 90.0, "new_tokens": 8},
    "machine": {"system": "Linux"},
    "versions": {"hf-sparse": "0.1.0"},
}


@pytest.fixture(scope="module", autouse=True)
def base(hub):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).push_to_hub(BASE)


def make(method: str, **task: str) -> PeftModel:
    return get_peft_model(LlamaForCausalLM.from_pretrained(BASE), CONFIGS[method](**task))


@pytest.fixture(params=CONFIGS)
def method(request) -> str:
    return request.param


def change(model: PeftModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)


def check(card: ModelCard, method: str, repo_id: str = "") -> None:
    assert SAID[method] in card.text and "[More Information Needed]" not in card.text
    assert "generated automatically" not in card.text
    assert card.data.library_name == "peft" and {"hf-sparse", method} <= set(card.data.tags)  # type: ignore[attr-defined]
    assert card.data.base_model == BASE and f'from_pretrained("{repo_id}' in card.text  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", [{}, {"task_type": "CAUSAL_LM"}])
def test_save_pretrained(method, task, tmp_path):
    model = make(method, **task)
    model.save_pretrained(tmp_path / "a")
    check(ModelCard.load(tmp_path / "a" / "README.md"), method, "a")
    model.add_adapter("second", CONFIGS[method](**task))
    model.save_pretrained(tmp_path / "b", selected_adapters=["second"])
    assert not (tmp_path / "b" / "README.md").exists()
    check(ModelCard.load(tmp_path / "b" / "second" / "README.md"), method, "second")
    model.save_pretrained(tmp_path / "c", is_main_process=False)
    assert not (tmp_path / "c" / "README.md").exists()


def test_card_that_a_person_wrote_stays(method, tmp_path):
    (tmp_path / "README.md").write_text("My adapter, see below.")
    make(method).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My adapter, see below."


def test_blank_card_of_an_earlier_save_goes(method, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n[More Information Needed]\n")
    make(method).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    check(card, method)
    assert card.data.license == "mit" and "mine" in card.data.tags


def test_measurements_are_shown_of_the_same_weights_alone(tmp_path):
    model = make("sparsek")
    model.save_pretrained(tmp_path)
    write_repo(tmp_path, evaluation={**MEASURED, "weights_sha256": AdapterFolder(tmp_path).weights_sha256})
    model.save_pretrained(tmp_path)
    assert "10.500" in ModelCard.load(tmp_path / "README.md").text
    change(model)
    model.save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "10.500" not in text and "Nothing was measured: eval.json is not known to be of these weights." in text
    for content in (json.dumps(MEASURED), "{"):  # of nobody knows which weights
        (tmp_path / "eval.json").write_text(content)
        if content == "{":
            with pytest.warns(UserWarning, match=r"does without eval\.json: eval\.json is damaged"):
                model.save_pretrained(tmp_path)
        else:
            model.save_pretrained(tmp_path)
        assert "10.500" not in ModelCard.load(tmp_path / "README.md").text


def test_push_to_hub_of_peft(method, hub):
    repo_id = f"tester/saving-push-{method}"
    model = make(method)
    model.push_to_hub(repo_id, tags=["mine"])
    card = ModelCard.load(repo_id)
    check(card, method, repo_id)
    assert "mine" in card.data.tags
    hf_sparse.from_pretrained(repo_id)


def test_push_to_hub_of_peft_over_a_measured_one(hub):
    repo_id = "tester/saving-over"
    model = make("sparsek")
    push_to_hub(model, repo_id, evaluation=MEASURED, license="mit")
    assert "10.500" in ModelCard.load(repo_id).text
    change(model)
    model.push_to_hub(repo_id)
    card = ModelCard.load(repo_id)
    check(card, "sparsek", repo_id)
    assert "10.500" not in card.text and "eval.json is not known to be of these weights" in card.text
    assert card.data.license == "mit"


def test_trainer(method, hub, tmp_path):
    repo_id = f"tester/saving-trainer-{method}"
    options = {"hub_model_id": repo_id, "report_to": [], "use_cpu": True}
    trainer = Trainer(make(method), TrainingArguments(str(tmp_path / "out"), **options))
    readme = Path(tmp_path / "out" / "README.md")
    trainer.save_model()
    check(ModelCard.load(readme), method)
    trainer.create_model_card(tags="mine", license="mit")
    card = ModelCard.load(readme)
    check(card, method)
    assert "mine" in card.data.tags and card.data.license == "mit"
    trainer.push_to_hub()
    check(ModelCard.load(repo_id), method)
    assert "adapter_model.safetensors" in HfApi().list_repo_files(repo_id)


def test_models_stay_what_they_were(method, tmp_path):
    model = make(method, task_type="CAUSAL_LM")
    assert isinstance(model, PeftModelForCausalLM) and type(model).__name__ == "PeftModelForCausalLM"
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same) is type(model)
    plain = get_peft_model(LlamaForCausalLM.from_pretrained(BASE), LoraConfig(target_modules=["q_proj"]))
    assert type(plain) is PeftModel
    plain.save_pretrained(tmp_path)
    assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
    assert peft.PeftModel.save_pretrained.__module__ == "peft.peft_model"
