"""`hf sparse ...`: the client's own program runs `hf-sparse`, an extension that it installs by convention."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub.cli import extensions

import hf_sparse


@pytest.mark.versions
def test_hf_runs_the_script_as_its_extension(tmp_path, monkeypatch, capfd):
    """A repository OWNER/hf-sparse and a script of the same name are what `hf extensions install` asks for."""
    monkeypatch.setattr(extensions, "EXTENSIONS_ROOT", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_UPDATE_CHECK", True, raising=False)
    script = Path(sys.executable).parent / extensions._get_executable_name("sparse")
    extensions.ExtensionManifest(
        owner="me",
        repo="hf-sparse",
        repo_id="me/hf-sparse",
        short_name="sparse",
        executable_path=str(script),
        type="python",
        installed_at=datetime.now(UTC),
    ).save(tmp_path / "hf-sparse")
    assert extensions.dispatch_unknown_top_level_extension(["sparse", "--version"], set()) == 0
    assert capfd.readouterr().out == f"hf-sparse {hf_sparse.__version__}\n"
    assert extensions.dispatch_unknown_top_level_extension(["sparse", "push"], set()) == 2  # the code comes through
