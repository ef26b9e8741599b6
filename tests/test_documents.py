"""What documents say runs: the examples of the guide, the links, the options of the command line."""

import re
import textwrap
from pathlib import Path

import pytest
import typer.main

from hf_sparse import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("model_cards/*.md"))
)


def blocks(document: str, language: str) -> list[str]:
    return re.findall(
        rf"^ *```{language}\n(.*?)^ *```$", (ROOT / document).read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # the name that all versions know
def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = blocks("docs/guide.md", "python")
    assert len(examples) > 5
    exec(compile("\n".join(examples), "docs/guide.md", "exec"), {})
    for folder in ("adapter", "plain-adapter"):
        assert (tmp_path / folder / "adapter_model.safetensors").exists()


def test_the_family_that_is_shown_is_that_of_the_repository():
    (shown,) = blocks("CONTRIBUTING.md", "python")
    assert textwrap.dedent(shown) == (ROOT / "patches" / "opt.py").read_text("utf-8")


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    path = ROOT / document
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text("utf-8")):
        place, _, anchor = target.partition("#")
        linked = path.parent / place if place else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text("utf-8")), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document):
    """Verbs and options of every `hf-sparse ...` in a document."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    text = (ROOT / document).read_text("utf-8").replace("\\\n", " ")
    quoted = "\n".join(re.findall(r"^hf-sparse .*|`hf-sparse [^`]*`", text, re.MULTILINE))
    for verb, rest in re.findall(r"hf-sparse ([a-z]+)([^`\n#]*)", quoted):
        known = {name for option in commands[verb].params for name in (*option.opts, *option.secondary_opts)}
        unknown = set(re.findall(r"--[a-z][a-z-]*", rest)) - known - {"--help"}
        assert not unknown, (verb, unknown)
