"""The page about speed, from the JSON of the benchmarks: no number in a table is typed by hand.

    cd benchmarks/results
    python ../tables.py --kernels kernels-h200.json kernels-flash-h200.json --wider kernels-support4096-h200.json \\
        --model model-scores-h200.json model-h200.json model-eager-h200.json model-earlier-h200.json \\
        --profiles profiles-scores-h200.json profiles-h200.json --first-calls first_calls-h200.json \\
        --sizes sizes-h200.json \\
        --entmax entmax_kernels-h200.json entmax_kernels-earlier-h200.json \\
        --entmax entmax_kernels-128-h200.json entmax_kernels-128-earlier-h200.json \\
        --generate generate-h200.json generate-before-h200.json \\
        --page ../../docs/speed.md --figure ../../docs/speed.png

Of several JSON of the same benchmark the first counts, and of each next one what those before it lack. It prints the
tables of the README.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_sparse.figures.style import canvas
from hf_sparse.files import write_text

KERNELS = {  # contender: its name in tables
    "sparsek hard": "SparseK, hard gates",
    "flex window": "FlexAttention, window of as many keys",
    "sdpa cudnn": "SDPA cuDNN, dense",
    "sdpa flash": "SDPA flash, dense",
    "sparsek soft": "SparseK, soft gates, gradient of the scores only",
    "scan hard": "selection alone, hard",
    "scan soft": "selection alone, soft",
}
CACHES = {
    "dynamic": "dense, dynamic cache",
    "static": "dense, static cache, compiled",
    "sparse eager": "sparse, eager",
    "sparse": "sparse, compiled",
}
CAVEATS = """Read the ratios with care:

- The dynamic cache runs eager. Up to 16 rows of 4,096 tokens its step takes the same time whatever it reads:
  presumably the CPU (of a virtual machine) does not launch kernels faster; that was not profiled. Compare it with the
  sparse steps that run eager as well.
- With a static cache there is a mask, and with a mask transformers repeats keys and values for every query head before
  SDPA (`repeat_kv`, see its `use_gqa_in_sdpa`), four times here: the profile below has the copies and the attention
  over them. A dense step at the roofline would take about as long at 32,768 x 4 as the sparse one takes now.
- The sparse step reaches half of its own roofline, at any context: it reads as much at each of them, so that the
  differences between them are noise. Its kernels take less than it does (below); between two steps the GPU waits for
  Python, and most of the kernels' time goes to the products with the weights.
- Rows are of one run on a machine that did nothing else; prefill, training and the compiled sparse steps of one text of
  4,096 and of 32,768 tokens are of a later one, after the scores had got kernels. Between all runs, an earlier one and
  one of the eager rows at 32,768 tokens too, steps that were measured again differed by up to
  {spread}.
  What runs eager is the least certain: the CPU alone sets its pace.
"""
PASSES = {"forward": "Forward", "forward_backward": "Forward and backward"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def short(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.{2 if value < 10 else 1}f}"


def firsts(rows: Iterable[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Of rows with the same content under these names the first."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), row)
    return list(found.values())


def medians(kernels: dict[str, Any], which: str) -> dict[str, dict[int, float]]:
    """Milliseconds by contender and length."""
    found: dict[str, dict[int, float]] = {}
    for row in kernels["rows"]:
        if row.get("pass") == which:
            found.setdefault(row["contender"], {})[row["length"]] = row["median_ms"]
    return found


def joined_kernels(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first run, with rows of later ones that it lacks; `added` names their contenders."""
    if any(run["settings"] != runs[0]["settings"] for run in runs):
        raise ValueError("the runs of attention_kernels.py have different settings")
    rows = firsts([row for run in runs for row in run["rows"]], "contender", "pass", "length")
    added = dict.fromkeys(row["contender"] for row in rows if row not in runs[0]["rows"])
    return runs[0] | {"rows": rows, "added": list(added)}


