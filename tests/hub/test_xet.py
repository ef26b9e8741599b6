"""The second transport, Xet, with the unmodified client: each form goes there and back, and a cut leaves one state."""

import re
import time
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import HfApi, get_session
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.errors import HubError
from hf_sparse.hub import from_pretrained, push_to_hub

pytestmark = pytest.mark.versions

TOKENS = torch.arange(1, 41)[None] * 7 % 64
CONFIGS = {
    "sparsek": lambda: hf_sparse.SparseKConfig(k=4, window=4, sinks=1, lora_rank=2),
    "sparsefinder": lambda: hf_sparse.SparsefinderConfig(
        tile=8, tiles_per_query=1, window=1, predictor="bound", lora_rank=2
    ),
}


@pytest.fixture(autouse=True, scope="module")
def xet():
    """Turns Xet on, and pauses between the tries of the client off."""
    clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)})
    clock.sleep = lambda seconds: None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
        yield


@pytest.fixture(scope="module")
def base_id(xet, hub, tiny_llama) -> str:
    tiny_llama(num_hidden_layers=1).push_to_hub(f"{hub.user}/xet-llama")
    return f"{hub.user}/xet-llama"


@pytest.fixture
def make(base_id):
    def model(method: str = "sparsek") -> PeftModel:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_id), CONFIGS[method]())
        return scramble(model)

    return model


def scramble(model: PeftModel) -> PeftModel:
    """Draws parameters that nobody uploaded yet."""
    generator = torch.Generator().manual_seed(time.time_ns())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


@pytest.mark.cross("values")
@pytest.mark.parametrize("form", ["adapter", "full", "merged"])
@pytest.mark.parametrize("method", CONFIGS)
def test_there_and_back(make, hub, tmp_path, monkeypatch, method, form):
    model, name = make(method), f"{hub.user}/xet-{method}-{form}"
    push_to_hub(model, name, form=form)
    assert hub.count("POST", "^/v1/xorbs/") and hub.count("POST", "^/v1/shards") and not hub.count("PUT", "^/lfs/")
    hub.reset_trace()
    loaded = from_pretrained(name, cache_dir=tmp_path / "xet")
    assert hub.count("GET", "^/v1/reconstructions/") and hub.count("GET", "^/xorbs/") and not hub.count("GET", "^/lfs/")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4 if form == "merged" else 0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    hub.reset_trace()
    assert torch.equal(logits(from_pretrained(name, cache_dir=tmp_path / "classic")), logits(loaded))
    assert hub.count("GET", "^/lfs/") and not hub.count("GET", "^/xorbs/")


@pytest.mark.parametrize(
    ("form", "lost", "requests_cut"),
    [
        ("adapter", "for good", "/xet-write-token/|/v1/xorbs/|/v1/shards|/commit/"),
        *(
            pytest.param(form, lost, "", marks=pytest.mark.full)
            for form in ("adapter", "full")
            for lost in ("for good", "once, answered")
        ),
    ],
)
def test_a_cut_at_every_request(make, hub, tmp_path, form, lost, requests_cut):
    """The repository is as it was, or holds all of the new push, and a failure is one line."""
    model, api, name = make(), HfApi(), f"{hub.user}/xet-cut-{form}-{lost[:3]}{bool(requests_cut)}"
    for _ in range(3):  # the last one finds all that can be in caches
        hub.reset_trace()
        push_to_hub(scramble(model), name, form=form)
    requests = list(hub.requests)
    assert sum("/v1/" in path or "/v2/" in path for _, path in requests) >= 4
    states, failures, held = {}, 0, logits(model)
    for number, (method, path) in enumerate(requests):
        if not re.search(requests_cut, path):
            continue
        before = api.model_info(name).sha
        hub.reset_trace()
        such = f"{path.rpartition('/')[0]}/[^/]*$"  # the last part may be a hash of what is uploaded
        if lost == "for good":
            skipped = sum(m == method and bool(re.search(such, p)) for m, p in requests[:number])
            hub.cut_from_next(method, such, skipped=skipped)
        else:
            hub.cut_next(method, such, answered=True)
        try:
            push_to_hub(scramble(model), name, form=form)
        except HubError as error:
            assert str(error).startswith("cannot ") and "\n" not in str(error)
            failures += 1
        hub.reset_trace()
        is_new = api.model_info(name).sha != before
        held = logits(model) if is_new else held
        assert torch.equal(logits(from_pretrained(name, cache_dir=tmp_path / str(number))), held)
        states[path] = is_new
    push_to_hub(model, name, form=form)  # it can be tried again
    assert failures
    commit = next(path for path in states if "/commit/" in path)
    assert states[commit] == (lost != "for good")


@pytest.mark.full
def test_other_content_comes_down(make, hub, tmp_path):
    """One bit of an xorb: what arrives is not what the Hub has."""
    push_to_hub(make(), f"{hub.user}/xet-damaged")
    for _ in range(9):
        hub.damage_next("^/xorbs/", lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    with pytest.raises(HubError, match=f"^cannot load the adapter {hub.user}/xet-damaged: "):
        from_pretrained(f"{hub.user}/xet-damaged", cache_dir=tmp_path)
    hub.reset_trace()
    from_pretrained(f"{hub.user}/xet-damaged", cache_dir=tmp_path / "again")


def test_what_the_content_store_refuses(hub):
    """A wrong token, a damaged xorb, a shard of xorbs that never came, a file that nobody uploaded."""
    session, name = get_session(), "ab" * 32
    good = {"Authorization": "Bearer xet_test"}
    entry = bytes.fromhex(name) + bytes(4) + (1).to_bytes(4, "little") + bytes(8)  # a file with one term
    shard = bytes(48) + entry + bytes.fromhex(name) + bytes(16) + b"\xff" * 48
    for path, headers, body, status in (
        (f"xorbs/default/{name}", {}, b"", 401),
        (f"xorbs/default/{name}", good, bytes([0, 3, 0, 0, 0, 9, 0, 0]) + b"abc", 400),
        ("shards", good, shard, 400),
    ):
        answer = session.post(f"{hub.storage}/v1/{path}", headers=headers, content=body)
        assert answer.status_code == status, (path, answer.text)
    assert session.get(f"{hub.storage}/v1/reconstructions/{name}", headers=good).status_code == 404
