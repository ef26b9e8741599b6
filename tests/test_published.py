"""Published cards are what hf-sparse makes of the JSON beside them, and tables of documents are those of their JSON."""

import json
import re
import shutil
from math import log
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import pytest

from hf_sparse.hub import write_repo

pytestmark = pytest.mark.usefixtures("blank_pictures")

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


@pytest.mark.parametrize("name", sorted(path.parent.name for path in CARDS.glob("*/adapter_config.json")))
def test_card(name, tmp_path):
    published = CARDS / name
    folder = shutil.copytree(published, tmp_path / name)
    write_repo(folder)
    for file in ("README.md", "eval.json", "finetune.json"):
        assert (folder / file).read_text("utf-8") == (published / file).read_text("utf-8")


BUDGETS = (128, 256, 512)
SMOLLM2 = CARDS / "smollm2-135m-instruct-sparsek-256-heads" / "eval.json"
NOVELS = LEARNING / "smollm2-novel.json"
DIVIDED_LAYERS = LEARNING / "smollm2-divided-layers.json"  # of the adapter that was published before


@pytest.mark.parametrize(
    ("document", "after", "source", "digits", "expected_budgets"),
    [
        ("README.md", "## What it gives", SMOLLM2, (2, 3), [128, 256, 512]),
        ("docs/experiments.md", "on the 20 held-out chunks in float32", DIVIDED_LAYERS, (3, 4), [128, 256, 512, 1024]),
        (
            "docs/experiments.md",
            "Dracula and Pride and Prejudice",
            LEARNING / "smollm2-books.json",
            (3, 4),
            [128, 256, 512, 1024],
        ),
        ("docs/experiments.md", "of which training saw nothing", NOVELS, (3, 4), [128, 256, 512]),
    ],
)
def test_quality_by_slots(document, after, source, digits, expected_budgets):
    rows, found = table(document, after), by_budget(read(source))
    header = next(iter(rows.values()))
    budgets = [int(re.sub(r"\D", "", cell)) for cell in header]
    assert budgets == expected_budgets
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
    rows, tasks = table("docs/experiments.md", "**Pass keys**"), read(DIVIDED_LAYERS)["tasks"]
    for name, cells in list(rows.items())[1:]:
        expected = []
        for task, column in [("passkey, 128 slots", 0), ("passkey", 0), ("passkey, 128 slots", 1), ("passkey", 1)] + [
            ("passkey, 512 slots", column) for column in range(3)
        ]:
            values = tasks[task]["results"][_NAMES.get(name, name)]["values"]
            expected.append(f"{fmean(value[column] for value in values):.2f}")
        assert cells == expected


def test_memory_of_evicted_keys():
    rows = table("docs/experiments.md", "**A memory for what was evicted**")
    names = {"features": "learned features", "latent": "latent slots", "none": "no memory"}
    for row in read(LEARNING / "smollm2-residual.json")["rows"]:
        name = names.get(row["memory"], "no memory, 8 more selected keys")
        assert rows[name] == [f"{q['perplexity']:.3f} ({q['kl']:.4f})" for q in row["quality"].values()]


def test_a_base_that_nothing_was_tuned_for():
    rows = table("docs/experiments.md", "**The same on a base that nothing was tuned for**")
    runs = {
        "`finetune`": read(LEARNING / "qwen-heads.json")["evaluation"],
        "`finetune --retrieval 0.5`": read(LEARNING / "qwen-heads-retrieval.json"),
    }
    for name, run in runs.items():
        selections = ("learned", "recency", "key_difference")
        cells = [f"{run['perplexity'][key]:.3f} ({run['divergence'][key]:.4f})" for key in selections]
        assert rows[name] == [f"{run['perplexity']['dense']:.3f}", *cells]


RECIPES = {run["name"]: run for run in read(LEARNING / "recipes.json")["runs"]}


