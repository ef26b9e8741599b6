"""A push or a load that fails, at every place where it can: one clear line, one whole state, and never a token."""

import os
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace
from zlib import crc32

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse
from hf_sparse.errors import HubError
from hf_sparse.hub import from_pretrained, push_to_hub

BASE = "tester/faults-llama"
CONFIGS = {
    "sparsek": lambda: hf_sparse.SparseKConfig(k=4, window=4, sinks=1),
    "sparsefinder": lambda: hf_sparse.SparsefinderConfig(tile=16, tiles_per_query=2, window=1, clusters=4),
}
TRAINING = {
    "format": 1,
    "objective": "distill",
    "settings": {"steps": 2, "length": 40},
    "trainable_parameters": 128,
    "all_parameters": 20000,
    "tokens": 160,
    "seconds": 1.5,
    "history": [{"step": step, "stage": "distill", "loss": 1.0 / step} for step in (1, 2)],
    "machine": {"system": "Linux"},
    "versions": {"hf-sparse": "0.1.0"},
}


@pytest.fixture(scope="module")
def base(hub) -> LlamaForCausalLM:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).push_to_hub(BASE)
    return LlamaForCausalLM.from_pretrained(BASE)


@pytest.fixture(params=CONFIGS)
def model(base, request) -> PeftModel:
    """Random parameters, so that their file is new to the storage and has to be uploaded."""
    model = get_peft_model(type(base).from_pretrained(BASE), CONFIGS[request.param]()).eval()
    scramble(model)
    return model


