"""The loopback Hub, driven by the real clients: what hf-sparse publishes and loads relies on each of these answers."""

import io
import json
import re
import subprocess
import sys
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import hf_raise_for_status
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.versions

TOKENS = torch.tensor([[1, 5, 9, 13, 2]])


@pytest.fixture
def api() -> HfApi:
    return HfApi()


@pytest.fixture
def repo(api, hub, request) -> str:
    """A new repository of the session's user, named after the test."""
    return api.create_repo(f"{hub.user}/{re.sub(r'[^a-z0-9]+', '-', request.node.name).strip('-')}").repo_id


@pytest.fixture
def llama() -> LlamaForCausalLM:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "sparse": 1, "attention": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def commit(api: HfApi, repo: str, *operations: dict):
    """A commit as a faulty client would send it: straight to the route, without the checks and uploads before it."""
    lines = [{"key": "header", "value": {"summary": "forged"}}, *operations]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    url = f"{api.endpoint}/api/models/{repo}/commit/main"
    return get_session().post(url, content=body, headers=api._build_hf_headers())


def titles(api: HfApi, repo: str) -> list[str]:
    return [commit.title for commit in api.list_repo_commits(repo)]


def test_whoami_and_create_repo(api, hub):
    assert api.whoami()["name"] == hub.user
    url = api.create_repo("named-without-owner")
    assert url.repo_id == f"{hub.user}/named-without-owner"
    assert api.create_repo("named-without-owner", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("named-without-owner")
    assert status_of(error) == 409
    api.delete_repo(url.repo_id)
    assert not api.repo_exists(url.repo_id)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(url.repo_id)


def test_model_and_tokenizer_come_back_bit_equal(api, hub, repo, llama, tokenizer, tmp_path):
    llama.push_to_hub(repo)
    assert hub.count("POST", "/commit/") == 1
    tokenizer.push_to_hub(repo)
    pulled = AutoModelForCausalLM.from_pretrained(repo, cache_dir=tmp_path)
    assert torch.equal(logits(pulled), logits(llama))
    words = AutoTokenizer.from_pretrained(repo, cache_dir=tmp_path)
    assert words("sparse attention pays")["input_ids"] == [1, 2, 0]


def test_sharded_model_on_a_branch(api, repo, llama, tmp_path):
    llama.push_to_hub(repo, max_shard_size="20KB", revision="sharded")
    assert api.file_exists(repo, "model.safetensors.index.json", revision="sharded")
    assert api.list_repo_files(repo) == [".gitattributes"]
    pulled = AutoModelForCausalLM.from_pretrained(repo, revision="sharded", cache_dir=tmp_path)
    assert torch.equal(logits(pulled), logits(llama))


def test_listings(api, repo, llama):
    llama.push_to_hub(repo)
    api.upload_file(path_or_fileobj=b"note", path_in_repo="docs/deep/note.txt", repo_id=repo)
    info = api.model_info(repo, files_metadata=True)
    weights = next(sibling for sibling in info.siblings if sibling.rfilename == "model.safetensors")
    assert info.id == repo and info.sha == api.list_repo_commits(repo)[0].commit_id
    assert weights.size == weights.lfs.size > 0

    top = {entry.path for entry in api.list_repo_tree(repo)}
    assert "docs" in top and "docs/deep" not in top
    assert {"docs/deep", "docs/deep/note.txt"} <= {entry.path for entry in api.list_repo_tree(repo, recursive=True)}
    assert [entry.path for entry in api.list_repo_tree(repo, "docs")] == ["docs/deep"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "absent"))

    file, folder = api.get_paths_info(repo, ["docs/deep/note.txt", "docs", "absent"])
    assert (file.path, file.size, folder.path) == ("docs/deep/note.txt", 4, "docs")
    assert [(branch.name, branch.target_commit) for branch in api.list_repo_refs(repo).branches] == [("main", info.sha)]
    assert titles(api, repo)[1:] == ["Upload LlamaForCausalLM", "initial commit"]
    assert api.repo_exists(repo) and not api.repo_exists(f"{repo}-absent")
    assert api.file_exists(repo, "config.json") and not api.file_exists(repo, "absent.json")
    assert "model.norm.weight" in api.get_safetensors_metadata(repo).weight_map


