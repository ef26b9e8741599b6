"""Check the summary at the top of docs/speed.md, and what the README says of short prompts, against the tables below.

`pytest --write-golden tests/test_speed_summary.py` writes the summary anew, between `<!-- summary -->` and
`<!-- end -->`. The tables themselves are compared with the JSON by `tests/test_speed.py`.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SPEED = ROOT / "docs" / "speed.md"
Row = dict[str, str]
THREE = "shapes of SmolLM2, TinyLlama and Llama 8B"


def rows(name: str) -> list[Row]:
    """Return the rows of a table of docs/speed.md by the titles of their columns; the first column is `"cell"` too."""
    found = re.search(rf"<!-- table: {re.escape(name)} -->\n(.*?)<!-- end -->", SPEED.read_text("utf-8"), re.DOTALL)
    assert found, name
    lines = [[cell.strip(" *") for cell in line.strip("|\n ").split(" | ")] for line in found[1].splitlines()]
    return [dict(zip(lines[0], line, strict=True)) | {"cell": line[0]} for line in lines[2:]]


def number(text: str) -> float:
    """Read the first number of a cell."""
    return float(text.split()[0].replace(",", ""))


def length(row: Row) -> int:
    """Return the tokens that stand at the beginning of the first cell, after a shape if it names one."""
    return int(row["cell"].split(", ")[-1].split()[0].replace(",", ""))


def among(name: str, column: str, which: Callable[[Row], bool] = lambda row: True) -> list[float]:
    """Return the numbers of a column, of the rows that are asked for; a dash was not measured."""
    return [number(row[column]) for row in rows(name) if which(row) and row[column] != "-"]


def span(values: Iterable[float]) -> str:
    """Show the smallest and the largest of some ratios."""
    ordered = sorted(values)
    shown = [f"{value:.1f}" if value >= 2 else f"{value:.2f}" for value in (ordered[0], ordered[-1])]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"


def at(tokens: int) -> Callable[[Row], bool]:
    return lambda row: length(row) == tokens


def up_to(tokens: int) -> Callable[[Row], bool]:
    return lambda row: length(row) <= tokens


def ratio_of_prefill(row: Row) -> float:
    dense, sparse = (number(row[column]) for column in ("dense (SDPA)", "sparse"))
    return dense / sparse


def summary() -> str:
    """Make the table: what is done, with which model, at which length, and how many times as fast it is."""
    prompt, again, new = (f"{name}, times as fast" for name in ("first token", "forward", "new forward"))
    alone, new_alone = (f"{name} without a cache, times as fast" for name in ("forward", "new"))
    lines = [
        ("a step of `generate`", f"{THREE}, batch 1 to 8", "512 to 8,192", span(among("generate", "seen"))),
        (
            "the same, at a length that is new to the process",
            f"{THREE}, batch 1 to 8",
            "512 to 8,192",
            span(among("generate", "times as fast, unseen")),
        ),
        (
            "a whole call of `generate`, 28 tokens",
            f"{THREE}, batch 1 to 8",
            "512 to 8,192",
            span(among("generate", "seen, whole call")),
        ),
        (
            "a prompt of `generate` whose length comes again",
            "shapes of SmolLM2 and TinyLlama, batch 1",
            "512 to 8,192",
            span(among("prefill calls", prompt, lambda row: not is_8b(row))),
        ),
        ("the same", "Llama 8B, batch 1", "512 to 8,192", span(among("prefill calls", prompt, is_8b))),
        (
            "a forward whose length comes again, with and without a cache",
            "shapes of SmolLM2 and TinyLlama, batch 1",
            "512 to 8,192",
            span(
                [ratio for call in (again, alone) for ratio in among("prefill calls", call, lambda row: not is_8b(row))]
            ),
        ),
        (
            "the same",
            "Llama 8B, batch 1",
            "512 to 8,192",
            span([ratio for call in (again, alone) for ratio in among("prefill calls", call, is_8b)]),
        ),
        (
            "the first forwards, or prompts, of about a length",
            THREE,
            "512 to 4,096",
            span(among("prefill calls", new, up_to(4096))),
        ),
        ("the same", THREE, "8,192", span(among("prefill calls", new, at(8192)))),
        *(
            ("the same", "Llama 8B", f"{length(row):,}", f"{ratio_of_prefill(row):.2f}")
            for row in rows("prefill")
            if length(row) > 8192
        ),
        ("the same without a cache", THREE, "512 to 4,096", span(among("prefill calls", new_alone, up_to(4096)))),
        (
            "the same, with and without a cache, KV heads with different numbers of slots",
            "shape of SmolLM2",
            "512 to 2,048",
            span(unequal_heads()),
        ),
        *(
            (
                "compiled decoding, static cache on both sides",
                "Llama 8B, batch 1 to 16" if tokens < 131_072 else "Llama 8B, batch 1 and 4",
                f"{tokens:,}",
                span(among("decoding", "compiled sparse / static", at(tokens))),
            )
            for tokens in (4_096, 16_384, 32_768, 131_072)
        ),
        *(
            ("a step of `generate` on two CPU cores", "SmolLM2", f"{length(row):,}", row["times as fast"])
            for row in rows("generate on a cpu")
        ),
        *(
            ("a prompt of `generate` on two CPU cores", "SmolLM2", f"{tokens:,}", f"{ratio:.2f}")
            for tokens, ratio in prompts_on_a_cpu().items()
        ),
        (
            "Sparsefinder: forward, entmax over all keys",
            "SmolLM2",
            "512 to 8,192",
            span(1 / value for value in among("entmax models", "full / dense")),
        ),
        (
            "Sparsefinder: a prompt of `generate` whose length comes again, all keys",
            f"{THREE}, batch 1",
            "512 to 8,192",
            span(among("entmax prefill calls", prompt)),
        ),
        (
            "Sparsefinder: a step of `generate`",
            "SmolLM2, batch 1 and 4",
            "512 to 8,192",
            span(float(row["times as fast"]) for row in recorded_steps()),
        ),
    ]
    bold = [(what, model, tokens, f"**{ratio}**") for what, model, tokens, ratio in lines]
    head = ("what", "model", "tokens", "times as fast as dense")
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * 3 + ["---:"], *bold)) + "\n"


def unequal_heads() -> list[float]:
    """Return how many times as fast as dense ones new forwards are where KV heads differ, which no table holds."""
    return [row[call]["ratio"] for row in results("prefill-heads-h200") for call in ("new", "new_uncached")]


def prompts_on_a_cpu() -> dict[int, float]:
    """Return how many times as fast as dense ones first tokens on a CPU are, by the tokens of the prompt."""
    return {
        row["prompt"]: row["dense"]["first_token_ms"] / row["sparse"]["first_token_ms"]
        for row in results("generate-cpu")
    }


def results(name: str) -> list[dict[str, Any]]:
    """Return the rows of a JSON of a benchmark."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))["rows"]


