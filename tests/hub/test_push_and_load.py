"""Adapters go all the way: pushed in one commit, loaded elsewhere with the same bits, every refusal explained."""

import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download, metadata_load, snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import hf_sparse
from hf_sparse.demo import CHECKPOINT
from hf_sparse.errors import AdapterMismatchError, BusyError, DataError, HubError, UnsupportedModelError
from hf_sparse.evaluation import evaluate
from hf_sparse.folders import locked
from hf_sparse.hub import from_pretrained, plan_push, push_to_hub, resolve_base, write_repo
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
from hf_sparse.patches import sparse_layers, sparse_layers_in_use

pytestmark = [pytest.mark.usefixtures("blank_pictures_in_module"), pytest.mark.versions]

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "eval.json", "finetune.json", "quality.png"]
TOKENS = torch.arange(1, 41)[None] * 7 % 64  # longer than the 9 slots below
BUDGET = {"k": 4, "window": 4, "sinks": 1}

EVALUATION = {
    "format": 1,
    "base_model": "/somebody/home/base",
    "budget": {**BUDGET, "slots": 9},
    "text": {"name": "held out", "sha256": "ab" * 32, "chunks": 2, "length": 40, "predicted_tokens": 78},
    "perplexity": {"dense": 10.0, "recency": 11.0, "random": 12.0, "learned": 10.5},
    "kv_bytes": {"dense": 40960, "sparse": 9216, "sparse_bookkeeping": 200, "tokens": 40},
    "tokens_per_second": {"dense": 100.0, "sparse": 90.0, "new_tokens": 8},
    "machine": {"system": "Linux"},
    "versions": {"hf-sparse": "0.1.0"},
}
TRAINING = {
    "format": 1,
    "objective": "distill",
    "settings": {"objective": "distill", "steps": 2, "length": 40},
    "trainable_parameters": 128,
    "all_parameters": 20000,
    "tokens": 160,
    "seconds": 1.5,
    "tokens_per_second": 106.0,
    "history": [
        {"step": 1, "stage": "attention", "loss": 2.0, "learning_rate": 0.01, "tokens_per_second": 1.0},
        {"step": 2, "stage": "distill", "loss": 0.5, "learning_rate": 0.01, "tokens_per_second": 1.0},
    ],
    "machine": {"system": "Linux"},
    "versions": {"hf-sparse": "0.1.0"},
}


def llama(hidden_size: int = 32) -> LlamaForCausalLM:
    shape = {"vocab_size": 64, "hidden_size": hidden_size, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()


@pytest.fixture(scope="module")
def base_id(hub) -> str:
    """A tiny random Llama and its tokenizer on the loopback Hub."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "sparse": 1, "attention": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    name = f"{hub.user}/tiny-llama"
    llama().push_to_hub(name)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").push_to_hub(name)
    return name


@pytest.fixture
def model(base_id) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(base_id)
    return get_peft_model(base, hf_sparse.SparseKConfig(**BUDGET)).eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The adapter as `save_pretrained` leaves it."""
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


@pytest.fixture
def api() -> HfApi:
    return HfApi()


@pytest.fixture
def repo_id(hub, request) -> str:
    """A name that no repository has yet."""
    return f"{hub.user}/{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower()).strip('-')[:90].strip('-')}"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def titles(api: HfApi, repo_id: str) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo_id)]


def files(api: HfApi, repo_id: str, **options: str) -> list[str]:
    return [name for name in api.list_repo_files(repo_id, **options) if name != ".gitattributes"]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# There and back.

LOAD = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, repo, out = sys.argv[1:]
try:  # what a user sees who forgot the import; the card says so
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo)
except KeyError as error:
    assert str(error) == "'HF_SPARSE_SPARSEK'", error
else:
    raise AssertionError("PEFT knows the adapter without hf_sparse")
import hf_sparse