def test_recipes_of_smollm2():
    rows = table("docs/experiments.md", "### Cross-entropy, facts that fit, heads without a slope")
    names = {
        "`--lm-weight 0.05`": "lm 0.05",
        "`--lm-weight 0.1`": "lm 0.1",
        "`--lm-weight 0.3`": "lm 0.3",
        "`--retrieval 0.5`, as before": "facts",
        "both, `--lm-weight 0.1` and facts that fit": "lm 0.1, facts that fit",
        "`content_heads=0.25` as well": "lm 0.1, facts that fit, content heads 0.25",
        "`content_heads=0.5` as well": "lm 0.1, facts that fit, content heads 0.5",
    }
    for row, name in names.items():
        run = RECIPES[f"SmolLM2, {name}"]
        found = by_budget({"sweep": [], **run})
        learned = {slots: (one["perplexity"]["learned"], one["divergence"]["learned"]) for slots, one in found.items()}
        cells = [f"{learned[slots][0]:.3f} ({learned[slots][1]:.4f})" if slots in learned else "-" for slots in BUDGETS]
        assert rows[row] == cells


def scores_of(run: dict[str, Any], tasks: tuple[str, ...] = ("passkey",)) -> list[str]:
    """Return the share of the answers that were right, of every task and length."""
    found = [run["tasks"][task]["results"]["learned"] for task in tasks]
    columns = [
        zip(*one["values"], strict=True) if "depths" in one else zip(one["values"], strict=True) for one in found
    ]
    return [f"{fmean(values):.2f}" for column in columns for values in column]


def test_recipes_of_qwen():
    rows = table("docs/experiments.md", "Qwen2.5-Coder-1.5B-Instruct, 512 of 4,096 slots as above")
    names = {
        "`--retrieval 0.5` as before, then 100 steps at 8,192": "published before, then 100 steps at 8,192",
        "both, `content_heads=0.25`": "lm 0.1, facts that fit, content heads 0.25",
        "both, `content_heads=0.5`": "lm 0.1, facts that fit, content heads 0.5",
    }
    for row, name in names.items():
        run = RECIPES[f"Qwen, {name}"]
        quality = f"{run['perplexity']['learned']:.3f} ({run['divergence']['learned']:.4f})"
        assert rows[row] == [quality, *scores_of(run, ("passkey", "multi_key"))]


def test_a_thirty_second_of_the_keys():
    rows = table("docs/experiments.md", "**1,024 of 32,768 slots**")
    before = RECIPES["Qwen, 1,024 slots, published before"]
    after = RECIPES["Qwen, 1,024 slots, published before, then 30 steps at 32,768"]
    assert rows["dense"] == [f"{after['perplexity']['dense']:.3f}", "-", "-", "-"]
    for name, run in (("before these steps", before), ("learned", after)):
        quality = f"{run['perplexity']['learned']:.3f} ({run['divergence']['learned']:.4f})"
        assert rows[name] == [quality, *scores_of(run)]
    for name in ("recency", "KeyDiff"):
        key = _NAMES.get(name, name)
        assert rows[name][0] == f"{after['perplexity'][key]:.3f} ({after['divergence'][key]:.4f})"


def learned_by_slots(run: dict[str, Any], budgets: tuple[int, ...] = BUDGETS) -> list[str]:
    found = by_budget({"sweep": [], **run})
    return [
        f"{found[slots]['perplexity']['learned']:.3f} ({found[slots]['divergence']['learned']:.4f})"
        for slots in budgets
    ]


def test_slope_lengths():
    rows = table("docs/experiments.md", "SmolLM2 with 256 slots, `finetune --steps 600` (156")
    assert rows["none, as above"] == learned_by_slots(RECIPES["SmolLM2, lm 0.1, facts that fit"])
    for length in ("1,024", "512", "256"):
        assert rows[length] == learned_by_slots(RECIPES[f"SmolLM2, slope length {length}"])
    rows = table("docs/experiments.md", "The bundled Llama, chunks of 1,024 tokens of Python's library")
    for name in ("no slope length", "slope length 1,024"):
        run = RECIPES[f"Bundled model, {name}"]
        assert rows["none" if name.startswith("no") else "1,024"] == learned_by_slots(run, (32, 64, 128, 256))
    rows = table("docs/experiments.md", "Qwen2.5-Coder-1.5B-Instruct, 512 slots, `finetune --length 4096`")
    for length in ("1,024", "256", "1,024, then 100 steps at 8,192"):
        run = RECIPES[f"Qwen, slope length {length}"]
        quality = f"{run['perplexity']['learned']:.3f} ({run['divergence']['learned']:.4f})"
        assert rows[length] == [quality, *scores_of(run, ("passkey", "multi_key"))]
    found = RECIPES["Qwen, slope length 1,024"]["more_tasks"]["multi_key"]["results"]
    words = f"it finds {found['learned']['values'][0]:.0%} of the keys of eight, dense attention all".replace("%", " %")
    assert found["dense"]["values"] == [1.0] and words in (ROOT / "docs/experiments.md").read_text("utf-8")
    rows = table("docs/experiments.md", "1,024 of 32,768 slots: from these two, with `k` set to 956")
    for name, steps in (("256", 30), ("1,024", 30), ("1,024, 60 steps", 60)):
        run = RECIPES[f"Qwen, 1,024 slots, slope length {name.split(', 60')[0]}, then {steps} steps at 32,768"]
        quality = f"{run['perplexity']['learned']:.3f} ({run['divergence']['learned']:.4f})"
        assert rows[name] == [quality, *scores_of(run)[-2:]]