def is_8b(row: Row) -> bool:
    return row["cell"].startswith("llama-8b")


def recorded_steps() -> list[Row]:
    """Return the recorded steps of Sparsefinder; two columns have one title, and the first is that of a step."""
    found = re.search(r"<!-- table: recorded entmax steps -->\n(.*?)<!-- end -->", SPEED.read_text("utf-8"), re.DOTALL)
    assert found
    return [{"times as fast": line.split(" | ")[4]} for line in found[1].splitlines()[2:]]


def test_the_summary_is_that_of_the_tables(request):
    text = SPEED.read_text("utf-8")
    before, rest = text.split("<!-- summary -->\n")
    _, end, after = rest.partition("<!-- end -->")
    made = f"{before}<!-- summary -->\n{summary()}{end}{after}"
    if request.config.getoption("write_golden"):
        SPEED.write_text(made, "utf-8")
    assert made == SPEED.read_text("utf-8"), "pytest --write-golden tests/test_speed_summary.py writes it anew"


def test_what_is_slower_is_in_the_summary():
    """A reader who looks at the top alone is told where it does not pay."""
    ratios = [float(ratio) for ratio in re.findall(r"\*\*([\d.]+)", summary())]
    assert len(ratios) > 10 and min(ratios) < 1


def test_the_readme_says_of_short_prompts_what_was_measured():
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    calls = ("forward", "forward without a cache", "first token")
    again = [ratio for call in calls for ratio in among("prefill calls", f"{call}, times as fast", up_to(4096))]
    new = [
        among("prefill calls", f"{call}, times as fast", up_to(4096)) for call in ("new forward", "new without a cache")
    ]
    assert f"A text of up to 4,096 tokens is read {span(again)} times as fast as by the dense model" in readme
    assert f"The first ones are {span(new[0])} times as fast, and without a cache {span(new[1])} times" in readme
    assert f"with unequal KV heads, as `finetune` makes them, {span(unequal_heads())} times" in readme
    longer = [f"{1 / ratio:.1f} times as long at {tokens:,}" for tokens, ratio in prompts_on_a_cpu().items()]
    assert f"on two CPU cores it takes {' and '.join(longer)} tokens" in readme
    times = [
        (number(row["SparseK, forward"]), number(row["cuDNN, forward"]))
        for row in rows("shapes")
        if row["tokens"] == "4,096"
    ]
    ratios = [sparse / dense for sparse, dense in times]
    assert f"at 4,096 they take {min(ratios):.1f} to {max(ratios):.1f} times as long" in readme


def test_what_the_cards_of_small_models_measured_is_told():
    names = ("demo-llama-sparsek-64", "wiki-bert-sparsek-41", "all-minilm-l6-v2-sparsek-57", "wiki-gpt2-sparsek-64")
    speeds = [
        json.loads((ROOT / f"model_cards/{name}/eval.json").read_text("utf-8"))["tokens_per_second"] for name in names
    ]
    llama, bert, minilm, gpt2 = (f"{speed['sparse'] / speed['dense']:.2f}" for speed in speeds)
    told = " ".join(SPEED.read_text("utf-8").split())
    assert f"the bundled Llama decodes {llama} times as fast as dense on a CPU" in told
    assert f"wiki-bert and all-MiniLM-L6-v2 read {bert} and {minilm} times as fast; wiki-gpt2 decoded {gpt2}" in told