@pytest.fixture
def repo_id(request) -> str:
    return f"tester/faults-{crc32(request.node.name.encode()):08x}"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Clients wait between their tries, longer each time."""
    clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)})
    clock.sleep = lambda seconds: None
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)


def scramble(model: PeftModel) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def state(api: HfApi, repo_id: str) -> dict[str, str]:
    return {file.rfilename: file.blob_id for file in api.model_info(repo_id, files_metadata=True).siblings}


UPLOADS = ["/objects/batch$", "^/lfs/", "/objects/verify$"]


@pytest.mark.versions
@pytest.mark.cross("values")
@pytest.mark.parametrize("status", [401, 403, 404, 409, 413, 503])
@pytest.mark.parametrize("path", UPLOADS)
def test_upload_of_the_weights_fails(model, hub, repo_id, path, status):
    hub.fail_next(path, status, times=9)
    with pytest.raises(HubError, match=rf"^cannot push to {repo_id}: .*\({status}\)") as error:
        push_to_hub(model, repo_id)
    said = str(error.value)
    assert "\n" not in said and len(said) < 500
    assert f"nothing was published (created before that: the empty repository {repo_id}; push again or delete)" in said
    assert ("storage of the Hub" in said) == (path == "^/lfs/" and status != 413)  # where the token is not to blame
    assert set(state(HfApi(), repo_id)) == {".gitattributes"}
    hub.reset_trace()
    push_to_hub(model, repo_id)
    before = state(HfApi(), repo_id)
    scramble(model)
    hub.fail_next(path, status, times=9)
    with pytest.raises(HubError, match=rf"\({status}\).*; nothing was published$"):
        push_to_hub(model, repo_id, training=TRAINING)
    assert state(HfApi(), repo_id) == before


@pytest.mark.versions
@pytest.mark.cross("values")
@pytest.mark.parametrize("path", [*UPLOADS, "/preupload/", "/validate-yaml", "/repos/create"])
def test_connection_is_cut(model, hub, repo_id, path):
    for method in ("POST", "PUT"):
        hub.cut_next(method, path, times=9)
    with pytest.raises(
        HubError, match=rf"^cannot push to {repo_id}: .*the Hub cannot be reached \(.*check the net"
    ) as e:
        push_to_hub(model, repo_id)
    assert "\n" not in str(e.value)
    created = path not in ("/validate-yaml", "/repos/create")
    assert (f"created before that: the empty repository {repo_id}" in str(e.value)) == created
    assert HfApi().repo_exists(repo_id) == created


@pytest.mark.versions
def test_lost_answer_of_a_commit(model, hub, repo_id):
    """The commit was made, and nobody was told: the message must not say that nothing was published."""
    hub.cut_next("POST", "/commit/", answered=True)
    with pytest.raises(
        HubError, match=f"the newest commit of {repo_id} is now [0-9a-f]{{7}}, of this push or of another"
    ):
        push_to_hub(model, repo_id)
    assert "adapter_model.safetensors" in state(HfApi(), repo_id)
    hub.cut_next("POST", "/commit/")
    scramble(model)
    with pytest.raises(HubError, match=r"; nothing was published$"):
        push_to_hub(model, repo_id)


def test_hub_that_cannot_be_asked_afterwards(model, hub, repo_id):
    hub.before_next("POST", "/commit/", lambda: hub.fail_next(f"/api/models/{repo_id}", 503, times=9))
    with pytest.raises(HubError, match=r"\(503\).*; whether anything was published is not known \(created before"):
        push_to_hub(model, repo_id)


def test_storage_that_refuses_in_its_answer(model, hub, repo_id, monkeypatch):
    """LFS reports some errors with status 200, and servers may answer anything."""
    for answer in (
        {"objects": [{"oid": "ab", "size": 1, "error": {"code": 507, "message": "quota\nexceeded"}}]},
        {"objects": [{"oid": "ab", "size": 1, "actions": {"upload": {}}}]},
        {"objects": 3},
        [],
        None,
    ):
        monkeypatch.setattr(hub, "override", {"/objects/batch$": answer})
        with pytest.raises(HubError, match=f"cannot push to {repo_id}: .*; nothing was published") as error:
            push_to_hub(model, repo_id)
        assert "\n" not in str(error.value)


@pytest.mark.versions
@pytest.mark.cross
@pytest.mark.parametrize("when", ["/commit/", "/preupload/"])
@pytest.mark.parametrize("start", ["new", "there", "branch"])
def test_interleaved_pushes(model, base, hub, repo_id, start, when):
    """Another push in the middle of one: the second fails, and all files are those of the first."""
    revision = "side" if start == "branch" else None
    if start != "new":
        push_to_hub(model, repo_id)
        scramble(model)
    other = get_peft_model(type(base).from_pretrained(BASE), CONFIGS["sparsek"]())
    scramble(other)

    def push_other() -> None:
        push_to_hub(other, repo_id, training=TRAINING, revision=revision)

    hub.before_next("POST", when, push_other)
    with pytest.raises(HubError, match=r"another change got in between \(412\): try again; the newest commit"):
        push_to_hub(model, repo_id, revision=revision)
    assert "finetune.json" in HfApi().list_repo_files(repo_id, revision=revision)
    loaded = from_pretrained(repo_id, revision=revision)
    found, expected = loaded.state_dict(), other.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    push_to_hub(model, repo_id, revision=revision)
    assert "finetune.json" not in HfApi().list_repo_files(repo_id, revision=revision)


@pytest.mark.versions
@pytest.mark.full
def test_failures_over_xet(model, hub, repo_id, hub_env, tmp_path):
    """The other transport, as far as its first request: hf_xet raises exceptions of its own."""
    model.save_pretrained(tmp_path / "adapter")
    hub.fail_next("xet-write-token", 403, times=9)
    code = (
        "import sys, hf_sparse\n"
        "try: hf_sparse.push_to_hub(*sys.argv[1:])\n"
        "except hf_sparse.errors.HubError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "adapter"), repo_id],
        env={name: value for name, value in hub_env.items() if name != "HF_HUB_DISABLE_XET"},
        capture_output=True,
        text=True,
    )
    assert hub.count("GET", "xet-write-token")
    line = run.stdout.strip()
    assert line.startswith(f"cannot push to {repo_id}: ") and "403" in line and "\n" not in line, run.stderr
    assert "; nothing was published (created before that: the empty repository" in line


# Downloads.


@pytest.mark.versions
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cannot load the adapter"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged: its hash is not the one that the Hub has"),
    ],
)
def test_other_content_comes_down(model, hub, repo_id, tmp_path, damage, message):
    """One bit of a number: the file has its size, and is good safetensors."""
    push_to_hub(model, repo_id)
    for _ in range(9):
        hub.damage_next("^/lfs/", damage)
    with pytest.raises(HubError, match=message) as error:
        from_pretrained(repo_id, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.versions
@pytest.mark.cross("values")
@pytest.mark.parametrize("fault", ["cut", "half", 401, 403, 404, 503])
def test_download_fails(model, hub, repo_id, tmp_path, fault):
    push_to_hub(model, repo_id)
    if isinstance(fault, int):
        hub.fail_next("^/lfs/", fault, times=20)
    else:
        hub.cut_next("GET", "^/lfs/", answered=fault == "half", times=20)
    with pytest.raises(HubError, match=f"^cannot load the adapter {repo_id}: ") as error:
        from_pretrained(repo_id, cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    hub.reset_trace()
    from_pretrained(repo_id, cache_dir=tmp_path)  # nothing broken was left in the cache


# Before anything is created.


@pytest.mark.parametrize("license", ["Apache 2.0", "MIT", "a: b\nc: d", "", "---", "\u00e4"])
def test_invalid_license(model, hub, repo_id, license):
    with pytest.raises(HubError, match=r"expected the Hub's name of a license, such as 'apache-2.0' or 'other', got"):
        push_to_hub(model, repo_id, license=license)
    assert not HfApi().repo_exists(repo_id)


def test_card_that_the_hub_does_not_take(model, hub, repo_id, monkeypatch):
    """Which licenses there are the Hub knows alone."""
    monkeypatch.setattr(hub, "licenses", {"mit"})
    with pytest.raises(HubError, match=r"the Hub does not take the card: 'license' must be one of mit.*; nothing"):
        push_to_hub(model, repo_id, license="no-such-license")
    assert not HfApi().repo_exists(repo_id)
    push_to_hub(model, repo_id, license="mit")


# Tokens.


def everything(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.cross("values")
@pytest.mark.parametrize("token", ["hf_secret\n", " hf_secret\t", "\r\nhf_secret"])
def test_token_is_stripped(model, hub, repo_id, token):
    with pytest.raises(HubError, match=r"the token is not valid \(401\)") as error:
        push_to_hub(model, repo_id, token=token)
    assert "secret" not in everything(error.value)
    push_to_hub(model, repo_id, token=f" {hub.token}\n")
    from_pretrained(repo_id, token=f"{hub.token}\r\n")


@pytest.mark.parametrize("token", ["hf_sec\nret", "hf_sec ret", "hf_sec\u00e9ret", "hf_sec\x00ret", "hf_sec\x7fret"])
def test_token_that_cannot_be_one(model, hub, repo_id, token):
    hub.reset_trace()
    for call in (lambda: push_to_hub(model, repo_id, token=token), lambda: from_pretrained(repo_id, token=token)):
        with pytest.raises(HubError, match="the token that was passed cannot be one: expected visible ASCII") as error:
            call()
        assert "hf_sec" not in everything(error.value) and "ret" not in str(error.value).replace("characters", "")
    with pytest.raises(HubError, match="the token that was passed is empty"):
        push_to_hub(model, repo_id, token=" \n")
    with pytest.raises(TypeError, match="token must be a string, True, False or None, got bytes"):
        push_to_hub(model, repo_id, token=b"hf_secret")
    assert hub.requests == []


def test_saved_token_that_cannot_be_one(model, hub, repo_id, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_sec ret")
    with pytest.raises(HubError, match=r"the saved token .* cannot be one") as error:
        push_to_hub(model, repo_id)
    assert "hf_sec" not in everything(error.value)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_bytes(b"hf_sec\xffret")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(HubError, match=r"the saved token .* cannot be read") as error:
        from_pretrained(repo_id)
    assert "hf_sec" not in str(error.value)


def test_token_in_an_answer(model, hub, repo_id):
    """Servers repeat what they were sent."""
    hub.fail_next("/repos/create", 422, message=f"no rights for {hub.token}, hf_{'Ab1' * 10}")
    with pytest.raises(HubError, match=r"no rights for \*\*\*, \*\*\*") as error:
        push_to_hub(model, repo_id)
    assert hub.token not in everything(error.value) and "hf_Ab1" not in everything(error.value)


@pytest.mark.full  # test_token_is_stripped runs by default
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=str)
def test_token_in_a_printed_traceback(hub_env, tmp_path, debug):
    """`--debug` shows exceptions of others, and those that led to them."""
    code = (
        "import hf_sparse.texts, hf_sparse.cli as cli\n"
        "def fail(*args, **options):\n"
        "    try: raise ValueError(\"Illegal header value b'Bearer hf_sec ret'\")\n"
        "    except ValueError as error: raise RuntimeError('for hf_test') from error\n"
        "hf_sparse.texts.read_texts = fail\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", code, *debug, "report", "x", "--text", "y"]
    run = subprocess.run(command, env=hub_env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode and "RuntimeError" in run.stderr and "Bearer ***" in run.stderr
    assert "hf_test" not in run.stderr.replace("'for hf_test'", "") and "hf_sec" not in run.stderr.replace(code, "")