def test_dataset_repository(api, hub):
    name = f"{hub.user}/rows"
    api.create_repo(name, repo_type="dataset")
    api.upload_file(path_or_fileobj=b"PAR1\0", path_in_repo="rows.parquet", repo_id=name, repo_type="dataset")
    assert api.dataset_info(name).id == name
    with open(hf_hub_download(name, "rows.parquet", repo_type="dataset"), "rb") as file:
        assert file.read() == b"PAR1\0"
    assert not api.repo_exists(name)  # no model of that name


@pytest.fixture
def folder(tmp_path):
    contents = {"a.txt": b"text\n", "empty.txt": b"", "nested/deep/b.bin": bytes(range(256)), "nested/c.md": b"# c\n"}
    for name, data in contents.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "folder"


def test_upload_folder(api, hub, repo, folder):
    api.upload_folder(repo_id=repo, folder_path=folder)
    assert hub.count("POST", "/commit/") == hub.count("PUT", "/lfs/") == 1
    for name in ("a.txt", "empty.txt", "nested/deep/b.bin", "nested/c.md"):
        with open(hf_hub_download(repo, name), "rb") as file:
            assert file.read() == (folder / name).read_bytes()

    hub.reset_trace()
    api.upload_folder(repo_id=repo, folder_path=folder)
    assert hub.count("POST", "/preupload/") == 1 and hub.count("POST", "/commit/") == 0

    (folder / "a.txt").write_text("changed")
    api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns="a.txt", delete_patterns="nested/*")
    assert api.list_repo_files(repo) == [".gitattributes", "a.txt", "empty.txt"]


def test_create_commit_with_every_operation(api, repo):
    start = api.create_commit(
        repo,
        [
            CommitOperationAdd("old.bin", b"\0weights"),
            CommitOperationAdd("gone.txt", b"x"),
            CommitOperationAdd("d/e", b"y"),
        ],
        commit_message="first",
    )
    api.create_commit(
        repo,
        [
            CommitOperationAdd("new.txt", b"new"),
            CommitOperationDelete("gone.txt"),
            CommitOperationDelete("d/"),
            CommitOperationCopy("old.bin", "copy.bin"),
            CommitOperationCopy("gone.txt", "copy.txt"),
        ],
        commit_message="second",
        parent_commit=start.oid,
    )
    assert api.list_repo_files(repo) == [".gitattributes", "copy.bin", "copy.txt", "new.txt", "old.bin"]
    assert api.file_exists(repo, "gone.txt", revision=start.oid)  # the earlier commit is still whole
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(repo, [CommitOperationAdd("z", b"z")], commit_message="late", parent_commit=start.oid)
    assert status_of(error) == 412
    with pytest.raises(EntryNotFoundError):
        api.delete_file("absent", repo)
    assert titles(api, repo) == ["second", "first", "initial commit"]


def test_upload_from_a_file_object_and_tag(api, hub, repo):
    api.upload_file(path_or_fileobj=io.BytesIO(b"one"), path_in_repo="x.bin", repo_id=repo)
    api.create_tag(repo, tag="v1")
    api.upload_file(path_or_fileobj=io.BytesIO(b"two!"), path_in_repo="x.bin", repo_id=repo)
    with (
        open(hf_hub_download(repo, "x.bin", revision="v1"), "rb") as old,
        open(hf_hub_download(repo, "x.bin"), "rb") as new,
    ):
        assert (old.read(), new.read()) == (b"one", b"two!")
    assert [tag.name for tag in api.list_repo_refs(repo).tags] == ["v1"]
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(repo, tag="v1")
    assert status_of(error) == 409


def test_downloads(api, repo, folder, tmp_path):
    api.upload_folder(repo_id=repo, folder_path=folder)
    cached = hf_hub_download(repo, "nested/deep/b.bin", cache_dir=tmp_path / "cache")
    local = hf_hub_download(repo, "nested/deep/b.bin", local_dir=tmp_path / "local")
    for path in (cached, local):
        with open(path, "rb") as file:
            assert file.read() == bytes(range(256))

    def names(root) -> set[str]:
        return {
            str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and ".cache" not in path.parts
        }

    snapshot_download(repo, local_dir=tmp_path / "some", allow_patterns="*.md")
    assert names(tmp_path / "some") == {"nested/c.md"}
    everything = snapshot_download(repo, cache_dir=tmp_path / "cache")
    assert snapshot_download(repo, cache_dir=tmp_path / "cache", local_files_only=True) == everything
    snapshot_download(repo, local_dir=tmp_path / "all")
    assert names(tmp_path / "all") == set(api.list_repo_files(repo))
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(repo, "a.txt", cache_dir=tmp_path / "other", local_files_only=True)


