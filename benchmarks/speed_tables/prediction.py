"""Tabulate entmax over predicted tiles: runs of `entmax_prediction.py` and of `predicted_quality.py`."""

from collections.abc import Sequence
from typing import Any

from speed_tables.cells import PASSES, quotient, ratio, short, table, thousands
from speed_tables.entmax import CONTENDERS, captured
from speed_tables.registry import Run, speed_table

RUNS = tuple(
    f"entmax_prediction{part}-h200"
    for part in ("-8050b75", "-fc79457", "-2917fd7", "-c81fb3b", "-contenders", "-choices", "-128k", "")
)
QUALITY = ("qwen", "smollm2-8k", "smollm2", "smollm2-lora", "smollm2-unpatched")


def joined_texts(runs: Sequence[Run]) -> Run:
    """Join runs of predicted tiles; of a text, a contender and a number of choices the rows of the first run count."""
    texts: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for run in runs:
        known = {(row["text"], row["contender"], row["choices"]) for row in rows}
        rows += [row for row in run["rows"] if (row["text"], row["contender"], row["choices"]) not in known]
        for name, text in run["texts"].items():
            before = texts.get(name, {"predicted": {}})
            texts[name] = {**text, **before, "predicted": {**text["predicted"], **before["predicted"]}}
    return {"texts": texts, "rows": rows}


def name_of(row: Run) -> str:
    if row["choices"] is None:
        return CONTENDERS[row["contender"]]
    if row["contender"] == "flex tiles":
        return f"FlexAttention, softmax over the tiles of {row['choices']} choices"
    return f"entmax, {row['choices']} choices of a query"


@speed_table("prediction", RUNS, which="forward")
@speed_table("prediction forward and backward", RUNS, which="forward_backward")
@speed_table("prediction alone", RUNS, which="prediction")
def prediction_table(runs: Sequence[Run], which: str) -> str:
    """Tabulate one pass over predicted tiles of the drawn texts: milliseconds in a CUDA graph and, in brackets, from
    Python."""
    run = joined_texts(runs)
    lengths = sorted(text["length"] for name, text in run["texts"].items() if name.startswith("drawn "))
    cells = {
        (name_of(row), run["texts"][row["text"]]["length"]): captured(row)
        for row in run["rows"]
        if row.get("pass") == which and row["text"].startswith("drawn ")
    }
    rows = [[name, *(cells.get((name, n), "-") for n in lengths)] for name in dict.fromkeys(name for name, _ in cells)]
    return table([f"{PASSES.get(which, 'Prediction alone')}, ms", *thousands(lengths)], rows)


@speed_table("entmax ratios", RUNS)
def entmax_ratio_table(runs: Sequence[Run]) -> str:
    """Divide the time of entmax over all keys and over predicted tiles by that of others, in CUDA graphs.

    Texts that are layers of one model and length are one row: the sums of their times."""
    run = joined_texts(runs)
    times: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
    for row in (row for row in run["rows"] if "error" not in row and row["captured_ms"] is not None):
        column, length = (name_of(row), row["pass"]), run["texts"][row["text"]]["length"]
        cells = times.setdefault((row["text"].split(" layer ")[0].rsplit(" ", 1)[0], length), {})
        cells[column] = cells.get(column, 0.0) + row["captured_ms"]
    others = {"adasplash 2": "AdaSplash 2", "sdpa flash": "flash", "sdpa cudnn": "cuDNN"}
    rows = []
    for (text, length), cells in sorted(times.items()):
        for name in dict.fromkeys(name for name, _ in cells):
            if name == CONTENDERS["entmax exact"] or name.endswith("choices of a query"):
                ratios = [
                    ratio(cells.get((name, which)), cells.get((CONTENDERS[other], which)))
                    for which in PASSES
                    for other in others
                ]
                rows.append([text, f"{length:,}", name, *ratios])
    head = [f"{title.lower()} / {other}" for title in PASSES.values() for other in others.values()]
    return table(["queries and keys", "tokens", "ours", *head], rows)


