"""Check what documents say: examples run, links and options of the command line exist, lines are short."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import typer.main

from hf_sparse import cli
from hf_sparse.demo import CHECKPOINT

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "model_cards/*.md", ".github/*.md")
    for path in ROOT.glob(pattern)
)

PAGES = [name for name in DOCUMENTS if name.startswith("docs/") and "\n```python\n" in (ROOT / name).read_text("utf-8")]


def blocks(document: str, language: str) -> list[str]:
    """Return the fenced blocks of a language; "" are those that name none."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", (ROOT / document).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # the name that all versions know
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), {})


@pytest.mark.full  # test_commands and tests/test_cli.py check verbs and options by default
def test_the_start_page_runs(tmp_path):
    """Run the commands of the first page as they stand, but for installing and pushing."""
    patch, train, use = blocks("docs/README.md", "")[1:4]
    program = textwrap.dedent(blocks("docs/README.md", "")[4])
    commands = f"set -e\n{patch}{train}{use}python - <<'END'\n{program}END\n"
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", commands],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "my-adapter" / "report.html").exists() and "import os" in done.stdout


def test_the_start_page_logs_in_before_it_asks_the_hub():
    """Even `push --dry-run` asks the Hub whose token it is."""
    commands = next(block for block in blocks("docs/README.md", "") if "hf-sparse push" in block).splitlines()
    assert commands.index("hf auth login") == 0 and "--dry-run" in commands[1]


def messages() -> Iterator[str]:
    """Yield the strings of the source, with "..." in the place of each value."""
    for folder in ("hf_sparse", "patches", "finetune"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_messages_of_troubleshooting_are_those_of_the_source():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    quoted = [message for row in rows for message in re.findall(r"`([^`]*)`", row)]
    of_others = {"KeyError: 'HF_SPARSE_SPARSEK'", "'HF_SPARSE_SPARSEFINDER'"}
    of_others |= {"Cannot combine adapters with different peft types", "requires a cache that can be cropped"}
    source = list(messages())
    unknown = [
        message for message in quoted if message not in of_others and not any(message in text for text in source)
    ]
    assert len(quoted) > 15 and not unknown


def test_the_first_lines_of_the_readme_run():
    """Run the first Python block on the bundled checkpoint in place of the one that would be downloaded."""
    lines, name = blocks("README.md", "python")[0], '"HuggingFaceTB/SmolLM2-135M"'
    assert lines.count(name) == 1
    namespace: dict[str, Any] = {}
    exec(compile(lines.replace(name, repr(str(CHECKPOINT))), "README.md", "exec"), namespace)
    model = namespace["model"]
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all("sparsek_" in name for name in names)
    config = model.peft_config["default"]
    assert config.slots == 256 and "a KV cache of 256 slots" in lines


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_the_offline_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    examples, steps = "\n".join(blocks("README.md", "python")[1:]), "steps=10"
    assert examples.count(steps) == 1
    exec(compile(examples.replace(steps, "steps=2"), "README.md", "exec"), namespace)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    shown = capsys.readouterr().out
    assert "import os" in shown and "layout=torch.sparse_coo" in shown
    graph = namespace["graph"]
    assert graph.layer == 3 and graph.weights.shape[-1] == namespace["prompt"]["input_ids"].shape[1]


def test_the_files_that_are_shown_are_those_of_the_repository():
    method = "tests/methods/learned_window"
    files = ["patches/opt.py", f"{method}/settings.py", f"{method}/method.py"]
    shown = [textwrap.dedent(block) for block in blocks("CONTRIBUTING.md", "python")]
    assert shown == [(ROOT / file).read_text("utf-8") for file in files]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    path = ROOT / document
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text("utf-8")):
        place, _, anchor = target.partition("#")
        linked = path.parent / place if place else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text("utf-8")), target


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if not name.startswith("model_cards/")])
def test_lines_are_short(document):
    """Lines end at column 120 where they can be broken: tables and single words (a long link) cannot."""
    long = [
        f"{document}:{number}: {len(line)} characters: {line[:60]}..."
        for number, line in enumerate((ROOT / document).read_text("utf-8").splitlines(), 1)
        if len(line) > 120 and not line.lstrip().startswith("|") and len(line.removeprefix("- ").split()) > 1
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document):
    """Check the verbs and options of every `hf-sparse ...` in a document."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    inline = re.findall(r"`(hf-sparse [^`]*)`", (ROOT / document).read_text("utf-8"))
    shell = [block.replace("\\\n", " ") for block in blocks(document, "")]
    quoted = "\n".join([*shell, *(" ".join(command.split()) for command in inline)])
    for verb, rest in re.findall(r"^hf-sparse ([a-z]+)([^`\n#]*)", quoted, re.MULTILINE):
        if commands[verb].context_settings.get("ignore_unknown_options"):
            continue  # options of another program
        known = {name for option in commands[verb].params for name in (*option.opts, *option.secondary_opts)}
        unknown = set(re.findall(r"--[a-z][a-z-]*", rest)) - known - {"--help"}
        assert not unknown, (verb, unknown)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_names_of_the_library(document):
    """Check that each `hf_sparse.NAME` in a document exists; the changelog names what is gone as well."""
    for name in set(re.findall(r"`(hf_sparse(?:\.\w+)+)", (ROOT / document).read_text("utf-8"))):
        resolve_name(name)