def test_recreated_repository_is_not_served_from_the_cache(api, repo):
    for content in (b"before", b"after"):
        api.delete_repo(repo)
        api.create_repo(repo)
        api.upload_file(path_or_fileobj=content, path_in_repo="x", repo_id=repo)
        with open(hf_hub_download(repo, "x"), "rb") as file:
            assert file.read() == content


@pytest.mark.parametrize("name", ["x.txt", "x.bin"])
def test_ranges(api, hub, name):
    repo = api.create_repo("ranges", exist_ok=True).repo_id
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo=name, repo_id=repo)

    def get(wanted: str):
        return get_session().get(hf_hub_url(repo, name), headers={"Range": wanted}, follow_redirects=True)

    part = get("bytes=2-4")
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    assert get("bytes=7-").content == b"789"
    assert get("bytes=10-").status_code == 416


def test_lfs_answer_leaves_the_hub_origin(api, hub, repo):
    """The redirect itself carries the metadata, so clients must have a reason not to follow it."""
    api.upload_file(path_or_fileobj=b"\0", path_in_repo="x.bin", repo_id=repo)
    head = get_session().head(hf_hub_url(repo, "x.bin"), follow_redirects=False)
    assert head.status_code == 302 and not head.headers["Location"].startswith(hub.endpoint)
    assert {"X-Repo-Commit", "X-Linked-ETag", "X-Linked-Size"} <= {
        name.title().replace("Etag", "ETag") for name in head.headers
    }


def test_reading_errors(api, hub, repo, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(f"{repo}-absent", "x", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, "x", revision="absent", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "absent", cache_dir=tmp_path)
    hidden = api.create_repo("hidden", private=True).repo_id
    assert api.repo_exists(hidden)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(hidden, token=False)


def test_writing_errors(api, hub, repo):
    for token in (False, "hf_wrong"):
        with pytest.raises(HfHubHTTPError) as error:
            api.create_repo("mine", token=token)
        assert status_of(error) == 401
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("somebody-else/model")
    assert status_of(error) == 403
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=f"{repo}-absent")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, revision="absent")
    api.create_tag(repo, tag="v1")
    with pytest.raises(BadRequestError, match="commits to branches only"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, revision="v1")
    api.create_branch(repo, branch="side")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(repo, branch="side")
    assert status_of(error) == 409
    opened = api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, create_pr=True)
    assert opened.pr_url == f"{api.endpoint}/{repo}/discussions/1" and opened.pr_revision == "refs/pr/1"
    assert not api.file_exists(repo, "x") and api.file_exists(repo, "x", revision="refs/pr/1")


def test_commit_of_an_lfs_object_that_was_not_uploaded(api, repo):
    absent = {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}
    regular = {"path": "x.txt", "content": b64encode(b"x").decode(), "encoding": "base64"}
    answer = commit(api, repo, {"key": "file", "value": regular}, {"key": "lfsFile", "value": absent})
    with pytest.raises(BadRequestError, match="was not uploaded"):
        hf_raise_for_status(answer)
    assert api.list_repo_files(repo) == [".gitattributes"] and titles(api, repo) == ["initial commit"]


def test_card(api, repo):
    result = EvalResult("text-generation", "pg19", "PG-19", "perplexity", 9.5)
    data = ModelCardData(
        base_model="meta-llama/Llama-3.2-1B",
        base_model_relation="finetune",
        library_name="hf-sparse",
        tags=["sparse-attention"],
        license="apache-2.0",
        model_name="Sparse",
        eval_results=[result],
    )
    ModelCard(f"---\n{data}\n---\n# Sparse\n").push_to_hub(repo)
    assert ModelCard.load(repo).data.eval_results[0].metric_value == 9.5
    info = api.model_info(repo)
    assert info.library_name == "hf-sparse" and info.card_data.base_model_relation == "finetune"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("base_model: ./local/path", "not a repository id"),
        ("base_model: ''", "not a repository id"),
        ("base_model_relation: cousin", "base_model_relation"),
        ("tags: sparse", "'tags' must be a list"),
        ("license: Apache 2.0", "lower-case"),
        ("model-index: [{name: x}]", "needs 'name' and 'results'"),
        ("tags: [open", "broken YAML"),
    ],
)
def test_bad_card_is_refused(api, repo, metadata, message):
    card = f"---\n{metadata}\n---\n# Card\n".encode()
    with pytest.raises(ValueError, match=message):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    hub_answer = commit(api, repo, {"key": "file", "value": {"path": "README.md", "content": b64encode(card).decode()}})
    assert hub_answer.status_code == 400 and re.search(message, hub_answer.json()["error"])
    assert titles(api, repo) == ["initial commit"]


