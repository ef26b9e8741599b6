"""What people wrote shows in cards and pages as they wrote it, and changes nothing around it."""

import json
import runpy
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from rich.console import Console

import hf_sparse
from hf_sparse.adapters.report import write_report
from hf_sparse.evaluation import table, task_table
from hf_sparse.hub import write_repo

card_text = runpy.run_path(str(Path(__file__).with_name("cards.py")))["card_text"]
CARDS = Path(__file__).parents[1] / "model_cards"
HOSTILE = (
    "a`b ``c *d* _e_ <img src=x onerror=alert(1)> [f](javascript:g) ![h](i) | j &amp; \\ $k$ ~~l~~ # m\n\n# n\n---\n"
    "```\n<!-- \u202eo \x1b[31m \ud800 q\"'{{ 7*7 }}{% raw %}"
)
KEPT = {"weights_sha256", "objective", "metric", "base_model", "method", "adapter", "stage"}  # read by the code


def replaced(content: Any, text: str, at: str = "") -> Any:
    """The content with another text in place of every string, and of names that people choose."""
    if isinstance(content, dict):
        named = at in ("settings", "machine", "versions")
        changed = {
            key: value if key in KEPT and at != "settings" else replaced(value, text, key)
            for key, value in content.items()
        }
        return {**changed, **({f"{text}1": text} if named else {})}
    if isinstance(content, list):
        return [replaced(value, text, at) for value in content]
    return text if isinstance(content, str) and at not in KEPT else content


class Outline(HTMLParser):
    """Tags with the names of their attributes, in order, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(markdown: str) -> list[str]:
    parsed = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    return [kind for token in parsed for kind in [token.type, *(child.type for child in token.children or ())]]


@pytest.mark.parametrize(
    "name",
    [
        "smollm2-135m-instruct-sparsek-256",
        pytest.param("smollm2-135m-instruct-sparsefinder", marks=pytest.mark.full),
    ],
)
def test_structure_is_that_of_plain_words(name, tmp_path, request):
    cards, pages = {}, {}
    for text in (HOSTILE, "word"):
        if text == "word":  # only pictures of hostile texts have to be drawn
            request.getfixturevalue("blank_pictures")
        folder = shutil.copytree(CARDS / name, tmp_path / str(len(cards)) / ("word" if cards else "a`b <i>_c_ #"))
        for file in ("eval.json", "finetune.json"):
            content = replaced(json.loads((CARDS / name / file).read_text("utf-8")), text)
            if file == "eval.json":
                content["note"] = text
                tasks = list(content.get("tasks", {}).items())[
                    :1
                ]  # pictures of more take seconds and show nothing else
                content["tasks"] = {f"{text} {key}": value for key, value in tasks}
            (folder / file).write_text(json.dumps(content), "utf-8")
        write_repo(folder)
        cards[text] = ModelCard.load(folder / "README.md")
        pages[text] = Outline(write_report(folder).read_text("utf-8"))
    assert outline(cards[HOSTILE].text) == outline(cards["word"].text)
    assert cards[HOSTILE].data.to_dict() == cards["word"].data.to_dict()
    assert "\u202e" not in cards[HOSTILE].text and "\x1b" not in cards[HOSTILE].text
    shown = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(cards[HOSTILE].text)
    assert (
        "<img src=x onerror=alert(1)> [f](javascript:g) ![h](i) | j &amp;" in Outline(shown).text
    )  # as it was written
    assert pages[HOSTILE].tags == pages["word"].tags
    assert "<img src=x onerror=alert(1)>" in pages[HOSTILE].text


@pytest.mark.parametrize("name", ['say "hi"', "back\\slash", "line\nend", "`tick`", "```", "é", "{{ x }}", "tail \\"])
@pytest.mark.parametrize("config", [hf_sparse.SparseKConfig(), hf_sparse.SparsefinderConfig()])
def test_name_of_a_folder_is_a_string_in_the_example(config, name):
    text = card_text(config, repo_id=name, base_model=None, parameters=1)
    parsed = MarkdownIt("commonmark").parse(text.split("---\n", 2)[2])
    (example,) = [token.content for token in parsed if token.type == "fence"]
    called: list[Any] = []
    line = next(line for line in example.splitlines() if "hf_sparse.from_pretrained" in line)

    class Library:
        from_pretrained = staticmethod(lambda name, **options: called.append(name))

    exec(line, {"hf_sparse": Library})
    assert called == [name]


@pytest.mark.parametrize(
    "text", ["a: b", "x\n---\ny", "'\"", "no", "# c", "- d", "é\u2028", "{e}", "&f *g", "1.0", " ", "\ud800", "\x00\t"]
)
def test_any_text_of_a_license_leaves_the_metadata_whole(text):
    stated = {"license": "other", "license_name": text, "license_link": text}
    card: Any = ModelCard(
        card_text(hf_sparse.SparseKConfig(), repo_id="me/x", base_model="a/b", parameters=1, metadata=stated)
    )
    assert card.data.license == "other" and card.data.base_model == "a/b"
    assert card.data.license_name == card.data.license_link == text
    assert card.text.lstrip().startswith("# x")


def test_brackets_are_no_markup_in_a_table():
    console = Console(width=400, record=True)
    evaluation = json.loads((CARDS / "demo-llama-sparsek-64" / "eval.json").read_text("utf-8"))
    console.print(table({**evaluation, "text": {**evaluation["text"], "name": "[red]a[/]"}, "base_model": "[b]c"}))
    console.print(task_table("[i]d", {"metric": "[e]", "settings": {"slots": 1}, "results": {"learned": 0.5}}))
    shown = console.export_text()
    assert "[red]a[/]" in shown and "[b]c" in shown and "[i]d" in shown and "[e]" in shown