tokens = torch.arange(1, 41)[None] * 7 % 64
ours = hf_sparse.from_pretrained(repo)
peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo)
with torch.no_grad():
    results = {"ours": ours(input_ids=tokens).logits, "peft": peft(input_ids=tokens).logits}
    results["generated"] = ours.generate(input_ids=tokens, max_new_tokens=20, do_sample=False, pad_token_id=0)
save_file(results, out)
"""


@pytest.mark.full  # test_all_verbs_of_the_command_line pushes in one process, and another loads it
@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_fresh_process_gives_the_same_bits(model, base_id, repo_id, hub_env, tmp_path, offline):
    push_to_hub(model, repo_id)
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), expected)
    if offline:
        for name in (base_id, repo_id):
            snapshot_download(name, cache_dir=f"{hub_env['HF_HOME']}/hub")
    out = tmp_path / "found.safetensors"
    environment = hub_env | {"HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", LOAD, base_id, repo_id, str(out)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    found = load_file(out)
    assert torch.equal(found["ours"], expected) and torch.equal(found["peft"], expected)
    generated = model.generate(input_ids=TOKENS, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(found["generated"], generated)


def test_sparsefinder_goes_there_and_back(base_id, repo_id, api, tmp_path):
    """Scales, projections and centroids travel; card and figure are made from the measurement."""
    settings = {"tile": 16, "tiles_per_query": 2, "window": 1, "clusters": 4}
    base = AutoModelForCausalLM.from_pretrained(base_id)
    model = get_peft_model(base, hf_sparse.SparsefinderConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    fit_predictors(sparse_layers_in_use(model, SparsefinderAttention), lambda: model(input_ids=TOKENS))
    expected = logits(model)
    measured = evaluate(model, TOKENS, selections=["predicted", "oracle"], sparsities=(0.5,), progress=False)
    push_to_hub(model, repo_id, evaluation=measured)
    held = {"README.md", "adapter_config.json", "adapter_model.safetensors", "eval.json", "pareto.png"}
    assert set(files(api, repo_id)) == held
    card = ModelCard.load(repo_id)
    assert card.data.base_model == base_id and "sparsefinder" in card.data.tags
    assert f"{measured['full']['perplexity']:.2f}" in card.text
    ours = from_pretrained(repo_id, cache_dir=tmp_path)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_id), repo_id, cache_dir=tmp_path)
    assert torch.equal(logits(ours), expected) and torch.equal(logits(peft), expected)
    options = {"input_ids": TOKENS, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**options), model.generate(**options))

    push_to_hub(
        get_peft_model(AutoModelForCausalLM.from_pretrained(base_id), hf_sparse.SparseKConfig(**BUDGET)), repo_id
    )
    assert set(files(api, repo_id)) == held - {"eval.json", "pareto.png"}  # they measured the other adapter


@pytest.mark.full
def test_without_the_import_peft_names_hf_sparse(model, base_id, repo_id, hub_env, tmp_path):
    """What a user sees who forgot `import hf_sparse`; the card says so."""
    push_to_hub(model, repo_id)
    code = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM as Auto\n"
        "PeftModel.from_pretrained(Auto.from_pretrained(sys.argv[1]), sys.argv[2])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, base_id, repo_id], env=hub_env, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-1] == "KeyError: 'HF_SPARSE_SPARSEK'"


def test_one_commit_with_the_wanted_files(model, base_id, api, hub, repo_id):
    url = push_to_hub(model, repo_id, evaluation=EVALUATION, training=TRAINING, commit_message="first")
    assert url == f"{hub.endpoint}/{repo_id}"
    assert hub.count("POST", "/commit/") == 1 and titles(api, repo_id) == ["first", "initial commit"]
    assert files(api, repo_id) == FILES

    card = ModelCard.load(repo_id)
    card.validate()
    assert card.data.base_model == base_id and card.data.base_model_relation == "adapter"
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert {"hf-sparse", "sparsek", "sparse-attention"} <= set(card.data.tags)
    assert f'hf_sparse.from_pretrained("{repo_id}")' in card.text
    published = json.loads(Path(hf_hub_download(repo_id, "eval.json")).read_text())
    weights = Path(hf_hub_download(repo_id, "adapter_model.safetensors")).read_bytes()
    marks = {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    assert json.loads(Path(hf_hub_download(repo_id, "finetune.json")).read_text()) == TRAINING | marks
    marks |= {"settings_sha256": published.get("settings_sha256")}
    assert published == EVALUATION | marks | {"base_model": base_id}  # no path of this machine
    assert re.fullmatch("[0-9a-f]{64}", published["settings_sha256"])
    assert AutoTokenizer.from_pretrained(card.data.base_model)("sparse attention")["input_ids"] == [1, 2]

    push_to_hub(model, repo_id, evaluation=EVALUATION, training=TRAINING)
    assert len(titles(api, repo_id)) == 2  # nothing has changed, so there is nothing to commit


def test_measurements_of_an_earlier_push_go_and_foreign_files_stay(model, api, hub, repo_id):
    push_to_hub(model, repo_id, evaluation=EVALUATION, training=TRAINING)
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=repo_id)
    hub.reset_trace()
    push_to_hub(model, repo_id)
    assert hub.count("POST", "/commit/") == 1
    assert files(api, repo_id) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "notes.txt"]
    assert "Nothing was measured" in ModelCard.load(repo_id).text


def test_folder(folder, api, repo_id):
    for name in ("adapter_model.bin", "notes.txt", "checkpoints/2/optimizer.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "eval.json").write_text(json.dumps(EVALUATION))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    push_to_hub(str(folder), repo_id)
    assert files(api, repo_id) == [name for name in FILES if name != "finetune.json"]
    assert "[More Information Needed]" not in ModelCard.load(repo_id).text  # not the card that PEFT wrote
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_another_run_replaces_is_not_pushed(folder, api, hub, repo_id):
    with ThreadPoolExecutor(1) as other, locked(folder):
        pushed = other.submit(hf_sparse.push_to_hub, folder, repo_id)
        with pytest.raises(BusyError, match=r"is in use by another run \(pid"):
            pushed.result()
    assert not api.repo_exists(repo_id)
    folder.chmod(0o500)  # nobody replaces what takes no files
    try:
        hf_sparse.push_to_hub(folder, repo_id)
    finally:
        folder.chmod(0o700)


def test_active_adapter_of_several(model, hub, repo_id):
    model.add_adapter("stage", hf_sparse.SparseKConfig(k=2, window=3, sinks=0))
    model.set_adapter("stage")
    push_to_hub(model, repo_id)
    loaded = from_pretrained(repo_id, adapter_name="again")
    assert loaded.active_adapters == ["again"] and loaded.peft_config["again"].slots == 5  # type: ignore[attr-defined]
    assert torch.equal(logits(loaded), logits(model))


def test_branch(model, api, repo_id):
    push_to_hub(model, repo_id)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "sparsek_" in name):
            parameter.neg_()
    push_to_hub(model, repo_id, revision="other")
    push_to_hub(model, repo_id, revision="other", evaluation=EVALUATION)
    assert len(files(api, repo_id)) == 3 and len(files(api, repo_id, revision="other")) == 5
    other, main = from_pretrained(repo_id, revision="other"), from_pretrained(repo_id)
    assert torch.equal(logits(other), logits(model)) and not torch.equal(logits(main), logits(model))


def test_name_without_an_owner(model, api, hub):
    assert push_to_hub(model, "bare-name") == f"{hub.endpoint}/{hub.user}/bare-name"
    assert f"{hub.user}/bare-name" in ModelCard.load(f"{hub.user}/bare-name").text


def test_one_of_several_processes_pushes(model, api, hub, repo_id, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        hub.reset_trace()
        assert push_to_hub(model, repo_id) == f"{hub.endpoint}/{repo_id}"
        assert hub.count("POST", "/commit/") == (rank == "0")


def test_private(model, api, repo_id, tmp_path):
    push_to_hub(model, repo_id, private=True)
    assert api.model_info(repo_id).private
    push_to_hub(model, repo_id, private=True, commit_message="again")
    with pytest.raises(HubError, match="no such repository, or this token may not see it"):
        from_pretrained(repo_id, token=False, cache_dir=tmp_path)
    push_to_hub(model, f"{repo_id}-open")
    with pytest.raises(HubError, match="exists and is public"):
        push_to_hub(model, f"{repo_id}-open", private=True)


def test_loaded_model_is_ready_to_generate_and_frozen(folder):
    loaded = from_pretrained(folder, dtype=torch.bfloat16)
    assert not loaded.training and all(not module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.get_base_model().dtype == torch.bfloat16
    trainable = from_pretrained(folder, is_trainable=True)
    assert {"sparsek_" in name for name, p in trainable.named_parameters() if p.requires_grad} == {True}


# The base model.


def test_bundled_base_is_called_demo(api, repo_id, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    model = get_peft_model(base, hf_sparse.SparseKConfig(**BUDGET)).eval()
    push_to_hub(model, repo_id)
    config = json.loads(Path(hf_hub_download(repo_id, "adapter_config.json")).read_text())
    assert config["base_model_name_or_path"] == "demo"
    assert ModelCard.load(repo_id).data.base_model is None
    assert torch.equal(logits(from_pretrained(repo_id)), logits(model))
    assert resolve_base("demo") == str(CHECKPOINT) and resolve_base("me/demo") == "me/demo"


def test_pull_request_leaves_the_branch_alone(model, api, hub, repo_id):
    with pytest.raises(HubError, match=f"a pull request changes what exists, and the repository {repo_id} does not"):
        push_to_hub(model, repo_id, create_pr=True)
    assert not api.repo_exists(repo_id)
    push_to_hub(model, repo_id, evaluation=EVALUATION)
    with pytest.raises(HubError, match="the branch v2 does not"):
        push_to_hub(model, repo_id, create_pr=True, revision="v2")
    before = api.model_info(repo_id).sha
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "sparsek_" in name):
            parameter.neg_()
    url = push_to_hub(model, repo_id, create_pr=True)
    assert url == f"{hub.endpoint}/{repo_id}/discussions/1"
    assert api.model_info(repo_id).sha == before and "eval.json" in files(api, repo_id)
    assert "eval.json" not in files(api, repo_id, revision="refs/pr/1")  # measured on other weights
    opened = from_pretrained(repo_id, revision="refs/pr/1")
    assert torch.equal(logits(opened), logits(model))
    assert not torch.equal(logits(from_pretrained(repo_id)), logits(model))


def test_plan_says_what_a_push_does_and_changes_nothing(model, api, hub, repo_id):
    plan = plan_push(model, repo_id, evaluation=EVALUATION, revision="v2")
    assert plan.creates == (f"the repository {repo_id}", "the branch v2") and plan.parent is None
    assert not api.repo_exists(repo_id)
    push_to_hub(model, repo_id, evaluation=EVALUATION)
    hub.reset_trace()
    plan = plan_push(model, repo_id, create_pr=True)
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD", "POST"}
    assert {path for method, path in hub.requests if method == "POST"} == {"/api/validate-yaml"}
    assert plan.creates == () and plan.create_pr and plan.parent == api.model_info(repo_id).sha
    assert plan.deletes == ("eval.json", "quality.png")
    assert list(plan.uploads) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    push_to_hub(model, repo_id)
    sizes = {file.rfilename: file.size for file in api.model_info(repo_id, files_metadata=True).siblings}
    assert plan.uploads.items() <= sizes.items()


@pytest.mark.parametrize(
    ("form", "kin", "library"), [("adapter", "adapter", "peft"), ("full", "finetune", "hf-sparse")]
)
def test_metadata_names_base_dataset_language_and_metric(model, base_id, api, repo_id, form, kin, library):
    page = b"---\nlicense: mit\nlanguage:\n- en\n- de\n---\n"
    api.upload_file(path_or_fileobj=page, path_in_repo="README.md", repo_id=base_id)
    trained = TRAINING | {"dataset": {"name": "me/books", "split": "train", "column": "text"}}
    try:
        push_to_hub(model, repo_id, form=form, evaluation=EVALUATION, training=trained)
    finally:
        api.delete_file("README.md", base_id)
    path = hf_hub_download(repo_id, "README.md")
    data = metadata_load(path)
    assert data is not None and data == ModelCardData(**data).to_dict() == ModelCard.load(path).data.to_dict()
    tags = data.pop("tags")
    assert f"base_model:{kin}:{base_id}" in tags and "hf-sparse" in tags and "sparsek" in tags
    assert data == {
        "license": "mit",
        "language": ["en", "de"],
        "library_name": library,
        "base_model": base_id,
        "base_model_relation": kin,
        "datasets": ["me/books"],
        "metrics": ["perplexity"],
        "pipeline_tag": "text-generation",
    }


def test_license_is_that_of_the_base_or_the_one_given(model, base_id, api, repo_id):
    def stated(**options):
        push_to_hub(model, repo_id, **options)
        data = ModelCard.load(repo_id).data.to_dict()
        return {name: value for name, value in data.items() if name.startswith("license")}

    def say(metadata):
        api.upload_file(path_or_fileobj=metadata.encode(), path_in_repo="README.md", repo_id=base_id)

    assert stated() == {}
    try:
        say("---\nlicense: mit\n---\n")
        assert stated() == {"license": "mit"}
        assert stated(license="apache-2.0") == {"license": "apache-2.0"}
        say("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
        link = f"https://huggingface.co/{base_id}/blob/main/LICENSE"
        assert stated() == {"license": "other", "license_name": "own", "license_link": link}
    finally:
        api.delete_file("README.md", base_id)


def test_local_base_has_to_be_pushed_first(base_id, api, hub, repo_id, tmp_path):
    AutoModelForCausalLM.from_pretrained(base_id).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, hf_sparse.SparseKConfig(**BUDGET)).eval()
    hub.reset_trace()
    with pytest.raises(HubError, match="push that model to the Hub first, then pass base_model='user/name'"):
        push_to_hub(model, repo_id)
    assert hub.requests == []
    push_to_hub(model, repo_id, base_model=base_id)
    for name in files(api, repo_id):
        assert str(tmp_path).encode() not in Path(hf_hub_download(repo_id, name)).read_bytes()
    assert torch.equal(logits(from_pretrained(repo_id)), logits(model))


def test_relative_folder_is_not_taken_for_a_hub_id(folder, hub, repo_id, tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    edit_config(folder, base_model_name_or_path="models/llama")
    with pytest.raises(HubError, match="is the folder 'models/llama', which exists on this machine alone"):
        push_to_hub(folder, repo_id)


def test_base_without_a_name(repo_id, tmp_path):
    model = get_peft_model(llama(), hf_sparse.SparseKConfig(**BUDGET)).eval()
    with pytest.raises(HubError, match="does not say which base model"):
        push_to_hub(model, repo_id)
    model.save_pretrained(tmp_path)
    with pytest.raises(HubError, match="does not say which base model"):
        from_pretrained(tmp_path)


def test_base_that_is_not_on_the_hub(model, api, repo_id):
    with pytest.raises(HubError, match="cannot read the base model 'tester/absent'"):
        push_to_hub(model, repo_id, base_model="tester/absent")
    assert not api.repo_exists(repo_id)


def test_other_base_is_named_and_left_alone(model, folder, api, hub, repo_id, tmp_path):
    other = llama(hidden_size=64)
    other.push_to_hub(f"{hub.user}/wide-llama")
    expected = logits(other)
    mismatch = f"does not fit the base model {hub.user}/wide-llama: .*hidden_size: 32 there, 64 here"
    with pytest.raises(AdapterMismatchError, match=mismatch):
        from_pretrained(folder, base_model=f"{hub.user}/wide-llama")
    assert not any("wide-llama" in path and "safetensors" in path for method, path in hub.requests if method == "GET")
    with pytest.raises(AdapterMismatchError, match="hidden_size: 32 there, 64 here"):
        from_pretrained(folder, base_model=other)
    assert sparse_layers(other) == [] and torch.equal(logits(other), expected)
    with pytest.raises(AdapterMismatchError, match=mismatch):
        push_to_hub(model, repo_id, base_model=f"{hub.user}/wide-llama")
    assert not api.repo_exists(repo_id)


def test_loaded_base(model, folder, base_id):
    base = AutoModelForCausalLM.from_pretrained(base_id)
    with pytest.raises(TypeError, match="no effect: dtype"):
        from_pretrained(folder, base_model=base, dtype=torch.bfloat16)
    loaded = from_pretrained(folder, base_model=base)
    assert loaded.get_base_model() is base and torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="sparse attention already"):
        from_pretrained(folder, base_model=base)
    with pytest.raises(TypeError, match=r"got PeftModel \(what it wraps is get_base_model"):
        from_pretrained(folder, base_model=loaded)


def test_base_without_a_patch(folder, tmp_path):
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "b")
    with pytest.raises(UnsupportedModelError, match="bloom"):
        from_pretrained(folder, base_model=tmp_path / "b")


def test_base_with_code_or_pickles_is_refused(folder, base_id, tmp_path):
    base, trace = tmp_path / "base", tmp_path / "ran"
    base.mkdir()
    (base / "evil.py").write_text(f"open({str(trace)!r}, 'w')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (base / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(HubError, match="cannot load the base model"):
        from_pretrained(folder, base_model=base)
    for option in ({"trust_remote_code": True}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is refused"):
            from_pretrained(folder, base_model=base, **option)
    assert not trace.exists()

    AutoModelForCausalLM.from_pretrained(base_id).save_pretrained(base)
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(HubError, match="cannot load the base model"):
        from_pretrained(folder, base_model=base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(HubError, match=r"cannot load the base model .* no file named model\.safetensors"):
        from_pretrained(folder, base_model=base)
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(HubError, match="holds an adapter itself"):
        from_pretrained(folder, base_model=base)


# Files that are missing, damaged or somebody else's.


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(folder, api, hub, name):
    (folder / name).unlink()
    for load in (from_pretrained, write_repo, lambda path: push_to_hub(path, f"{hub.user}/x")):
        with pytest.raises(HubError, match=f"not a complete adapter: {name} missing"):
            load(folder)
    repo = api.create_repo(f"incomplete-{name[8:13]}".replace("_", "-")).repo_id
    api.upload_folder(repo_id=repo, folder_path=folder)
    with pytest.raises(HubError, match=f"{repo} is not a complete adapter: {name} missing"):
        from_pretrained(repo)


def test_pickle_is_not_loaded(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(HubError, match=r"adapter_model\.bin is a pickle"):
        from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"peft_type": "HF_SPARSE_SPARSEK", "k": 0}'])
def test_damaged_configuration(folder, content):
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(HubError, match=r"adapter_config\.json of .* is damaged"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("LORA", r"expected HF_SPARSE_SPARSEFINDER or HF_SPARSE_SPARSEK; use peft\.PeftModel"),
        ("HF_SPARSE_NEW", "a newer hf-sparse, or the package of its method, may know"),
    ],
)
def test_adapter_of_another_type(folder, kind, advice):
    edit_config(folder, peft_type=kind)
    with pytest.raises(HubError, match=f"adapter of type {kind}, {advice if kind == 'LORA' else '.*' + advice}"):
        from_pretrained(folder)


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: data[8:], lambda data: b""])
def test_damaged_weights(folder, api, hub, damage, repo_id):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for load in (from_pretrained, lambda path: push_to_hub(path, repo_id)):
        with pytest.raises(HubError, match=r"adapter_model\.safetensors of .* is damaged"):
            load(folder)
    assert not api.repo_exists(repo_id)


def test_keys_have_to_be_those_of_the_scorers(model, folder, api, repo_id):
    def refuse(message: str) -> None:
        for load in (from_pretrained, lambda path: push_to_hub(path, repo_id)):
            with pytest.raises(HubError, match=rf"does not hold the parameters for tester/tiny-llama; {message}"):
                load(folder)

    key = "base_model.model.model.layers.1.self_attn.sparse_attention.sparsek_scorer.weight"
    edit_weights(folder, lambda state: {k: v for k, v in state.items() if k != key})
    refuse(f"missing: {key}")
    edit_weights(folder, lambda state: state | {key: torch.zeros(2, 31)})
    refuse(f"of another shape: {key}")
    # PEFT would overwrite the base's weights with this one, silently.
    edit_weights(folder, lambda state: state | {key: torch.zeros(2, 32), "base_model.model.lm_head.weight": state[key]})
    refuse(r"unexpected: base_model\.model\.lm_head\.weight")
    assert not api.repo_exists(repo_id)


# Refusals.


def test_names_of_what_is_not_there(folder, model, repo_id):
    with pytest.raises(HubError, match="cannot load the adapter tester/absent: there is no such repository"):
        from_pretrained("tester/absent")
    with pytest.raises(HubError, match="no/such/folder is neither a folder here nor a repository id"):
        from_pretrained("no/such/folder")
    with pytest.raises(HubError, match="no/such/folder is not a folder"):
        push_to_hub("no/such/folder", repo_id)
    with pytest.raises(ValueError, match="which has no revisions"):
        from_pretrained(folder, revision="main")
    push_to_hub(model, repo_id)
    with pytest.raises(HubError, match=f"cannot load the adapter {repo_id} at revision absent"):
        from_pretrained(repo_id, revision="absent")


@pytest.mark.parametrize("name", ["a/b/c", "me/two words", "", "me/-x"])
def test_repository_id_is_checked_first(model, hub, name):
    hub.reset_trace()
    with pytest.raises(HubError, match="is not a repository id such as 'user/name'"):
        push_to_hub(model, name)
    assert hub.requests == []


@pytest.mark.parametrize("thing", ["dense", "patched", "lora", "number"])
def test_type_of_what_is_pushed(thing):
    things = {
        "dense": lambda: llama(),
        "patched": lambda: hf_sparse.patch(llama(), hf_sparse.SparseKConfig(**BUDGET)),
        "lora": lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])),
        "number": lambda: 3,
    }
    with pytest.raises(TypeError, match=r"expected an active adapter of hf-sparse|expected a PeftModel or a folder"):
        push_to_hub(things[thing](), "tester/x")


def test_no_token(model, hub, monkeypatch, tmp_path):
    hub.reset_trace()
    for token in (False, None):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(HubError, match="cannot push to tester/x without a token: run `hf auth login`"):
            push_to_hub(model, "tester/x", token=token)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubError, match="empty is not a complete adapter"):  # whose token would be of no use
        push_to_hub(tmp_path / "empty", "tester/x")
    with pytest.raises(HubError, match="none is not a folder, so there is no adapter to push"):
        push_to_hub(tmp_path / "none", "tester/x")
    assert hub.requests == []
    with pytest.raises(HubError, match=r"cannot push to tester/x: the token is not valid \(401\): run `hf auth login`"):
        push_to_hub(model, "tester/x", token="hf_wrong")


def test_somebody_elses_name(model):
    with pytest.raises(HubError, match=r"cannot push to somebody/x: this token may not do that \(403\)"):
        push_to_hub(model, "somebody/x")


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/repos/create", 409, "the name is taken"),
        ("/api/repos/create", 503, r"the Hub failed \(503\): try again later"),
        ("/api/models/{}", 403, r"this token may not do that \(403\)"),
        ("/api/validate-yaml", 503, r"the Hub failed \(503\): try again later"),
    ],
)
def test_failure_before_anything_exists(model, api, hub, repo_id, path, status, message):
    hub.fail_next(path.format(repo_id), status)
    with pytest.raises(HubError, match=f"cannot push to {repo_id}: {message}") as error:
        push_to_hub(model, repo_id)
    assert "created before" not in str(error.value) and not api.repo_exists(repo_id)


@pytest.mark.parametrize(
    ("status", "message"),
    [(503, "try again later"), (409, "another change got in between"), (401, "hf auth login"), (403, "may not")],
)
def test_failed_commit_says_what_was_created(model, api, hub, repo_id, status, message):
    hub.fail_next("/commit/", status)
    created = f"created before that: the empty repository {repo_id} and the branch side; push again or delete"
    with pytest.raises(HubError, match=f"cannot push to {repo_id}: .*{message}.*{created}"):
        push_to_hub(model, repo_id, revision="side")
    assert titles(api, repo_id) == ["initial commit"] and files(api, repo_id, revision="side") == []
    push_to_hub(model, repo_id)
    hub.fail_next("/commit/", status)
    with pytest.raises(HubError, match=message) as error:
        push_to_hub(model, repo_id, evaluation=EVALUATION)
    assert "created before" not in str(error.value)
    assert len(titles(api, repo_id)) == 2 and "eval.json" not in files(api, repo_id)


def test_network_down(model, base_id, repo_id, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot push to .* the Hub cannot be reached .* check the network"):
        push_to_hub(model, repo_id)  # the configuration of the base is in the cache
    with pytest.raises(HubError, match=r"cannot load the adapter .* the Hub cannot be reached"):
        from_pretrained(repo_id, cache_dir=tmp_path)


def test_failures_while_loading(hub, repo_id, tmp_path, monkeypatch):
    hub.fail_next(repo_id, 503)
    with pytest.raises(HubError, match=r"the Hub failed \(503\): try again later; it is not in the cache either"):
        from_pretrained(repo_id, cache_dir=tmp_path)
    hub.fail_next(repo_id, 403)
    with pytest.raises(HubError, match=r"this token may not do that \(403\)"):
        from_pretrained(repo_id, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot load the adapter .*HF_HUB_OFFLINE"):
        from_pretrained(repo_id, cache_dir=tmp_path)


# The folder.


def test_write_repo_twice_and_failing(folder):
    write_repo(folder, evaluation=EVALUATION, training=TRAINING)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    before = {path: path.read_bytes() for path in folder.iterdir()}
    write_repo(folder)  # from the files that are there now
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    for broken, message in (
        (EVALUATION | {"budget": {**BUDGET, "k": 5, "slots": 10}}, "but the adapter has {'k': 4"),
        (EVALUATION | {"text": {}}, "is not what hf-sparse writes: .*sha256|name"),
        (EVALUATION | {"perplexity": {"learned": "low"}}, "is not what hf-sparse writes"),
    ):
        with pytest.raises(DataError, match=message):
            write_repo(folder, evaluation=broken)
    (folder / "eval.json").write_text("{")
    with pytest.raises(DataError, match=r"eval\.json is damaged"):
        write_repo(folder)
    (folder / "eval.json").write_text("[1]")
    with pytest.raises(DataError, match=r"eval\.json must hold an object, got list"):
        write_repo(folder)
    del before[folder / "eval.json"]
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != "eval.json"} == before


def test_wrong_measurement_stops_a_push(model, api, repo_id):
    with pytest.raises(DataError, match="is of the budget"):
        push_to_hub(model, repo_id, evaluation=EVALUATION | {"budget": {}})
    assert not api.repo_exists(repo_id)
