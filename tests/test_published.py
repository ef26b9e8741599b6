"""Published cards are what hf-sparse makes of the JSON beside them, and tables of documents are those of their JSON."""

import json
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from hf_sparse.repo import write_repo

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
LEARNING = ROOT / "benchmarks" / "learning" / "results"

# How documents call what eval.json calls otherwise.
_NAMES = {
    "SnapKV": "snapkv",
    "H2O": "h2o",
    "TOVA": "tova",
    "KeyDiff": "key_difference",
    "key norm": "key_norm",
    "window and sinks (StreamingLLM)": "recency",
    "oracle (sees the future)": "oracle",
}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def table(document: str, after: str) -> dict[str, list[str]]:
    """Cells of the first table after some words, by the first cell of the row; the header's is empty."""
    text = (ROOT / document).read_text("utf-8")
    assert text.count(after) == 1, after
    lines = re.search(r"(?:^\|.*\n)+", text.split(after)[1], re.MULTILINE)[0].splitlines()
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {first: cells for first, *cells in rows if not first.startswith("--")}


def by_budget(evaluation: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {entry["slots"]: entry for entry in ({**evaluation, **evaluation["budget"]}, *evaluation["sweep"])}


@pytest.mark.parametrize("name", sorted(path.name for path in CARDS.glob("*-sparsek-*")))
def test_card(name, tmp_path):
    published = CARDS / name
    folder = shutil.copytree(published, tmp_path / name)
    write_repo(folder)
    for file in ("README.md", "eval.json", "finetune.json"):
        assert (folder / file).read_text("utf-8") == (published / file).read_text("utf-8")


SMOLLM2 = CARDS / "smollm2-135m-instruct-sparsek-256" / "eval.json"


@pytest.mark.parametrize(
    ("document", "after", "source", "digits"),
    [
        ("README.md", "## What it gives", SMOLLM2, (2, 3)),
        ("docs/experiments.md", "on the 20 held-out chunks in float32", SMOLLM2, (3, 4)),
        ("docs/experiments.md", "Dracula and Pride and Prejudice", LEARNING / "smollm2-books.json", (3, 4)),
    ],
)
def test_quality_by_slots(document, after, source, digits):
    rows, found = table(document, after), by_budget(read(source))
    header = next(iter(rows.values()))
    budgets = [int(re.sub(r"\D", "", cell)) for cell in header]
    assert budgets == [128, 256, 512, 1024]
    for name, cells in list(rows.items())[1:]:
        key = _NAMES.get(name, name)
        expected = []
        for slots in budgets:
            value, apart = (found[slots][measure][key] for measure in ("perplexity", "divergence"))
            brackets = "" if key == "dense" else f" ({apart:.{digits[1]}f})"
            expected.append(f"{value:.{digits[0]}f}{brackets}")
        assert cells == expected, name


def test_shares():
    rows, whole = (
        table("docs/experiments.md", "at a mean of 256 slots"),
        read(LEARNING / "smollm2-shares.json")["whole"],
    )
    names = {"equal": "equal", "the minimum of the sum of power laws": "measured", "half way to it": "half way"}
    for name, key in names.items():
        assert rows[name] == [f"{whole[key]['perplexity']:.3f}", f"{whole[key]['divergence']:.4f}"]


def test_lora():
    rows = table("docs/experiments.md", "### LoRA beside the scorer")
    quality = {}  # the recipe, without LoRA, ran in the first of the sweeps only
    for name in ("demo-lora-clipped.jsonl", "demo-lora.jsonl"):
        lines = [json.loads(line) for line in (LEARNING / name).read_text("utf-8").splitlines()]
        quality.update({line["name"]: line["quality"] for line in lines})
    for name, cells in list(rows.items())[1:]:
        setting = re.search(r"`(.*)`", name)
        found = quality[setting[1] if setting else "recipe"]
        assert cells == [f"{found[n]['perplexity']:.3f} ({found[n]['divergence']:.4f})" for n in ("32", "64")]


def test_memory():
    rows = table("docs/experiments.md", "## Memory")
    (found,) = read(LEARNING / "memory-cpu.json")["rows"]
    sizes = [f"{variant['bytes'] / 2**20:,.0f} MiB" for variant in found["variants"].values()]
    assert [cells[0] for cells in list(rows.values())[1:]] == sizes


def test_heads():
    rows = table("docs/experiments.md", "Slots divided among the heads of each layer, too")
    for slots, ways in read(LEARNING / "smollm2-heads.json")["whole"].items():
        expected = [f"{found['perplexity']:.3f} ({found['divergence']:.4f})" for found in ways.values()]
        assert rows[slots] == expected and list(ways) == ["equal", "layers", "heads"]


def test_pass_keys():
    rows, tasks = table("docs/experiments.md", "**Pass keys**"), read(SMOLLM2)["tasks"]
    for name, cells in list(rows.items())[1:]:
        expected = []
        for task, column in [("passkey, 128 slots", 0), ("passkey", 0), ("passkey, 128 slots", 1), ("passkey", 1)] + [
            ("passkey, 512 slots", column) for column in range(3)
        ]:
            values = tasks[task]["results"][_NAMES.get(name, name)]["values"]
            expected.append(f"{fmean(value[column] for value in values):.2f}")
        assert cells == expected


def test_scorers():
    rows = table("docs/experiments.md", "### What the scorer reads")
    lines = [json.loads(line) for line in (LEARNING / "demo-scorers.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        cells = [f"{found['perplexity']:.3f} ({found['divergence']:.4f})" for found in line["quality"].values()]
        assert rows[f"`{line['name']}`"][1 + 2 * line["seed"] :][:2] == cells
