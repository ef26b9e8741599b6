"""A folder for vLLM: what is in it, and that it appears whole or not at all. Starting the server, and why not."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from peft import get_peft_model
from typer.testing import CliRunner

from hf_sparse import SparseKConfig, cli
from hf_sparse.bundled import CHECKPOINT
from hf_sparse.errors import CompatibilityError, HubError, UnsupportedModelError
from hf_sparse.serving import export as module
from hf_sparse.serving.export import export, is_exported, server_command


@pytest.fixture
def base(tmp_path, tiny_llama):
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("code")
    return folder


@pytest.fixture
def adapter(tmp_path, base, tiny_llama):
    return save(tmp_path / "adapter", base, tiny_llama())


def save(folder, base, model, **settings):
    patched = get_peft_model(model, SparseKConfig(k=6, window=8, sinks=2, **settings))
    patched.active_peft_config.base_model_name_or_path = str(base)
    patched.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("copy", [False, True])
def test_what_is_in_the_folder(tmp_path, base, adapter, copy):
    output = tmp_path / "served"
    assert not is_exported(adapter)
    export(adapter, output, copy=copy)
    assert is_exported(output)
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files == expected | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    for name in expected - {"config.json"}:
        assert (output / name).is_symlink() is not copy
        assert (output / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((output / "config.json").read_text())
    added = {"architectures": ["HfSparseLlamaForCausalLM"], "hf_sparse_adapter": "./adapter"}
    assert config == {**json.loads((base / "config.json").read_text()), **added}


def test_a_folder_that_exists_is_left_alone(tmp_path, adapter):
    output = tmp_path / "served"
    output.mkdir()
    (output / "mine").write_text("x")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export(adapter, output)
    assert [path.name for path in output.iterdir()] == ["mine"]


def test_the_folder_appears_whole_or_not_at_all(tmp_path, adapter, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left")

    before = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as full:
        full.setattr(module, "write_json", fail)
        with pytest.raises(OSError, match="no space left"):
            export(adapter, tmp_path / "served")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    export(adapter, tmp_path / "served")


def test_what_cannot_be_served_is_not_exported(tmp_path, base, tiny_llama):
    folder = save(tmp_path / "mixed", base, tiny_llama(), layers=[0])
    with pytest.raises(UnsupportedModelError, match="mixture of dense and sparse layers"):
        export(folder, tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_an_adapter_on_the_hub(tmp_path, base, adapter, monkeypatch, hub):
    """Its name takes the place of a folder; the files come from the Hub."""
    name = f"{hub.user}/served-adapter"
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=str(adapter))
    export(name, tmp_path / "served")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "served" / "adapter" / file).read_bytes() == (adapter / file).read_bytes()
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    command = server_command(name, [])
    assert command[command.index("--served-model-name") + 1] == name
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    assert (Path(overrides["hf_sparse_adapter"]) / "adapter_config.json").is_file()


@pytest.mark.parametrize("name, message", [
    ("nobody/nothing", "cannot load the adapter nobody/nothing"),
    ("no/folder/here", "no/folder/here is neither a folder here nor a repository id"),
])  # fmt: skip
def test_an_adapter_that_is_nowhere(tmp_path, name, message):
    with pytest.raises(HubError, match=message):
        export(name, tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_the_verb(tmp_path, base, adapter):
    output = tmp_path / "served"
    result = CliRunner().invoke(cli.app, ["export", str(adapter), str(output), "--copy"], env={"COLUMNS": "300"})
    assert result.exit_code == 0 and f"a model for vLLM in {output}" in result.stdout
    result = CliRunner().invoke(cli.app, ["export", str(adapter), str(output)], env={"COLUMNS": "300"})
    assert result.exit_code == 1 and "exists and is not an empty folder" in result.stderr


def test_without_vllm_the_verb_says_what_to_install(adapter, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(CompatibilityError, match="vLLM is not installed here"):
        server_command(adapter, [])
    result = CliRunner().invoke(cli.app, ["serve", str(adapter), "--port", "8001"], env={"COLUMNS": "300"})
    assert result.exit_code == 1 and result.stderr.startswith("error: vLLM is not installed here: `pip install")


def test_the_command_of_the_server(tmp_path, base, adapter, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command = server_command(adapter, ["--port", "8001"])
    place = command.index("--hf-overrides")
    added = {"architectures": ["HfSparseLlamaForCausalLM"], "hf_sparse_adapter": str(adapter)}
    assert json.loads(command.pop(place + 1)) == added
    assert command == [*program, str(base), "--served-model-name", "adapter", "--hf-overrides", "--port", "8001"]
    export(adapter, tmp_path / "served")
    command = server_command(tmp_path / "served", [])
    assert command == [*program, str(tmp_path / "served"), "--served-model-name", "served"]


def test_the_verb_starts_the_server_in_its_place(adapter, monkeypatch):
    started = []
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(module.os, "execv", lambda *arguments: started.append(arguments))
    result = CliRunner().invoke(cli.app, ["serve", str(adapter), "--port", "8001", "--max-num-seqs", "4"])
    assert result.exit_code == 0
    ((program, command),) = started
    assert program == command[0] == sys.executable and command[-4:] == ["--port", "8001", "--max-num-seqs", "4"]


def test_the_bundled_checkpoint(tmp_path, tiny_llama):
    """Its name in adapters is no path."""
    from hf_sparse.adapters.load import load_base

    config = SparseKConfig(k=6, window=8, sinks=2)
    folder = save(tmp_path / "demo-adapter", "demo", load_base("demo", config))
    export(folder, tmp_path / "served")
    assert (tmp_path / "served" / "model.safetensors").resolve() == (CHECKPOINT / "model.safetensors").resolve()