def kernel_tables(kernels: dict[str, Any]) -> str:
    lengths = sorted({row["length"] for row in kernels["rows"]})
    head = ["ms", *(f"{length:,}" for length in lengths)]
    text = ""
    for which, title in PASSES.items():
        times = medians(kernels, which)
        rows = [
            [label, *(short(times[name].get(n)) for n in lengths)] for name, label in KERNELS.items() if name in times
        ]
        ours = times.get("sparsek hard", {})
        for name, label in (("flex window", "times as long as the window"), ("sdpa cudnn", "times as fast as cuDNN")):
            pairs = [(ours.get(n), times.get(name, {}).get(n)) for n in lengths]
            cells = [short((a / b if name == "flex window" else b / a) if a and b else None) for a, b in pairs]
            rows.append([f"*SparseK, hard gates: {label}*", *cells])
        text += f"{title}:\n\n{table(head, rows)}\n"
    return text


def joined(models: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first run, with cells of later ones that it lacks; each row with the bandwidth of its run.

    `spread` has the largest difference of a step between two runs, over the smaller one, by variant."""
    if not models:
        return None
    if any(model["settings"] != models[0]["settings"] for model in models):
        raise ValueError("the runs of model.py have different settings")
    rows = [row | {"bandwidth": model["bandwidth"]} for model in models for row in model["rows"]]
    steps: dict[tuple, list[float]] = {}
    for row in rows:
        if "step_ms" in row:
            steps.setdefault((row["variant"], row["context"], row["batch"]), []).append(row["step_ms"]["median_ms"])
    spread: dict[str, float] = {}
    for (variant, *_), found in steps.items():
        spread[variant] = max(spread.get(variant, 0.0), max(found) / min(found) - 1)
    return models[0] | {"rows": firsts(rows, "part", "variant", "context", "batch"), "spread": spread}


def decode_table(model: dict[str, Any]) -> str:
    cells = {(r["variant"], r["context"], r["batch"]): r for r in model["rows"] if r["part"] == "decode"}
    rows = []
    for context, batch in sorted({key[1:] for key in cells}):
        row = [f"{context:,} x {batch}"]
        for variant in CACHES:
            cell = cells.get((variant, context, batch))
            if cell is None or "step_ms" not in cell:
                row.append("does not fit" if cell and "skipped" in cell else "-")
                continue
            ideal = 1e3 * cell["bytes_per_step"] / cell["bandwidth"]
            row.append(
                f"{cell['tokens_per_second']:,.0f} ({ideal / cell['step_ms']['median_ms']:.0%}, "
                f"{cell['kv_bytes'] / 2**30:.2f} GiB)"
            )
        ours = cells.get(("sparse", context, batch), {}).get("tokens_per_second")
        for variant in ("dynamic", "static"):
            theirs = cells.get((variant, context, batch), {}).get("tokens_per_second")
            row.append(f"{ours / theirs:.2f}" if ours and theirs else "-")
        rows.append(row)
    head = ["context x batch", *CACHES.values(), "compiled sparse / dynamic", "compiled sparse / static"]
    return table(head, rows)


def long_table(model: dict[str, Any], part: str, names: dict[str, str]) -> str:
    cells = {(r["variant"], r["context"]): r for r in model["rows"] if r["part"] == part and "median_ms" in r}
    rows = []
    for context in sorted({key[1] for key in cells}):
        row = [f"{context:,}"]
        for variant in names:
            cell = cells.get((variant, context))
            if cell is None:
                row.append("-")
                continue
            speed = 1e3 * context / cell["median_ms"]
            peak = f", {cell['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in cell else ""
            row.append(f"{short(cell['median_ms'])} ms, {speed:,.0f} tokens/s{peak}")
        rows.append(row)
    return table(["tokens", *names.values()], rows)


def profile_table(profiles: list[dict[str, Any]]) -> str:
    """Calls, the time of their kernels, and the kernels that take most of it; of equal calls the first."""
    parts = ("attention", "training", "decoding")
    calls = firsts([row for one in profiles for row in one["rows"]], "part", "length", "variant", "batch")
    rows = []
    for row in sorted(calls, key=lambda row: parts.index(row["part"])):
        longest = [
            f"{kernel['name'].split('<')[0].split('(')[0][:40]} {short(kernel['ms'])}" for kernel in row["kernels"][:5]
        ]
        size = f"{row['length']:,}" + (f" x {row['batch']}" if "batch" in row else "")
        count = f"{row['launches']:,}" if row["launches"] else "-"
        part = f"{row['part']}, {CACHES[row['variant']]}" if "variant" in row else row["part"]
        rows.append([part, size, short(row["call_ms"]), short(row["kernels_ms"]), count, ", ".join(longest)])
    head = ["call", "tokens", "ms", "ms of kernels", "launches", "longest kernels, ms"]
    return table(head, rows)


def sizes_table(sizes: dict[str, Any]) -> str:
    """Programs of the kernels in other sizes than they have."""
    names = ("rows", "keys", "warps", "stages", "registers")
    rows = [
        [row["kernel"], *(str(row[name]) if row[name] else "any" for name in names), short(row["median_ms"])]
        for row in sizes["rows"]
    ]
    return table(["kernel", *names, "ms"], rows)


def first_call_table(first_calls: dict[str, Any]) -> str:
    """Seconds of the first length, and the longest first call of another one."""
    rows = []
    for row in first_calls["rows"]:
        first, *others = row["calls"].values()
        later = [seconds for call in others for name, seconds in call.items() if name != "again_s"]
        both = first.get("forward_backward_s")
        cells = (first["forward_s"], both, both and first["forward_s"] + both, max(later, default=None))
        rows.append([row["family"], str(row["cores"]), *map(short, cells)])
    head = ["family, seconds", "cores", "first forward", "first with backward after it", "both", "another length"]
    return table(head, rows)


def ratios(generate: dict[str, Any], call: int | None = None) -> dict[tuple[str, int, int], float]:
    """Divide dense by sparse milliseconds of a step, by shape, prompt and batch: of one call, or the medians."""
    found = {}
    for row in generate["rows"]:
        steps = [row[name]["step_ms"] if call is None else row[name]["steps_ms"][call] for name in ("dense", "sparse")]
        found[row["shape"], row["prompt"], row["batch"]] = steps[0] / steps[1]
    return found


def generate_table(generate: dict[str, Any], before: dict[str, Any]) -> str:
    again, unseen, earlier = ratios(generate), ratios(generate, 0), ratios(before)
    rows = []
    for row in generate["rows"]:
        cell = (row["shape"], row["prompt"], row["batch"])
        steps = [row["dense"]["steps_ms"][0], row["sparse"]["steps_ms"][0]]
        steps += [row["dense"]["step_ms"], row["sparse"]["step_ms"]]
        first = " / ".join(short(row[name]["first_token_ms"]) for name in ("dense", "sparse"))
        times = [f"{value:.2f}" if value else "-" for value in (unseen[cell], again[cell], earlier.get(cell))]
        rows.append([f"{cell[0]}, {cell[1]:,} x {cell[2]}", *map(short, steps), *times, first])
    head = ["shape, prompt x batch", "dense, unseen lengths", "sparse", "dense, lengths seen before", "sparse"]
    head += ["times as fast, unseen", "seen", "seen, before", "first token, ms: dense / sparse"]
    return table(head, rows)


def generate_section(generate: dict[str, Any], before: dict[str, Any]) -> str:
    settings, profiles = generate["settings"], [row for row in generate["rows"] if "profile" in row]
    launches = ",\n  ".join(
        f"{row['profile']['sparse']['launches']:,} sparse and {row['profile']['dense']['launches']:,} dense "
        f"({row['shape']})"
        for row in profiles
    )
    old, old_shape = next((row["profile"], row["shape"]) for row in before["rows"] if "profile" in row)
    slots = settings["k"] + settings["window"] + settings["sinks"]
    return f"""## Default `generate`

Eager steps of a user who passes nothing but a prompt: dense with a cache that grows, sparse with {slots:,} KV slots,
random weights in {settings["dtype"]}. Calls of {settings["new_tokens"]} tokens alternate in one process
(`benchmarks/generate.py`); milliseconds of a step, the median of {settings["rounds"]} calls. The CPU of a virtual
machine sets the pace, and single calls differ by up to half: only ratios count, and a single one to about 20 %.

- Unseen lengths, the first call of each cell, are the text of a user. There the dense step waits in SDPA, for 1.8 ms a
  layer under Python's profiler: presumably for cuDNN, which SDPA takes here, to plan for another length. Where SDPA
  takes another kernel, the columns of seen lengths are what to expect.
- Lengths that the process has seen before: dense and sparse steps take about the same time, since both wait for the
  CPU that launches the rest of the model.
- A sparse step of a layer is one kernel, where a scorer gives the scores, no gradient is wanted and nothing is
  compiled; baselines take several. Launches of a step:
  {launches}. Before that kernel:
  {old["sparse"]["launches"]:,} sparse and {old["dense"]["launches"]:,} dense ({old_shape}).
- "Before" is the commit before that kernel, in the same session. What is missing was not measured.

{generate_table(generate, before)}
"""


def generate_summary(generate: dict[str, Any]) -> str:
    """The sentence of the README."""
    again, unseen = sorted(ratios(generate).values()), sorted(ratios(generate, 0).values())
    return (
        f"Default `generate`, eager, is {again[0]:.2f} to {again[-1]:.2f} times as fast as the unpatched model (median "
        f"{again[len(again) // 2]:.2f}, {len(again)} cells),\nand {unseen[0]:.1f} to {unseen[-1]:.1f} times at lengths "
        "that the process has not seen, where the dense step waits in SDPA."
    )


def summary(kernels: dict[str, Any], model: dict[str, Any] | None) -> str:
    """The table of the README: a few of the numbers."""
    lengths = (16_384, 65_536, 131_072)
    rows = []
    for which, title in PASSES.items():
        times = medians(kernels, which)
        for name in ("sparsek hard", "flex window", "sdpa cudnn"):
            rows.append([f"{title}, ms: {KERNELS[name]}", *(short(times[name].get(n)) for n in lengths)])
    text = table(["attention", *(f"{n:,} tokens" for n in lengths)], rows)
    if model is None:
        return text
    cells = {(r["variant"], r["context"], r["batch"]): r for r in model["rows"] if r["part"] == "decode"}
    pairs = ((16_384, 8), (32_768, 4), (131_072, 4))
    rows = []
    for variant in ("sparse", "static", "dynamic"):
        found = [cells.get((variant, *pair), {}) for pair in pairs]
        rows.append([CACHES[variant], *(short(cell.get("tokens_per_second")) for cell in found)])
    return f"{text}\n{table(['decoding, tokens/s', *(f'{n:,} x {batch}' for n, batch in pairs)], rows)}"


ENTMAX = {
    "entmax exact": "entmax, all keys, exact",
    "sdpa flash": "SDPA flash, dense softmax",
    "sdpa cudnn": "SDPA cuDNN, dense softmax",
}


def entmax_section(shapes: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return the section about entmax over all keys: for each shape its runs, of which the first counts."""
    first = shapes[0][0]
    keys = first["supports"]["8192"]["keys_per_query"]
    worst = max(max(run["errors_against_float64"].values()) for runs in shapes for run in runs)
    text = f"""## Entmax over all keys

`entmax_attention` with neither edges nor tiles, alpha {first["settings"]["alpha"]}, every row exact. Queries and keys
are drawn (`benchmarks/entmax_kernels.py` says how): {sum(keys) / len(keys):.0f} keys with weight per query in the mean
at 8,192 tokens, from {min(keys):.0f} to {max(keys):.0f} by head. No trained model is behind them. In each cell the
time inside a CUDA graph and, in brackets, as called from Python: up to 8,192 tokens the CPU that launches the
kernels is the limit. Measured after outputs and gradients agreed with float64 (largest relative error {worst:.1e}).
What a run lacks is of an earlier one, in which a forward without gradients did what only a backward needs.
"""
    for runs in shapes:
        settings = runs[0]["settings"]
        cells: dict[tuple[str, str, int], str] = {}
        for row in (row for run in runs for row in run["rows"] if "error" not in row):
            cell = f"{short(row['captured_ms'])} ({short(row['median_ms'])})"
            cells.setdefault((row["pass"], row["contender"], row["length"]), cell)
        lengths = sorted({length for _, _, length in cells})
        text += f"""
{settings["query_heads"]} query heads and {settings["kv_heads"]} KV heads of size {settings["dim"]}:

"""
        for which, title in PASSES.items():
            rows = [
                [name, *(cells.get((which, contender, n), "-") for n in lengths)] for contender, name in ENTMAX.items()
            ]
            text += table([f"{title}, ms", *(f"{n:,}" for n in lengths)], rows) + "\n"
    return text


def page(
    kernels: dict[str, Any],
    wider: dict[str, Any] | None,
    model: dict[str, Any] | None,
    profiles: list[dict[str, Any]],
    first_calls: dict[str, Any] | None,
    sizes: dict[str, Any] | None,
    figure: str | None,
    generate: Sequence[dict[str, Any]] = (),
    entmax: Sequence[Sequence[dict[str, Any]]] = (),
) -> str:
    """The whole page, Markdown; `wider` has soft gates over a larger support, `generate` two runs, now and before."""
    machine, versions, settings = kernels["machine"], kernels["versions"], kernels["settings"]
    errors = kernels["errors_against_float64"]
    worst = max(value for name, value in errors.items() if name != "tau")
    text = f"""# Speed

Written by `benchmarks/tables.py` from `benchmarks/results/`. One {machine["accelerator"]}, torch {versions["torch"]},
CUDA {versions["cuda"]}, Triton {versions["triton"]}, transformers {versions["transformers"]}; {settings["dtype"]}.
Medians; what has a dash was not measured.

## Attention

Batch {settings["batch"]}, {settings["query_heads"]} query heads and {settings["kv_heads"]} KV heads of size
{settings["dim"]}; k = {settings["k"]}, window = {settings["window"]}, {settings["sinks"]} sinks; soft gates over
{settings["support"]:,} keys at most. Times of SparseK include its selection. Measured after outputs and gradients
agreed with float64 (largest relative error {worst:.1e}) and the selection with the one in plain PyTorch.

At 4,096 tokens the limit is the CPU that launches the kernels (see "Where the time goes"), and presumably for the
selection alone as long as its time does not grow; how fast it launches differs from run to run.
"""
    if kernels["added"]:
        text += f"""
Of {", ".join(KERNELS[name] for name in kernels["added"])}: what this run lacks is of another run.
"""
    text += f"""
{kernel_tables(kernels)}"""
    if wider:
        lengths = sorted({row["length"] for row in wider["rows"]})
        rows = []
        for which, title in PASSES.items():
            times = medians(wider, which)["sparsek soft"]
            rows.append([title, *(short(times.get(n)) for n in lengths)])
        where = "" if wider["commit"] == kernels["commit"] else ", of another run"
        text += f"""Soft gates over {wider["settings"]["support"]:,} keys at most, gradient of the scores only{where}:

{table(["ms", *(f"{n:,}" for n in lengths)], rows)}
"""
    if figure:
        text += f"![Time over length]({figure})\n\n"
    if entmax:
        text += entmax_section(entmax)
    if model is None:
        return text
    budget = model["settings"]
    slots = budget["k"] + budget["window"] + budget["sinks"]
    spread = ", ".join(f"{model['spread'][name]:.0%} ({label})" for name, label in CACHES.items())
    text += f"""## Whole models

Random weights; {slots:,} KV slots (k = {budget["k"]}, window = {budget["window"]}, {budget["sinks"]} sinks). A copy
of 4 GiB moves {model["bandwidth"] / 1e12:.2f} TB/s.

Decoding of an 8B-shaped Llama through `generate`, tokens per second; in brackets the share of the roofline (the time to
read weights and KV once at that bandwidth) and the KV bytes. The caches were filled with random keys and values
in place of a prompt.

{decode_table(model)}
{CAVEATS.format(spread=spread)}
"""
    measured = {row["part"] for row in model["rows"]}
    missing = [name for name in ("prefill", "train") if name not in measured]
    if missing:
        text += f"Not measured yet: {' and '.join(missing)}, which `benchmarks/model.py` would.\n\n"
    if "prefill" in measured:
        text += f"""Prefill of the same model, batch 1: time and peak memory on top of the weights.

{long_table(model, "prefill", {"dense": "dense (SDPA)", "sparse": "sparse"})}
"""
    if "train" in measured:
        text += f"""Training step of the scorers of a SmolLM2-135M-shaped model (`distill`: teacher's forward, student's
forward and backward), and the teacher's forward alone, batch 1.

{long_table(model, "train", {"scorers": "training step", "dense teacher": "dense teacher, of it"})}"""
        text += "\n"
    if generate:
        text += generate_section(*generate)
    if profiles:
        text += f"""## Where the time goes

The attention of the first table, forward and backward with hard gates; the training step and the decoding step of the
whole models: the time of a call without the profiler, and of the kernels of one with it. Where kernels take much less
time than the call, the CPU that launches them is the limit.

{profile_table(profiles)}
"""
    if sizes:
        text += f"""Sizes of programs, searched at {sizes["length"]:,} tokens with hard gates; the first of each
kernel are in use. With 128 registers a thread 16 warps share a multiprocessor. No script here repeats the search.

{sizes_table(sizes)}
"""
    if first_calls:
        text += f"""## First calls

Seconds in a fresh process with empty caches, processes side by side on cores of their own. A call compiles its kernels,
and those of its backward if something wants a gradient, side by side as well, as many at a time as there are cores.
The kernels of the scores, which a model compiles besides, are not in it: the calls are of attention alone.

{first_call_table(first_calls)}
"""
    return text.rstrip() + "\n"


def draw(kernels: dict[str, Any], path: Path) -> None:
    """Forward, and forward and backward, over the length."""
    from matplotlib.ticker import StrMethodFormatter

    looks = {
        "sparsek hard": ("#0b6e99", "o", 2.4),
        "flex window": ("#d07a00", "s", 1.3),
        "sdpa cudnn": ("#555555", "^", 1.3),
    }
    lengths = {row["length"] for row in kernels["rows"]}
    with canvas(path, 8.6, 3.6) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (which, title) in zip(panels, PASSES.items(), strict=True):
            times = medians(kernels, which)
            for name, (colour, marker, width) in looks.items():
                points = sorted(times.get(name, {}).items())
                if points:
                    axes.plot(
                        *zip(*points, strict=True), color=colour, marker=marker, linewidth=width, label=KERNELS[name]
                    )
            axes.set(title=title, yscale="log", xlabel="tokens")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(lengths), [f"{length // 1024}k" for length in sorted(lengths)])
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.grid(True)
        panels[0].set_ylabel("ms")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kernels", type=Path, nargs="+", required=True)
    parser.add_argument("--wider", type=Path, help="JSON of the kernels with a larger support")
    parser.add_argument("--model", type=Path, nargs="+", default=[])
    parser.add_argument("--profiles", type=Path, nargs="*", default=[])
    parser.add_argument("--first-calls", type=Path)
    parser.add_argument("--sizes", type=Path, help="JSON of a search for sizes of the kernels' programs")
    parser.add_argument("--generate", type=Path, nargs=2, default=[], help="JSON of default generate, now and before")
    parser.add_argument(
        "--entmax", type=Path, nargs="+", action="append", default=[], help="JSON of entmax_kernels.py, for each shape"
    )
    parser.add_argument("--page", type=Path, help="the Markdown to write")
    parser.add_argument("--figure", type=Path, help="the PNG to write, beside the page")
    options = parser.parse_args()
    kernels = joined_kernels([json.loads(path.read_text("utf-8")) for path in options.kernels])
    wider = json.loads(options.wider.read_text("utf-8")) if options.wider else None
    model = joined([json.loads(path.read_text("utf-8")) for path in options.model])
    profiles = [json.loads(path.read_text("utf-8")) for path in options.profiles]
    first_calls = json.loads(options.first_calls.read_text("utf-8")) if options.first_calls else None
    sizes = json.loads(options.sizes.read_text("utf-8")) if options.sizes else None
    figure = options.figure.name if options.figure else None
    generate = [json.loads(path.read_text("utf-8")) for path in options.generate]
    entmax = [[json.loads(path.read_text("utf-8")) for path in runs] for runs in options.entmax]
    text = page(kernels, wider, model, profiles, first_calls, sizes, figure, generate, entmax)
    if options.figure:
        draw(kernels, options.figure)
    if options.page:
        write_text(options.page, text)
    print(summary(kernels, model) if options.page else text)
    if generate:
        print(generate_summary(generate[0]))


if __name__ == "__main__":
    main()