def test_scores_that_begin_as_recency():
    rows = table("docs/experiments.md", "### Scores that begin as recency")
    runs = {
        "equal heads": read(LEARNING / "demo-equal-heads.json"),
        "by default": read(LEARNING / "demo-defaults.json"),
        "from recency": read(CARDS / "demo-llama-sparsek-64" / "eval.json"),
    }
    names = {
        "learned": "learned",
        "window and sinks": "recency",
        "SnapKV": "snapkv",
        "TOVA": "tova",
        "oracle": "oracle",
    }
    expected = {}
    for run, evaluation in runs.items():
        found = by_budget(evaluation)
        for name, key in names.items():
            expected[f"{run}: {name}"] = [
                f"{found[slots]['perplexity'][key]:.3f} ({found[slots]['divergence'][key]:.4f})"
                for slots in (32, 64, 128, 256)
            ]
    assert dict(list(rows.items())[1:]) == expected


def test_learned_shares():
    ways = read(LEARNING / "smollm2-learned-shares.json")["rows"], read(LEARNING / "smollm2-divided-heads.json")["rows"]
    learned, measured = ways[0][0]["head_shares"], ways[1][0]["adapter"]["head_shares"]
    logs = [[log(share) for row in rows for share in row] for rows in (learned, measured)]
    assert f"by {correlation(*logs):.2f}. The run" in (ROOT / "docs/experiments.md").read_text("utf-8")


RETRIEVAL = read(ROOT / "benchmarks" / "results" / "retrieval-qwen-h200.json")


@pytest.mark.parametrize(
    ("after", "kept", "tasks", "lengths"),
    [
        ("**What is found again**", "", ("passkey", "multi_key", "variable_tracking"), (2048, 4096, 8192)),
        ("**Long generation with the prompt kept**", "prompt kept, ", ("program", "arithmetic"), (1024, 2048, 4096)),
    ],
)
def test_retrieval(after, kept, tasks, lengths):
    def score(value: Any) -> str:
        if "error" in value:  # out of memory
            return "-"
        return f"{fmean(depth[0] if isinstance(depth, list) else depth for depth in value):.2f}"

    names = {**_NAMES, "all (dense)": "dense", "the most recent": "recency", "at random": "random"}
    for name, cells in list(table("docs/experiments.md", after).items())[1:]:
        key = names.get(name, name)
        values = RETRIEVAL["runs"]["0.5"] if key == "learned" else RETRIEVAL["without training"]
        assert cells == [score(values[kept + key][f"{task}, {length}"]) for task in tasks for length in lengths], name