def test_card_class_refuses_a_bad_card(api, repo):
    with pytest.raises(ValueError, match="not a repository id"):
        ModelCard("---\nbase_model: ./local/path\n---\n# Card\n").push_to_hub(repo)
    assert titles(api, repo) == ["initial commit"]


def test_card_without_metadata_is_a_warning(api, repo):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Card", path_in_repo="README.md", repo_id=repo)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT 0.21.2 asks for it
def test_lora_adapter(api, hub, repo, llama, tmp_path):
    base = f"{repo}-base"
    llama.push_to_hub(base)
    pulled = AutoModelForCausalLM.from_pretrained(base, cache_dir=tmp_path / "cache")
    adapted = get_peft_model(pulled, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    hub.reset_trace()
    api.upload_folder(repo_id=repo, folder_path=tmp_path / "adapter")
    assert hub.count("POST", "/commit/") == 1
    assert api.model_info(repo).card_data.base_model == base

    expected = logits(adapted)
    assert not torch.equal(expected, logits(llama))
    fresh = AutoModelForCausalLM.from_pretrained(base, cache_dir=tmp_path / "fresh")
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, repo, cache_dir=tmp_path / "fresh")), expected)
    direct = AutoModelForCausalLM.from_pretrained(repo, cache_dir=tmp_path / "fresh")
    assert torch.equal(logits(direct), expected)


@pytest.mark.parametrize("status", [401, 403, 409, 500, 503])
def test_failed_commit_leaves_no_trace(api, hub, folder, status):
    repo = api.create_repo(f"failing-{status}").repo_id
    hub.fail_next("/commit/", status)
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_folder(repo_id=repo, folder_path=folder)
    assert status_of(error) == status
    assert titles(api, repo) == ["initial commit"] and api.list_repo_files(repo) == [".gitattributes"]
    api.upload_folder(repo_id=repo, folder_path=folder)  # injected once: the next attempt passes
    assert len(titles(api, repo)) == 2 and hub.count("POST", "/commit/") == 2


def test_injected_error_code_selects_the_exception(api, hub, repo):
    hub.fail_next(f"/api/models/{repo}", 401, code="RepoNotFound")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo)
    assert api.model_info(repo).id == repo


def test_client_repeats_an_upload_after_503(api, hub, repo):
    hub.fail_next("/lfs/objects/batch", 503)
    api.upload_file(path_or_fileobj=b"\0", path_in_repo="x.bin", repo_id=repo)
    assert hub.count("POST", "/lfs/objects/batch") == 2 and hub.count("POST", "/commit/") == 1


def test_parallel_commits_are_all_kept(hub):
    """The card is read between the head and the new commit: a slow reader would let a second commit in, if it could."""
    own = type(hub)(parse_yaml=lambda text: time.sleep(0.02) or {})
    api = HfApi(endpoint=own.endpoint)
    repo = api.create_repo("parallel").repo_id
    api.upload_file(path_or_fileobj=b"---\n---\n", path_in_repo="README.md", repo_id=repo)

    def upload(index: int) -> None:
        api.upload_file(path_or_fileobj=f"\0{index}".encode(), path_in_repo=f"{index}.bin", repo_id=repo)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(upload, range(8)))
    assert len(titles(api, repo)) == 10
    assert set(api.list_repo_files(repo)) == {".gitattributes", "README.md", *(f"{index}.bin" for index in range(8))}
    own.close()


def test_fresh_process_uses_the_hub(hub, hub_env):
    code = "from huggingface_hub import HfApi; print(HfApi().whoami()['name'])"
    run = subprocess.run([sys.executable, "-c", code], env=hub_env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hub.user