@speed_table("entmax beside flash", RUNS)
def flash_ratio_table(runs: Sequence[Run]) -> str:
    """Divide the time of entmax on drawn queries and keys by that of SDPA flash, in CUDA graphs, up to 32,768 tokens.

    A cell has the forward, and forward and backward."""
    run = joined_texts(runs)
    times: dict[tuple[str, str], dict[int, float]] = {}
    for row in (row for row in run["rows"] if row["text"].startswith("drawn ") and row.get("captured_ms")):
        cells = times.setdefault((name_of(row), row["pass"]), {})
        cells[run["texts"][row["text"]]["length"]] = row["captured_ms"]
    flash = {which: times[CONTENDERS["sdpa flash"], which] for which in PASSES}
    lengths = sorted(length for length in flash["forward"] if length <= 32_768)
    rows = []
    for name, ours in (
        ("entmax over all keys (`complete=True`, with any adapter)", CONTENDERS["entmax exact"]),
        ("entmax over tiles that `pooled` predicts, 4 choices of a query", "entmax, 4 choices of a query"),
    ):
        ratios = [[f"{times[ours, which][n] / flash[which][n]:.2f}" for which in PASSES] for n in lengths]
        rows.append([name, *(" / ".join(both) for both in ratios)])
    return table(["tokens", *thousands(lengths)], rows)


@speed_table("flex tiles", ("entmax_prediction-flex-h200",))
def flex_table(runs: Sequence[Run]) -> str:
    """Tabulate entmax over predicted tiles, prediction included, beside softmax over the same tiles, in CUDA graphs."""
    run = joined_texts(runs)
    cells: dict[tuple[str, int, str, str], float] = {}
    for row in (row for row in run["rows"] if "error" not in row and row["choices"] is not None):
        cells[row["text"], row["choices"], row["contender"], row["pass"]] = row["captured_ms"]
    rows = []
    for text, count in dict.fromkeys((text, count) for text, count, *_ in cells):
        columns: list[str] = []
        for which in PASSES:
            ours, flex = (cells.get((text, count, name, which)) for name in ("predicted", "flex tiles"))
            columns += map(short, (ours, flex, quotient(ours, flex)))
        rows.append([text, f"{run['texts'][text]['length']:,}", f"{count}", *columns])
    head = [f"{name}, {title.lower()}" for title in PASSES.values() for name in ("entmax", "FlexAttention", "ratio")]
    return table(["queries and keys", "tokens", "choices", *head], rows)


@speed_table("predicted texts", RUNS)
def predicted_text_table(runs: Sequence[Run]) -> str:
    """Tabulate what predicted tiles hold in every text, and the forward of the contenders in a CUDA graph."""
    run = joined_texts(runs)
    others = [CONTENDERS[name] for name in ("entmax exact", "adasplash 2", "sdpa flash", "sdpa cudnn")]
    times = {
        (row["text"], name_of(row)): short(row["captured_ms"]) for row in run["rows"] if row.get("pass") == "forward"
    }
    rows = []
    for name, text in sorted(run["texts"].items(), key=lambda item: (item[0].split(" ")[0], item[1]["length"])):
        for count, held in text["predicted"].items():
            shares = [f"{held['keys_per_query']:.0f}", f"{held['listed']:.0%}", f"{held['recall']:.1%}"]
            measured = [times.get((name, of), "-") for of in (f"entmax, {count} choices of a query", *others)]
            rows.append([name, f"{text['length']:,}", count, *shares, *measured])
    head = ["queries and keys", "tokens", "choices", "keys with weight", "pairs listed", "mass held", "predicted, ms"]
    return table([*head, "all keys, ms", "AdaSplash 2, ms", "flash, ms", "cuDNN, ms"], rows)


@speed_table("predicted quality", tuple(f"predicted_quality-{name}-h200" for name in QUALITY))
def predicted_quality_table(runs: Sequence[Run]) -> str:
    """Tabulate the perplexity over predicted tiles beside that over all keys, with the standard error over chunks."""
    rows = []
    for run in runs:
        model, adapter = (run["settings"][name] for name in ("model", "adapter"))
        name = adapter if adapter.startswith(model) else f"of {model}"
        perplexity = {(row["length"], row["attention"]): row["perplexity"] for row in run["rows"]}
        predicted = [row for row in run["rows"] if row["attention"] == "predicted"]
        for row in sorted(predicted, key=lambda row: (row["length"], row["choices"], "exact_layers" in row)):
            length = row["length"]
            exact = ", ".join(map(str, row.get("exact_layers", ()))) or "none"
            lists = [f"{row['tiles']:.1f}", f"{row['share_of_pairs']:.0%}"]
            values = [*(perplexity[length, attention] for attention in ("dense", "all keys")), row["perplexity"]]
            above = f"{row['above_all_keys']:+.2%} ({row['standard_error']:.2%})".replace("%", " %")
            cells = [f"{length:,} x {row['chunks']}", f"{row['choices']}", exact, *lists]
            rows.append([name, *cells, *(f"{value:.2f}" for value in values), above])
    head = ["adapter", "tokens x chunks", "choices", "layers over all keys", "tiles per list", "pairs listed"]
    head += ["dense", "entmax, all keys", "predicted", "above all keys"]
    return table(head, rows)