def test_scorers():
    rows = table("docs/experiments.md", "### What the scorer reads")
    lines = [json.loads(line) for line in (LEARNING / "demo-scorers.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        cells = [f"{found['perplexity']:.3f} ({found['divergence']:.4f})" for found in line["quality"].values()]
        assert rows[f"`{line['name']}`"][1 + 2 * line["seed"] :][:2] == cells


LISTS = [json.loads(line) for line in (LEARNING / "smollm2-sparsefinder-lists.jsonl").read_text("utf-8").splitlines()]
SPARSITIES = (0.5, 0.7, 0.8, 0.9)

# What tables call the patterns that eval.json calls otherwise.
_PATTERNS = {
    "window and global": "longformer",
    "windows divided among heads": "windows",
    "hashes": "lsh",
    "page bound": "bound",
    "BigBird": "bigbird",
}


def measured(run: str, budgets: bool) -> dict[float, dict[str, Any]]:
    """Results by sparsity."""
    lines = [line for line in LISTS if line.get("graph") == run and line["head_budgets"] is budgets]
    return {line["sparsity"]: line["results"] for line in lines}


def test_best_tiles_early_and_late():
    rows = (ROOT / "docs/experiments.md").read_text("utf-8").split("### A list for each query")[1]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines() if " x " in line]
    tables = [read(LEARNING / f"sparsefinder-lag{which}.json")["rows"] for which in ("", "-09")]
    expected = []
    for at_08, at_09 in zip(*tables, strict=True):
        if at_08["chosen"] in ("late", "early", "each query"):
            chosen = at_08["chosen"].replace("each", "for the")
            sizes = f"{at_08['query_tile']} x {at_08['tile']}"
            expected.append([sizes, chosen, *(f"{row['perplexity']:.2f}" for row in (at_08, at_09))])
    assert [cells for cells in found if cells[0][0].isdigit()] == expected


def test_scales():
    text = (ROOT / "docs/experiments.md").read_text("utf-8").split("| trained | steps | all keys | density |")[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in text.splitlines()[2:13]]
    lines = [line for line in LISTS if "perplexity" in line and line["scales"] != "alpha15"]
    assert cells == [[str(n["steps"]), f"{n['perplexity']:.2f}", f"{100 * n['density']:.1f} %"] for n in lines]


def test_lists_for_each_query():
    text = (ROOT / "docs/experiments.md").read_text("utf-8").split("### A list for each query")[1]
    rows = re.findall(
        r"^\| (scales|LoRA) \(.*rank (\d+), tiles of (\d), seed (\d) \| (yes|no) \| (.*) \|$", text, re.MULTILINE
    )
    assert len(rows) == 12
    for scales, rank, tile, seed, budgets, cells in rows:
        run = f"{'scales15' if scales == 'scales' else 'lora15'}-{rank}-{tile}-{seed}"
        found = [measured(run, budgets == "yes")[sparsity]["predicted"] for sparsity in SPARSITIES]
        assert cells.split(" | ") == [f"{n['perplexity']:.2f} ({n['mass_recall']:.3f})" for n in found]


@pytest.mark.parametrize(
    ("after", "run", "card"),
    [
        ("| scales, rank 32 | 0.5", "scales15-32-8-0", "smollm2-135m-instruct-sparsefinder"),
        ("| LoRA, rank 16 | 0.5", "lora15-16-8-0", "smollm2-135m-instruct-sparsefinder-lora"),
        ("| tiles of 4 | 0.5", "scales15-16-4-0", None),
    ],
)
def test_all_patterns(after, run, card):
    found = measured(run, True)
    if card:
        points = {point["sparsity"]: point["results"] for point in read(CARDS / card / "eval.json")["points"]}
        for sparsity in SPARSITIES:
            for name, values in points[sparsity].items():
                assert found[sparsity][name]["perplexity"] == pytest.approx(values["perplexity"], abs=1e-3)
    rows = table("docs/experiments.md", after + " | 0.7 | 0.8 | 0.9 |\n")
    for name, cells in rows.items():
        key = _PATTERNS.get(name, name)
        assert cells == [f"{found[sparsity][key]['perplexity']:.2f}" for sparsity in SPARSITIES], name
    assert len(rows) == 10


def test_readme_sparsefinder():
    rows = table("README.md", "Perplexity, dense is 13.71:")
    runs = ["lora15-16-8-0", "lora15-16-8-0", "scales15-32-8-0", "scales15-32-8-0", "scales15-32-8-0"]
    patterns = ["predicted", "bound", "predicted", "bound", "longformer"]
    for cells, run, pattern in zip(list(rows.values())[1:], runs, patterns, strict=True):
        full = next(line["full"] for line in LISTS if line.get("graph") == run)
        found = [measured(run, True)[sparsity][pattern]["perplexity"] for sparsity in SPARSITIES]
        assert cells == [f"{value:.2f}" for value in (full, *found)]


def test_key_tiles():
    text = (ROOT / "docs/experiments.md").read_text("utf-8").split("**What stands for a key.**")[1]
    lines = [json.loads(line) for line in (LEARNING / "key-tiles.jsonl").read_text("utf-8").splitlines()]
    found = {line["kind"]: line["perplexity"] for line in lines}
    kinds = ("keys", "parts 32 x 16", "clusters 256", "clusters 64")
    assert re.findall(r"\d\d\.\d\d", text.split("\n\n")[0]) == [f"{found[kind]:.2f}" for kind in kinds]
