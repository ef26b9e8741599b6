"""Fill the tables of documents in from the JSON of the benchmarks: no number in a table is typed by hand.

    cd benchmarks/results
    python ../tables.py --kernels kernels-launches-h200.json kernels-h200.json kernels-flash-h200.json --wider \\
        kernels-support4096-h200.json --model model-scores-h200.json model-h200.json model-eager-h200.json \\
        model-earlier-h200.json --profiles profiles-recorded-h200.json profiles-launches-h200.json \\
        profiles-scores-h200.json profiles-h200.json \\
        --first-calls first_calls-h200.json --sizes sizes-h200.json sizes-more-h200.json sizes-soft-h200.json \\
        --generate generate-h200.json generate-8b-h200.json generate-smollm2-h200.json \\
        generate-smollm2-8k-h200.json \\
        --generate-before generate-before-h200.json --entmax entmax_kernels-h200.json \\
        entmax_kernels-earlier-h200.json --entmax entmax_kernels-128-h200.json entmax_kernels-128-earlier-h200.json \\
        --recorded recorded-h200.json recorded-126f690-h200.json recorded-earlier-h200.json \\
        --first-static first_static-h200.json first_static-631e60f-h200.json first_static-earlier-h200.json \\
        --shapes kernels-shape-*-64-h200.json kernels-shape-*-128-h200.json kernels-shape-*-h200.json \\
        kernels-launches-h200.json --first-tokens generate-short-h200.json \\
        --prefills prefill-h200.json --entmax-prefills prefill-entmax-h200.json --evaluation evaluation-h200.json \\
        --cpu generate-cpu.json generate-before-cpu.json --busy busy-cpu.json \\
        --entmax-model entmax_model-h200.json --conversion conversion-h200.json \\
        --steps generate-entmax-h200.json generate-predicted-h200.json \\
        generate-entmax-more-h200.json --recorded-steps generate-*-recorded-h200.json \\
        --prediction entmax_prediction-4096-h200.json entmax_prediction-smollm2-h200.json \\
        entmax_prediction-c81fb3b-h200.json entmax_prediction-contenders-h200.json \\
        entmax_prediction-choices-h200.json entmax_prediction-128k-h200.json entmax_prediction-h200.json \\
        --flex entmax_prediction-flex-h200.json \\
        --static static_decode-8-layers-h200.json static_decode-predicted-h200.json \\
        --quality predicted_quality-*-h200.json --bidirectional entmax_bidirectional-*-h200.json \\
        --lengths finetune_length-h200.json --float8 finetune_fp8-h200.json --gpus several_gpus-h200.json \\
        several_gpus-05ba201-h200.json \\
        --teachers finetune_teacher-smollm2-cpu.json finetune_teacher-bundled-cpu.json \\
        finetune_teacher-smollm2-training-cpu.json finetune_teacher-bundled-training-cpu.json \\
        --products products-h200.json --product-sizes products-sizes-h200.json --head-shares head_shares-h200.json \\
        --fill ../../docs/speed.md ../../README.md --figure ../../docs/speed.png

A document marks the place of a table: everything between `<!-- table: NAME -->` and `<!-- end -->` is replaced. The
words around it belong to the document. Where several JSON files of one benchmark are given, the first one counts, and
each next one adds the cells that those before it lack.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hf_sparse.atomic_files import write_text
from hf_sparse.figures.style import canvas

KERNELS = {  # contender: its name in tables
    "sparsek hard": "SparseK, hard gates",
    "flex window": "FlexAttention, window, same number of keys",
    "sdpa cudnn": "SDPA cuDNN, dense",
    "sdpa flash": "SDPA flash, dense",
    "sparsek soft": "SparseK, soft gates, gradient of the scores only",
    "scan soft": "selection alone, soft",
}
ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}
CACHES = {
    "dynamic": "dense, dynamic cache",
    "static": "dense, static cache, compiled",
    "sparse eager": "sparse, eager",
    "sparse": "sparse, compiled",
}
ENTMAX = {
    "entmax exact": "entmax, all keys, exact",
    "adasplash 1": "AdaSplash 1, entmax over all keys",
    "adasplash 2": "AdaSplash 2, entmax over all keys",
    "sdpa flash": "SDPA flash, dense softmax",
    "sdpa cudnn": "SDPA cuDNN, dense softmax",
}
ENTMAX_MODEL = {
    "dense": "dense (SDPA)",
    "full": 'entmax, predictor "full"',
    "complete": "entmax, `complete=True`",
    "predicted": "entmax, predicted graph",
    "pooled": "entmax, tiles by means",
}
PASSES = {"forward": "Forward", "forward_backward": "Forward and backward"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns after the first are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def short(value: float | None) -> str:
    """Write a number with three digits, and a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.{2 if value < 10 else 1}f}"


def firsts(rows: Iterable[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """Keep the first of all rows that agree in the columns `names`."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), row)
    return list(found.values())


def medians(kernels: dict[str, Any], which: str) -> dict[str, dict[int, float]]:
    """Return the milliseconds of one pass, by contender and length."""
    found: dict[str, dict[int, float]] = {}
    for row in kernels["rows"]:
        if row.get("pass") == which:
            found.setdefault(row["contender"], {})[row["length"]] = row["median_ms"]
    return found


def joined_kernels(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first run with the rows of later runs that it lacks; `added` names their contenders."""
    settings = [{**run["settings"], "repeat_ms": None} for run in runs]  # how long each was repeated may differ
    if any(one != settings[0] for one in settings):
        raise ValueError("the runs of attention_kernels.py have different settings")
    rows = firsts([row for run in runs for row in run["rows"]], "contender", "pass", "length")
    added = dict.fromkeys(row["contender"] for row in rows if row not in runs[0]["rows"])
    return runs[0] | {"rows": rows, "added": list(added)}


def kernel_table(kernels: dict[str, Any], which: str) -> str:
    lengths = sorted({row["length"] for row in kernels["rows"]})
    times = medians(kernels, which)
    rows = [[label, *(short(times[name].get(n)) for n in lengths)] for name, label in KERNELS.items() if name in times]
    ours = times.get("sparsek hard", {})
    for name, label in (("flex window", "times as long as the window"), ("sdpa cudnn", "times as fast as cuDNN")):
        pairs = [(ours.get(n), times.get(name, {}).get(n)) for n in lengths]
        cells = [short((a / b if name == "flex window" else b / a) if a and b else None) for a, b in pairs]
        rows.append([f"*SparseK, hard gates: {label}*", *cells])
    return table(["ms", *(f"{n:,}" for n in lengths)], rows)


def wider_table(wider: dict[str, Any]) -> str:
    lengths = sorted({row["length"] for row in wider["rows"]})
    times = {title: medians(wider, which)["sparsek soft"] for which, title in PASSES.items()}
    rows = [[title, *(short(found.get(n)) for n in lengths)] for title, found in times.items()]
    return table(["ms", *(f"{n:,}" for n in lengths)], rows)


def joined(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first run with the cells of later runs that it lacks, each row with the bandwidth of its run.

    `spread` holds the largest relative difference of a step between two runs, by variant."""
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


def length_table(run: dict[str, Any]) -> str:
    """Tabulate training of scorers at long texts."""
    rows = []
    for row in run["rows"]:
        if row["objective"] == "profile":
            continue
        settings = ["layers run again"] * row["gradient_checkpointing"] + ["MLPs and norms compiled"] * row["compiled"]
        settings += ["fp8"] * (row.get("mixed_precision") == "fp8")
        settings += [f"teacher within {row['teacher_window']:,}"] if row.get("teacher_window") else []
        cells = [f"{row['shape']}, {row['objective']}" + "".join(f", {one}" for one in settings), f"{row['tokens']:,}"]
        if "tokens_per_second" not in row:
            rows.append([*cells, row["error"].split(":")[0], "-", "-", "-"])
            continue
        share, peak = row["share_of_peak"], row["peak_memory_bytes"]
        cells += [f"{row['tokens_per_second']:,.0f}", short(row["hours_for_20M_tokens"])]
        rows.append([*cells, "-" if share is None else f"{share:.0%}", f"{peak / 2**30:.0f} GiB" if peak else "-"])
    return table(["base, objective", "tokens", "tokens/s", "hours for 20 M tokens", "share of peak", "memory"], rows)


def teachers_tables(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the tables of teachers whose time is linear in the length."""
    trained = [run for run in runs if run["part"] == "training"]
    return {
        "linear teachers": teacher_table([run for run in runs if run["part"] == "teachers"]),
        "teacher operations": operations_table(trained[0]),
        "taught": taught_table(trained),
    }


def operations_table(run: dict[str, Any]) -> str:
    """Tabulate the operations of linear teachers by those of the dense one, which is arithmetic."""
    cells = {(row["shape"], row["tokens"], row["teacher"], row["window"]): row["share"] for row in run["operations"]}
    teachers = sorted({key[2:] for key in cells})
    rows = [
        [f"{shape}, {tokens:,} tokens", *(f"{cells[shape, tokens, *teacher]:.2f}" for teacher in teachers)]
        for shape, tokens in dict.fromkeys(key[:2] for key in cells)
    ]
    return table(["operations, dense = 1", *(f"{kind}, window {window:,}" for kind, window in teachers)], rows)


def teacher_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate the KL of linear teachers from the dense one."""
    rows = [
        [
            f"{run['model']}, {run['length']:,}",
            row["teacher"],
            str(row["window"]),
            str(row["first"]),
            f"{row['kl']:.4f}",
        ]
        for run in runs
        for row in sorted(run["rows"], key=lambda row: (row["window"], row["teacher"], row["first"]))
    ]
    return table(["base, tokens", "teacher", "window", "first tokens", "KL from the dense teacher"], rows)


def taught_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate the held-out quality of scorers that learned from each teacher, of each seed."""
    rows = []
    for run in runs:
        before = [f"{run['before']['kl']:.4f}", f"{run['before']['perplexity']:.2f}"]
        rows.append([run["model"], "untrained", "-", *before])
        for objective, window in dict.fromkeys((row["objective"], row["window"]) for row in run["rows"]):
            same = [row for row in run["rows"] if (row["objective"], row["window"]) == (objective, window)]
            label = "no teacher (`lm`)" if objective == "lm" else f"within {window}" if window else "dense"
            cells = [" / ".join(f"{row['kl']:.4f}" for row in same)]
            cells.append(" / ".join(f"{row['perplexity']:.2f}" for row in same))
            rows.append([run["model"], label, str(run["steps"]), *cells])
    return table(["base", "teacher", "steps", "KL from the dense model", "perplexity"], rows)


def float8_table(run: dict[str, Any]) -> str:
    """Tabulate training in fp8 beside bfloat16; of two runs of a row the second counts, for the first one compiles."""
    last = {(row["shape"], row["compiled"], row["mixed_precision"]): row for row in run["rows"]}
    return length_table({"rows": list(last.values())})


def gpus_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate training by several processes, one a GPU; of each case the process with the most memory counts."""
    cases: dict[str, dict[str, Any]] = {}
    launches: list[dict[str, Any]] = []
    for run in runs:
        known = {case["case"] for launch in launches for case in launch["cases"]}
        launches += [launch for launch in run["launches"] if not known & {case["case"] for case in launch["cases"]}]
    for case in (case for launch in launches for case in launch["cases"]):
        if case["case"].split()[-2] not in ENGINES or "resumed" in case["case"]:
            continue
        merged = cases.setdefault(case["case"], {"peak_memory_bytes": 0, "tokens_per_second": math.inf})
        merged["peak_memory_bytes"] = max(merged["peak_memory_bytes"], case["peak_memory_bytes"])
        merged["tokens_per_second"] = min(merged["tokens_per_second"], case["tokens_per_second"])
        merged.update({name: case[name] for name in ("efficiency", "difference", "base_share") if name in case})
    rows = []
    for name, case in sorted(cases.items(), key=lambda item: item[0].split()[:-2]):
        *what, engine, gpus = name.split()
        values = [f"{case[key]:.2f}" if key in case else "-" for key in ("efficiency", "difference", "base_share")]
        peak = f"{case['peak_memory_bytes'] / 2**30:.1f} GiB"
        label = "one process" if gpus == "1" else ENGINES[engine]
        rows.append([" ".join(what), label, gpus, f"{case['tokens_per_second']:,.0f}", *values, peak])
    head = ["case", "engine", "GPUs", "tokens/s of all", "efficiency", "difference", "share of base", "memory of a GPU"]
    return table(head, rows)


def profile_table(profiles: list[dict[str, Any]]) -> str:
    """Tabulate calls, the time of their kernels and the longest kernels; of equal calls the first one counts."""
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


def sizes_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate the sizes in use for every shape and kernel, and the fastest ones of the search, of the first run."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        of_run: dict[tuple, list[dict[str, Any]]] = {}
        for row in run["rows"]:
            of_run.setdefault(tuple(row[name] for name in ("gates", "shape", "kernel", "length")), []).append(row)
        groups = of_run | groups
    names = ("rows", "keys", "warps", "stages", "registers")

    def written(row: dict[str, Any]) -> list[str]:
        numbers = (str(row[name]) if row[name] else "any" for name in names)
        return [" x ".join(numbers), short(row["median_ms"])]

    rows = []
    for (gates, shape, kernel, length), found in sorted(groups.items()):
        used = next(row for row in found if row["in_use"])
        best = min(found, key=lambda row: row["median_ms"])
        ratio = f"{used['median_ms'] / best['median_ms']:.2f}"
        rows.append([shape, gates, kernel, f"{length:,}", *written(used), *written(best), ratio])
    return table(["heads x size", "gates", "kernel", "tokens", "in use", "ms", "fastest", "ms", "ratio"], rows)


def shapes_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate runs of `attention_kernels.py` for several shapes: hard gates beside a window and dense attention.

    A length of a shape is that of the first run which has it.
    """
    names = ("sparsek hard", "flex window", "sdpa cudnn")
    found: dict[tuple[int, int, int], dict[int, list[str]]] = {}
    for run in runs:
        of_shape = found.setdefault(tuple(run["settings"][name] for name in ("query_heads", "kv_heads", "dim")), {})
        times = {which: medians(run, which) for which in PASSES}
        for length in {row["length"] for row in run["rows"]} - of_shape.keys():
            cells = of_shape[length] = []
            for of_pass in times.values():
                ours, window, dense = (of_pass.get(name, {}).get(length) for name in names)
                cells += [short(value) for value in (ours, window, dense)]
                cells.append(short(ours / window if ours and window else None))
            cells.append(run["commit"][:7])
    rows = [
        [f"{heads}/{kv_heads} x {dim}", f"{length:,}", *cells]
        for (heads, kv_heads, dim), of_shape in sorted(found.items())
        for length, cells in sorted(of_shape.items())
    ]
    head = ["SparseK", "window", "cuDNN", "SparseK / window"]
    return table(
        [
            "heads x size",
            "tokens",
            *(f"{name}, {PASSES[which].lower()}" for which in PASSES for name in head),
            "commit",
        ],
        rows,
    )


def first_tokens_table(generate: dict[str, Any], before: Sequence[dict[str, Any]]) -> str:
    """Tabulate the milliseconds to the first token, and what earlier runs had."""
    earlier: dict[tuple, dict[str, Any]] = {}
    for row in (row for run in before for row in run["rows"]):
        earlier.setdefault((row["shape"], row["prompt"], row["batch"]), row)
    rows = []
    for row in generate["rows"]:
        cell = (row["shape"], row["prompt"], row["batch"])
        dense, sparse = (row[name]["first_token_ms"] for name in ("dense", "sparse"))
        old = earlier.get(cell)
        ratio = old["dense"]["first_token_ms"] / old["sparse"]["first_token_ms"] if old else None
        rows.append(
            [f"{cell[0]}, {cell[1]:,} x {cell[2]}", short(dense), short(sparse), f"{dense / sparse:.2f}", short(ratio)]
        )
    return table(["first token, ms: shape, prompt x batch", "dense", "sparse", "times as fast", "before"], rows)


def prefill_call_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate runs of `prefill.py`: milliseconds and ratios of the calls, prompts played, and kernels of a forward.

    A cell is that of the first run which has it; earlier runs played no prompt.
    """
    rows = []
    every = [row | {"commit": run["commit"][:7]} for run in runs for row in run["rows"]]
    shapes = list(dict.fromkeys(row["shape"] for row in every))
    for row in sorted(firsts(every, "shape", "prompt"), key=lambda row: (shapes.index(row["shape"]), row["prompt"])):
        cells = [f"{row['shape']}, {row['prompt']:,}"]
        for call in ("forward", "generate"):
            dense, sparse = row[call]["dense_ms"], row[call]["sparse_ms"]
            cells += [short(dense), short(sparse), f"{row[call]['ratio']:.2f}"]
        cells.append(f"{row['varied']['ratio']:.2f}" if "varied" in row else "-")
        generate = row["generate"]
        cells.append(f"{generate['played']} of {generate['calls']}" if "played" in generate else "-")
        profile = [row["profile"][name] for name in ("dense", "sparse")]
        cells.append(" / ".join(short(one["kernels_ms"]) for one in profile))
        rows.append([*cells, " / ".join(f"{one['launches']:,}" for one in profile), row["commit"]])
    calls = [f"{name}, {what}" for name in ("forward", "first token") for what in ("dense", "sparse", "times as fast")]
    calls += ["first token, varied lengths, times as fast", "prompts played"]
    return table(["ms: shape, prompt", *calls, "kernels, dense / sparse", "launches, dense / sparse", "commit"], rows)


def first_call_table(first_calls: dict[str, Any]) -> str:
    """Tabulate the seconds of the first length, and the longest first call of another length."""
    rows = []
    for row in first_calls["rows"]:
        first, *others = row["calls"].values()
        later = [seconds for call in others for name, seconds in call.items() if name != "again_s"]
        both = first.get("forward_backward_s")
        cells = (first["forward_s"], both, both and first["forward_s"] + both, max(later, default=None))
        rows.append([row["family"], str(row["cores"]), *map(short, cells)])
    head = ["family, seconds", "cores", "first forward", "first with backward after it", "both", "another length"]
    return table(head, rows)


def recorded_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate the milliseconds of a step by recorded steps and by `generate`, and shares of the roofline.

    Each row names the commit of its run. Where a round took no time, its shorter call had compiled something, and
    there is no number.
    """
    names = ("dense", "sparse", "recorded", "recorded compiled")
    rows = []
    for recorded in runs:
        for row in recorded["rows"]:
            measured = {name: row[name] for name in names if name in row and min(row[name]["steps_ms"]) > 0}
            times = {name: steps["step_ms"] for name, steps in measured.items()}
            fastest = min(time for name, time in times.items() if name.startswith("recorded"))
            dense = times.get("dense")
            ratios = [
                None if dense is None or time is None else dense / time for time in (times.get("recorded"), fastest)
            ]
            share = f"{row['ideal_ms'] / fastest:.0%}"
            cells = [*(short(times.get(name)) for name in names), *map(short, ratios), share]
            rows.append([f"{row['shape']}, {row['prompt']:,} x {row['batch']}, {recorded['commit'][:7]}", *cells])
    head = ["shape, prompt x batch", "dense, ms", "sparse, ms", "recorded, ms", "recorded, compiled, ms"]
    return table([*head, "dense / recorded", "dense / fastest", "fastest, of the roofline"], rows)


def products_table(products: dict[str, Any]) -> str:
    """Tabulate the microseconds of products that share an input: by cuBLAS, in one kernel, and its share of a copy."""
    batches = sorted({row["rows"] for row in products["rows"]})
    cells: dict[str, dict[int, str]] = {}
    for row in products["rows"]:
        told = f"{short(row['cublas_us'])} / {short(row['kernel_us'])}, {row['kernel_share']:.0%}"
        cells.setdefault(f"{row['shape']}, {row['product']}", {})[row["rows"]] = told
    head = ["cuBLAS / kernel, us, of a copy", *(f"batch {batch}" for batch in batches)]
    return table(head, [[name, *(of.get(batch, "-") for batch in batches)] for name, of in cells.items()])


def product_sizes_table(searched: dict[str, Any]) -> str:
    """Tabulate the fastest sizes of the kernel of products, and what those in use cost when the search ran."""
    rows = []
    for row in searched["rows"]:
        best = row["search"][0]
        sizes = " x ".join(str(best[name]) for name in ("outputs", "columns", "parts", "warps", "stages"))
        cells = [" x ".join(map(str, row["sizes"])), short(row["kernel_us"]), sizes, short(best["us"])]
        ratio = f"{row['kernel_us'] / best['us']:.2f}"
        rows.append([f"{row['shape']}, {row['product']}, batch {row['rows']}", *cells, ratio])
    return table(["product", "in use", "us", "fastest", "us", "ratio"], rows)


def first_static_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate the seconds of the first calls of compiled or recorded decoding, and the graphs that were compiled.

    Each row names the commit of its run. A process that was cut has no numbers for the calls that it did not end.
    """
    rows = []
    for first_static in runs:
        for row in first_static["rows"]:
            prompt, first, longer, again = (row["calls_s"].get(n) for n in ("prompt", "first", "longer", "again"))
            both = prompt + first if prompt and first else None
            seconds = [prompt, first, both, longer, again, max(row.get("lengths_s", {}).values(), default=None)]
            name = f"{row['way']}, {first_static['commit'][:7]}"
            rows.append([name, *map(short, seconds), str(row["graphs"]), str(row.get("more_graphs", "-"))])
    head = ["seconds", "prompt alone", "call after it, 8 tokens", "both", "first of 64 tokens", "again"]
    return table([*head, "slowest of 10 lengths", "graphs", "more for 10 lengths"], rows)


def head_shares_table(run: dict[str, Any]) -> str:
    """Tabulate heads with different numbers of slots beside equal ones, of a run of `head_shares.py`."""
    cells = []
    for row in run["rows"]:
        for what in ("recorded", "eager"):
            steps = [row[f"{name}, {what}"]["step_ms"] for name in ("equal", "by heads")]
            cells.append((row, f"x {row['batch']}", f"step, {what}", steps))
        first = [row["first_token_ms"][name] for name in ("equal", "by heads")]
        cells.append((row, f"x {row['batch']}", "first token", first))
    for row in run["training"]:
        steps = [row[f"{name}, training"] for name in ("equal", "by heads")]
        cells.append((row | {"prompt": row["tokens"]}, "", "training step", steps))
    rows = [
        [
            " ".join(f"{row['shape']}, {row['prompt']:,} {batch}".split()),
            what,
            *map(short, times),
            f"{times[0] / times[1]:.2f}",
        ]
        for row, batch, what, times in cells
    ]
    return table(["shape, tokens x batch", "what", "equal, ms", "by heads, ms", "equal / by heads"], rows)


def joined_generate(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the first run of default `generate` with the cells of later runs, each row with the commit of its run."""
    rows = [row | {"commit": run["commit"]} for run in runs for row in run["rows"]]
    return runs[0] | {"rows": firsts(rows, "shape", "prompt", "batch")}


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
        calls = [row[name].get("call_ms") for name in ("dense", "sparse")]
        whole = calls[0] / calls[1] if all(calls) else None
        times = [f"{value:.2f}" if value else "-" for value in (unseen[cell], again[cell], whole, earlier.get(cell))]
        rows.append([f"{cell[0]}, {cell[1]:,} x {cell[2]}", *map(short, steps), *times, first, row["commit"][:7]])
    head = ["shape, prompt x batch", "dense, unseen lengths", "sparse", "dense, lengths seen before", "sparse"]
    head += [
        "times as fast, unseen",
        "seen",
        "seen, whole call",
        "seen, before",
        "first token, ms: dense / sparse",
        "commit",
    ]
    return table(head, rows)


def launches_table(generate: dict[str, Any], before: dict[str, Any]) -> str:
    """Tabulate the kernels that one decoding step launches; `before` is the run of an earlier commit."""
    earlier = {row["shape"]: row["profile"]["sparse"]["launches"] for row in before["rows"] if "profile" in row}
    rows = []
    for row in generate["rows"]:
        if "profile" in row:
            counts = [row["profile"][name]["launches"] for name in ("dense", "sparse")]
            rows.append(
                [row["shape"], *(f"{count:,}" if count else "-" for count in (*counts, earlier.get(row["shape"])))]
            )
    return table(["launches of a step", "dense", "sparse", "sparse, before"], rows)


def generate_summary(generate: dict[str, Any]) -> str:
    """Tabulate the smallest, median and largest ratio of all cells, for the README."""
    rows = []
    for label, call in (("lengths that the process has seen before", None), ("lengths it has not seen", 0)):
        found = sorted(ratios(generate, call).values())
        rows.append(
            [f"{label}, {len(found)} cells", *(f"{n:.2f}" for n in (found[0], found[len(found) // 2], found[-1]))]
        )
    return table(["sparse, times as fast as dense", "least", "median", "most"], rows)


def attention_summary(kernels: dict[str, Any]) -> str:
    """Tabulate a few lengths of the attention alone, for the README."""
    lengths = (16_384, 65_536, 131_072)
    times = [medians(kernels, which) for which in PASSES]
    rows = []
    for name in ("sparsek hard", "flex window", "sdpa cudnn"):
        cells = (" / ".join(short(found[name].get(n)) for found in times) for n in lengths)
        rows.append([KERNELS[name], *cells])
    return table(["ms: forward / forward and backward", *(f"{n:,} tokens" for n in lengths)], rows)


def decode_summary(model: dict[str, Any]) -> str:
    """Tabulate a few cells of decoding, for the README."""
    cells = {(r["variant"], r["context"], r["batch"]): r for r in model["rows"] if r["part"] == "decode"}
    pairs = ((16_384, 8), (32_768, 4), (131_072, 4))
    rows = []
    for variant in ("sparse", "static", "dynamic"):
        found = [cells.get((variant, *pair), {}) for pair in pairs]
        rows.append([CACHES[variant], *(short(cell.get("tokens_per_second")) for cell in found)])
    return table(["decoding, tokens/s", *(f"{n:,} x {batch}" for n, batch in pairs)], rows)


def entmax_table(runs: Sequence[dict[str, Any]], which: str) -> str:
    """Tabulate one pass of entmax over all keys: milliseconds inside a CUDA graph and, in brackets, from Python."""
    cells: dict[tuple[str, int], str] = {}
    for row in (row for run in runs for row in run["rows"] if row.get("pass") == which and "error" not in row):
        cell = f"{short(row['captured_ms'])} ({short(row['median_ms'])})"
        cells.setdefault((row["contender"], row["length"]), cell)
    lengths, measured = sorted({length for _, length in cells}), {contender for contender, _ in cells}
    rows = [
        [name, *(cells.get((contender, n), "-") for n in lengths)]
        for contender, name in ENTMAX.items()
        if contender in measured
    ]
    return table([f"{PASSES[which]}, ms", *(f"{n:,}" for n in lengths)], rows)


def entmax_setting_table(shapes: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Tabulate the shapes that entmax was measured with, and the support that the drawn queries and keys have."""
    rows = []
    for runs in shapes:
        settings, keys = runs[0]["settings"], runs[0]["supports"]["8192"]["keys_per_query"]
        worst = max(max(run["errors_against_float64"].values()) for run in runs)
        heads = f"{settings['query_heads']} / {settings['kv_heads']} x {settings['dim']}"
        spread = f"{sum(keys) / len(keys):.0f} ({min(keys):.0f} to {max(keys):.0f})"
        rows.append([heads, f"{settings['alpha']}", spread, f"{worst:.1e}"])
    head = ["query heads / KV heads x size", "alpha", "keys with weight at 8,192 tokens (by head)", "largest error"]
    return table(head, rows)


def entmax_model_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate milliseconds of a forward of a patched model, and how they compare with the dense one.

    A row is that of the first run that has it; variants that this one lacks are those of the next."""
    cells_of: dict[tuple[int, int], dict[str, Any]] = {}
    for row in (row for run in reversed(runs) for row in run["rows"]):
        key = (row["batch"], row["length"])
        cells_of[key] = {**cells_of.get(key, {}), **row}
    names = [name for name in ENTMAX_MODEL if any(name in row for row in cells_of.values())]
    compared = [name for name in ("full", "complete", "pooled") if name in names]
    rows = []
    for _, row in sorted(cells_of.items()):
        times = {name: row[name]["ms"] for name in names if name in row}
        ratios_of = [f"{times[name] / times['dense']:.2f}" if name in times else "-" for name in compared]
        rows.append([f"{row['length']:,} x {row['batch']}", *(short(times.get(name)) for name in names), *ratios_of])
    head = ["tokens x batch", *(ENTMAX_MODEL[name] for name in names), *(f"*{name} / dense*" for name in compared)]
    return table(head, rows)


def conversion_table(run: dict[str, Any]) -> str:
    """Tabulate where the seconds of a training run went, stage by stage; the rest is fitting and measuring."""
    settings, rows, total = run["settings"], [], 0.0
    tokens = settings["length"] * settings["batch_size"] * settings["gradient_accumulation_steps"]
    for stage in dict.fromkeys(row["stage"] for row in run["history"]):
        seconds = [tokens / row["tokens_per_second"] for row in run["history"] if row["stage"] == stage]
        total += sum(seconds)
        rows.append([f"`{stage}`", f"{len(seconds)}", f"{1e3 * median(seconds):.0f}", f"{sum(seconds):.0f}"])
    rows.append(["fitting the predictors, and measuring", "", "", f"{run['seconds'] - total:.0f}"])
    rows.append(["all", "", "", f"{run['seconds']:.0f}"])
    return table(["stage", "steps", "ms per step", "seconds"], rows)


def step_table(runs: Sequence[dict[str, Any]], calls: bool = False) -> str:
    """Tabulate steps of default `generate` with Sparsefinder, over all keys and over predicted graphs.

    With `calls`, whole calls with prompt and recording stand beside them."""
    rows = []
    for run in runs:
        settings = run["settings"]
        graph = "all keys" if settings["predictor"] == "full" else f"predicted, {settings['predictor']}"
        if settings.get("cluster_parts", 1) > 1:
            graph += f" in {settings['cluster_parts']} parts"
        for row in run["rows"]:
            cells = [f"{row['prompt']:,} x {row['batch']}", graph]
            for measured in ("step_ms", "call_ms") if calls else ("step_ms",):
                dense, sparse = (row[name][measured] for name in ("dense", "sparse"))
                cells += [short(dense), short(sparse), f"{dense / sparse:.2f}"]
            rows.append(cells)
    head = ["SmolLM2's shape, prompt x batch", "keys", "dense, ms", "Sparsefinder, ms", "times as fast"]
    return table([*head, *(["call, dense, ms", "Sparsefinder, ms", "times as fast"] if calls else [])], rows)


def static_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate compiled and captured steps in a static cache, dense and with Sparsefinder, and the bytes they read."""
    rows = []
    for run in runs:
        names = {"dense": "dense (SDPA)", "entmax": "entmax, all keys"}
        dense, *others = sorted(run["rows"], key=lambda row: row["attention"] != "dense")
        for row in (dense, *others):
            read = [f"{row['bytes_read'] / 1e9:.2f}", f"{row['bytes_read'] / dense['bytes_read']:.2f}"]
            speed = [f"{row['tokens_per_second']:.0f}", f"{row['tokens_per_second'] / dense['tokens_per_second']:.2f}"]
            name = names.get(row["attention"], f"entmax, {row.get('tiles')} predicted tiles of 8")
            name = f"{name}, {run['commit'][:7]}"
            rows.append([name, f"{run['settings']['layers']}", short(row["step_ms"]), *read, *speed])
    head = ["attention, commit", "layers", "ms per step", "GB read", "of dense", "tokens/s", "times as fast"]
    return table(head, rows)


def prediction_table(run: dict[str, Any], which: str) -> str:
    """Tabulate one pass over predicted tiles of the drawn texts: milliseconds in a CUDA graph and, in brackets, from
    Python."""
    lengths = sorted(text["length"] for name, text in run["texts"].items() if name.startswith("drawn "))
    cells: dict[tuple[str, int], str] = {}
    for row in run["rows"]:
        if row.get("pass") == which and row["text"].startswith("drawn "):
            captured = "-" if row["captured_ms"] is None else short(row["captured_ms"])
            cell = f"{captured} ({short(row['median_ms'])})"
            cells[_predicted_name(row), run["texts"][row["text"]]["length"]] = cell
    rows = [[name, *(cells.get((name, n), "-") for n in lengths)] for name in dict.fromkeys(name for name, _ in cells)]
    return table([f"{PASSES.get(which, 'Prediction alone')}, ms", *(f"{n:,}" for n in lengths)], rows)


def joined_texts(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


def _predicted_name(row: dict[str, Any]) -> str:
    count = row["choices"]
    if count is None:
        return ENTMAX[row["contender"]]
    if row["contender"] == "flex tiles":
        return f"FlexAttention, softmax over the tiles of {count} choices"
    return f"entmax, {count} choices of a query"


def entmax_ratio_table(run: dict[str, Any]) -> str:
    """Divide the time of entmax over all keys and over predicted tiles by that of others, in CUDA graphs.

    Texts that are layers of one model and length are one row: the sums of their times."""
    times: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
    for row in (row for row in run["rows"] if "error" not in row and row["captured_ms"] is not None):
        column, length = (_predicted_name(row), row["pass"]), run["texts"][row["text"]]["length"]
        cells = times.setdefault((row["text"].split(" layer ")[0].rsplit(" ", 1)[0], length), {})
        cells[column] = cells.get(column, 0.0) + row["captured_ms"]
    others = {"adasplash 2": "AdaSplash 2", "sdpa flash": "flash", "sdpa cudnn": "cuDNN"}
    rows = []
    for (text, length), cells in sorted(times.items()):
        for name in dict.fromkeys(name for name, _ in cells):
            if name == ENTMAX["entmax exact"] or name.endswith("choices of a query"):
                both = [(cells.get((name, p)), cells.get((ENTMAX[other], p))) for p in PASSES for other in others]
                ratios_of = [f"{ours / theirs:.2f}" if ours and theirs else "-" for ours, theirs in both]
                rows.append([text, f"{length:,}", name, *ratios_of])
    head = [f"{PASSES[which].lower()} / {other}" for which in PASSES for other in others.values()]
    return table(["queries and keys", "tokens", "ours", *head], rows)


def flash_ratio_table(run: dict[str, Any]) -> str:
    """Divide the time of entmax on drawn queries and keys by that of SDPA flash, in CUDA graphs, up to 32,768 tokens.

    A cell has the forward, and forward and backward."""
    times: dict[tuple[str, str], dict[int, float]] = {}
    for row in (row for row in run["rows"] if row["text"].startswith("drawn ") and row.get("captured_ms")):
        cells = times.setdefault((_predicted_name(row), row["pass"]), {})
        cells[run["texts"][row["text"]]["length"]] = row["captured_ms"]
    flash = {which: times[ENTMAX["sdpa flash"], which] for which in PASSES}
    lengths = sorted(length for length in flash["forward"] if length <= 32_768)
    rows = []
    for name, ours in (
        ("entmax over all keys (`complete=True`, with any adapter)", ENTMAX["entmax exact"]),
        ("entmax over tiles that `pooled` predicts, 4 choices of a query", "entmax, 4 choices of a query"),
    ):
        ratios = [[f"{times[ours, which][n] / flash[which][n]:.2f}" for which in PASSES] for n in lengths]
        rows.append([name, *(" / ".join(both) for both in ratios)])
    return table(["tokens", *(f"{length:,}" for length in lengths)], rows)


def bidirectional_table(runs: Sequence[dict[str, Any]], which: str) -> str:
    """Tabulate one pass without a causal mask, as encoders have it, and what entmax takes beside the others.

    Cells are those of `entmax_table`. A ratio to SDPA is of times in a CUDA graph, that to AdaSplash 1, which a graph
    cannot hold, of times as called from Python."""
    names = ("entmax exact", "adasplash 1", "sdpa flash", "sdpa cudnn")
    rows = []
    for run in runs:
        measured = [row for row in run["rows"] if row.get("pass") == which and "error" not in row]
        for length in sorted({row["length"] for row in measured}):
            of = {row["contender"]: row for row in measured if row["length"] == length}
            cells = [f"{short(of[n]['captured_ms'])} ({short(of[n]['median_ms'])})" if n in of else "-" for n in names]
            for other in names[1:]:
                column = "median_ms" if other == "adasplash 1" else "captured_ms"
                both = other in of and names[0] in of
                cells.append(f"{of[names[0]][column] / of[other][column]:.2f}" if both else "-")
            rows.append([f"{length:,} x {run['settings']['batch']}", *cells])
    head = ["entmax, ms", "AdaSplash 1", "SDPA flash", "SDPA cuDNN"]
    head += ["*entmax / AdaSplash 1*", "*/ flash*", "*/ cuDNN*"]
    return table([f"{PASSES[which]}: tokens x batch", *head], rows)


def bidirectional_tables(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the tables of attention without a causal mask, and of its errors."""
    return {
        "both directions": bidirectional_table(runs, "forward"),
        "both directions and backward": bidirectional_table(runs, "forward_backward"),
        "errors of both directions": other_error_table(runs[:1]),
    }


def flex_table(run: dict[str, Any]) -> str:
    """Tabulate entmax over predicted tiles, prediction included, beside softmax over the same tiles, in CUDA graphs."""
    cells: dict[tuple[str, int, str, str], float] = {}
    for row in (row for row in run["rows"] if "error" not in row and row["choices"] is not None):
        cells[row["text"], row["choices"], row["contender"], row["pass"]] = row["captured_ms"]
    rows = []
    for text, count in dict.fromkeys((text, count) for text, count, *_ in cells):
        columns: list[str] = []
        for which in PASSES:
            ours, flex = (cells.get((text, count, name, which)) for name in ("predicted", "flex tiles"))
            columns += [short(ours), short(flex), short(ours / flex if ours and flex else None)]
        rows.append([text, f"{run['texts'][text]['length']:,}", f"{count}", *columns])
    head = [f"{name}, {PASSES[which].lower()}" for which in PASSES for name in ("entmax", "FlexAttention", "ratio")]
    return table(["queries and keys", "tokens", "choices", *head], rows)


def other_error_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate the errors of entmax and AdaSplash against float64."""
    rows = []
    for run in runs:
        settings = run["settings"]
        shape = f"{settings['query_heads']} / {settings['kv_heads']} x {settings['dim']}"
        if settings.get("bidirectional"):
            shape += f", both directions, batch {settings['batch']}"
        ours = "entmax, tiles predicted" if run["benchmark"] == "entmax_prediction" else ENTMAX["entmax exact"]
        others = {ENTMAX[name]: errors for name, errors in run["errors_of_others"].items()}
        for name, errors in {ours: run["errors_against_float64"], **others}.items():
            if isinstance(errors, str):
                rows.append([shape, name, errors, "-"])
                continue
            gradients = max(value for key, value in errors.items() if key.startswith("d_"))
            rows.append([shape, name, f"{errors['output']:.1e}", f"{gradients:.1e}"])
    return table(["heads", "contender", "error of the output", "largest error of a gradient"], rows)


def predicted_text_table(run: dict[str, Any]) -> str:
    """Tabulate what predicted tiles hold in every text, and the forward of the contenders in a CUDA graph."""
    others = [ENTMAX[name] for name in ("entmax exact", "adasplash 2", "sdpa flash", "sdpa cudnn")]
    times = {
        (row["text"], _predicted_name(row)): short(row["captured_ms"])
        for row in run["rows"]
        if row.get("pass") == "forward"
    }
    rows = []
    for name, text in sorted(run["texts"].items(), key=lambda item: (item[0].split(" ")[0], item[1]["length"])):
        for count, held in text["predicted"].items():
            predicted = times.get((name, f"entmax, {count} choices of a query"), "-")
            cells = [f"{held['listed']:.0%}", f"{held['recall']:.1%}", predicted]
            rows.append([name, f"{text['length']:,}", count, f"{held['keys_per_query']:.0f}", *cells])
            rows[-1] += [times.get((name, other), "-") for other in others]
    head = ["queries and keys", "tokens", "choices", "keys with weight", "pairs listed", "mass held", "predicted, ms"]
    return table([*head, "all keys, ms", "AdaSplash 2, ms", "flash, ms", "cuDNN, ms"], rows)


def predicted_quality_table(runs: Sequence[dict[str, Any]]) -> str:
    """Tabulate the perplexity over predicted tiles beside that over all keys, with the standard error over chunks."""
    rows = []
    for run in runs:
        perplexity = {(row["length"], row["attention"]): row["perplexity"] for row in run["rows"]}
        predicted = [row for row in run["rows"] if row["attention"] == "predicted"]
        for row in sorted(predicted, key=lambda row: (row["length"], row["choices"], "exact_layers" in row)):
            length = row["length"]
            exact = ", ".join(map(str, row.get("exact_layers", ()))) or "none"
            cells = [f"{perplexity[length, name]:.2f}" for name in ("dense", "all keys")] + [f"{row['perplexity']:.2f}"]
            above = f"{row['above_all_keys']:+.2%}".replace("%", " %")
            error = f"{row['standard_error']:.2%}".replace("%", " %")
            model, adapter = (run["settings"][name] for name in ("model", "adapter"))
            name = adapter if adapter.startswith(model) else f"of {model}"
            rows.append([name, f"{length:,} x {row['chunks']}", f"{row['choices']}", exact])
            rows[-1] += [f"{row['tiles']:.1f}", f"{row['share_of_pairs']:.0%}", *cells, f"{above} ({error})"]
    head = ["adapter", "tokens x chunks", "choices", "layers over all keys", "tiles per list", "pairs listed"]
    head += ["dense", "entmax, all keys", "predicted", "above all keys"]
    return table(head, rows)


def machine_table(kernels: dict[str, Any], model: dict[str, Any]) -> str:
    """Tabulate the machine, the shape of the attention that was measured, and the check that came first."""
    versions, settings = kernels["versions"], kernels["settings"]
    worst = max(value for name, value in kernels["errors_against_float64"].items() if name != "tau")
    rows = [
        ["GPU", f"one {kernels['machine']['accelerator']}"],
        ["versions", ", ".join(f"{name} {versions[name]}" for name in ("torch", "cuda", "triton"))],
        ["copy of 4 GiB in its memory", f"{model['bandwidth'] / 1e12:.2f} TB/s"],
        ["query heads / KV heads x size", f"{settings['query_heads']} / {settings['kv_heads']} x {settings['dim']}"],
        ["batch", f"{settings['batch']}"],
        ["soft gates reach", f"{settings['support']:,} keys at most"],
        ["largest relative error against float64", f"{worst:.1e}"],
    ]
    return table(["of all runs, and of the attention", "value"], rows)


def settings_table(kernels: dict[str, Any], model: dict[str, Any], generate: dict[str, Any]) -> str:
    """Tabulate the sizes that each benchmark ran with."""
    rows = []
    for name, run in (("attention", kernels), ("whole models", model), ("default `generate`", generate)):
        settings = run["settings"]
        sizes = [settings[key] for key in ("k", "window", "sinks")]
        rows.append(
            [name, *(f"{n:,}" for n in (*sizes, sum(sizes))), settings["dtype"], run["versions"]["transformers"]]
        )
    return table(["benchmark", "k", "window", "sinks", "keys of a query", "dtype", "transformers"], rows)


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """Tabulate seconds per chunk of the forward of every contender, in the short and in the general way."""
    cells = {(row["contender"], row["general"]): row["seconds_per_chunk"] for row in evaluation["rows"]}
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(short_of_seconds(cells.get((name, general))) for general in (False, True))] for name in names]
    return table(["contender, seconds per chunk", "now", "general way, a chunk at a time"], rows)


def short_of_seconds(value: float | None) -> str:
    """Write seconds with three decimals below a second, and a dash for None."""
    return f"{value:.3f}" if value is not None and value < 1 else short(value)


def evaluation_summary(evaluation: dict[str, Any]) -> str:
    """Tabulate the duration of one whole call of `evaluate`, and what it measured."""
    settings, whole = evaluation["settings"], evaluation["whole"]
    text = f"{settings['chunks']} of {settings['length']:,}"
    cells = [text, f"{whole['budgets']}", f"{whole['batch']}", short(whole["seconds"])]
    shape = f"{settings['shape']}, {settings['layers']} layers, one {evaluation['machine']['accelerator']}"
    return table(["model", "chunks", "budgets", "chunks at a time", "seconds"], [[shape, *cells]])


def cpu_table(now: dict[str, Any], before: dict[str, Any]) -> str:
    """Tabulate milliseconds of a step of default `generate` on a CPU, and ratios now and before."""
    earlier, again = ratios(before), ratios(now)
    rows = []
    for row in now["rows"]:
        cell = (row["shape"], row["prompt"], row["batch"])
        steps = [short(row[name]["step_ms"]) for name in ("dense", "sparse")]
        times = [f"{value:.2f}" if value else "-" for value in (again[cell], earlier.get(cell))]
        rows.append([f"{cell[0]}, {cell[1]:,} x {cell[2]}", *steps, *times])
    return table(["shape, prompt x batch", "dense, ms", "sparse, ms", "times as fast", "before"], rows)


def busy_table(busy: dict[str, Any]) -> str:
    """Tabulate seconds of a training step by setting and number of competing processes."""
    cells = {(row["setting"], row["competing"]): row["step_s"] for row in busy["rows"]}
    numbers = sorted({number for _, number in cells})
    rows = [
        [name, *(short(cells.get((name, number))) for number in numbers)] for name in dict.fromkeys(n for n, _ in cells)
    ]
    return table(["seconds of a step, beside other processes", *map(str, numbers)], rows)


def all_tables(
    *,
    kernels: dict[str, Any],
    wider: dict[str, Any],
    model: dict[str, Any],
    profiles: list[dict[str, Any]],
    first_calls: dict[str, Any],
    sizes: Sequence[dict[str, Any]],
    generate: Sequence[dict[str, Any]],
    entmax: Sequence[Sequence[dict[str, Any]]],
    evaluation: dict[str, Any],
    cpu: Sequence[dict[str, Any]],
    busy: dict[str, Any],
    entmax_model: Sequence[dict[str, Any]],
    conversion: dict[str, Any],
    steps: Sequence[dict[str, Any]],
    recorded_steps: Sequence[dict[str, Any]],
    shapes: Sequence[dict[str, Any]],
    first_tokens: dict[str, Any],
    recorded: Sequence[dict[str, Any]],
    first_static: Sequence[dict[str, Any]],
    static: Sequence[dict[str, Any]],
    prefills: Sequence[dict[str, Any]],
    entmax_prefills: Sequence[dict[str, Any]],
    prediction: Sequence[dict[str, Any]],
    quality: Sequence[dict[str, Any]] = (),
    bidirectional: Sequence[dict[str, Any]] = (),
    flex: Sequence[dict[str, Any]] = (),
    lengths: dict[str, Any] | None = None,
    float8: dict[str, Any] | None = None,
    gpus: Sequence[dict[str, Any]] = (),
    teachers: Sequence[dict[str, Any]] = (),
    products: dict[str, Any] | None = None,
    product_sizes: dict[str, Any] | None = None,
    head_shares: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Return every table by the name that documents call it.

    `wider` is a run of the kernels with soft gates over a larger support; `generate` and `cpu` hold two runs of
    generate.py each, now and before; `entmax` holds the runs of each of two shapes, of which the first counts;
    `entmax_model` holds runs of whole models, `conversion` the finetune.json of a training run, `steps` holds runs of
    default generate with Sparsefinder whose steps ran, `recorded_steps` such whose steps were recorded, `shapes` one
    run of the kernels for each shape, `first_tokens` is a run of `generate.py` for short prompts, `prefills` are runs
    of `prefill.py`, `recorded` and `first_static` are runs of the scripts of these names, `static` holds runs of
    `static_decode.py`, `prediction` runs of predicted tiles, see `joined_texts`; `quality` holds runs of what predicted
    tiles cost in perplexity, `bidirectional` runs of entmax_kernels.py without a causal mask, `flex` runs of
    predicted tiles beside FlexAttention, `lengths` is one of `finetune_length.py`, `float8` one of it in two
    precisions, `gpus` runs of `several_gpus.py`, `teachers` holds runs of both parts of
    `finetune_teacher.py`, `products` and `product_sizes` are runs of `products.py`, without and with `--search`, and
    `head_shares` is one of `head_shares.py`."""
    spread = [[label, f"{model['spread'][name]:.0%}"] for name, label in CACHES.items()]
    return {
        "machine": machine_table(kernels, model),
        "settings": settings_table(kernels, model, generate[0]),
        "forward": kernel_table(kernels, "forward"),
        "forward and backward": kernel_table(kernels, "forward_backward"),
        "larger support": wider_table(wider),
        "decoding": decode_table(model),
        "spread": table(["decoding step", "largest difference between two runs"], spread),
        "prefill": long_table(model, "prefill", {"dense": "dense (SDPA)", "sparse": "sparse"}),
        "training": long_table(model, "train", {"scorers": "training step", "dense teacher": "dense teacher, of it"}),
        "generate": generate_table(*generate),
        "launches": launches_table(*generate),
        "profiles": profile_table(profiles),
        "sizes": sizes_table(sizes),
        "shapes": shapes_table(shapes),
        "first tokens": first_tokens_table(first_tokens, generate[1:]),
        "prefill calls": prefill_call_table(prefills),
        "entmax prefill calls": prefill_call_table(entmax_prefills),
        "first calls": first_call_table(first_calls),
        "entmax settings": entmax_setting_table(entmax),
        "entmax forward": entmax_table(entmax[0], "forward"),
        "entmax forward and backward": entmax_table(entmax[0], "forward_backward"),
        "entmax forward of large heads": entmax_table(entmax[1], "forward"),
        "entmax forward and backward of large heads": entmax_table(entmax[1], "forward_backward"),
        "entmax models": entmax_model_table(entmax_model),
        "conversion": conversion_table(conversion),
        "entmax steps": step_table(steps),
        "recorded entmax steps": step_table(recorded_steps, calls=True),
        "compiled entmax steps": static_table(static),
        "attention summary": attention_summary(kernels),
        "decoding summary": decode_summary(model),
        "generate summary": generate_summary(generate[0]),
        "recorded": recorded_table(recorded),
        "first static": first_static_table(first_static),
        "evaluation": evaluation_summary(evaluation),
        "evaluation by contender": evaluation_table(evaluation),
        "generate on a cpu": cpu_table(*cpu),
        "busy cpu": busy_table(busy),
        "prediction": prediction_table(joined_texts(prediction), "forward"),
        "prediction forward and backward": prediction_table(joined_texts(prediction), "forward_backward"),
        "prediction alone": prediction_table(joined_texts(prediction), "prediction"),
        "predicted texts": predicted_text_table(joined_texts(prediction)),
        "entmax ratios": entmax_ratio_table(joined_texts(prediction)),
        "entmax beside flash": flash_ratio_table(joined_texts(prediction)),
        "errors of entmax": other_error_table([run for run in prediction if "errors_of_others" in run][-1:]),
        **({"predicted quality": predicted_quality_table(quality)} if quality else {}),
        **({"flex tiles": flex_table(joined_texts(flex))} if flex else {}),
        **({"lengths": length_table(lengths)} if lengths else {}),
        **({"fp8": float8_table(float8)} if float8 else {}),
        **({"several gpus": gpus_table(gpus)} if gpus else {}),
        **(teachers_tables(teachers) if teachers else {}),
        **({"products": products_table(products)} if products else {}),
        **({"product sizes": product_sizes_table(product_sizes)} if product_sizes else {}),
        **({"head shares": head_shares_table(head_shares)} if head_shares else {}),
        **(bidirectional_tables(bidirectional) if bidirectional else {}),
    }


def fill(text: str, tables: dict[str, str]) -> str:
    """Return a document with the marked tables replaced; a name that `tables` does not hold is a KeyError.

    Marks with names in any other form, such as those of `benchmarks/learning`, are left alone."""
    place = re.compile(r"(<!-- table: ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}{tables[found[2]]}{found[3]}", text)


def draw(kernels: dict[str, Any], path: Path) -> None:
    """Draw the time of the forward, and of forward and backward, over the length."""
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
    parser.add_argument("--wider", type=Path, required=True, help="JSON of the kernels with a larger support")
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--profiles", type=Path, nargs="+", required=True)
    parser.add_argument("--first-calls", type=Path, required=True)
    parser.add_argument("--sizes", type=Path, nargs="+", required=True, help="JSON of searches for sizes of programs")
    parser.add_argument("--generate", type=Path, nargs="+", required=True, help="JSON of default generate")
    parser.add_argument("--generate-before", type=Path, required=True, help="the same before steps were recorded")
    parser.add_argument("--shapes", type=Path, nargs="+", required=True, help="JSON of the kernels, one per shape")
    parser.add_argument("--first-tokens", type=Path, required=True, help="JSON of default generate, short prompts")
    parser.add_argument("--prefills", type=Path, nargs="+", required=True, help="JSON of prefill.py")
    parser.add_argument(
        "--entmax-prefills", type=Path, nargs="+", required=True, help="JSON of prefill.py --method sparsefinder"
    )
    parser.add_argument(
        "--entmax", type=Path, nargs="+", action="append", required=True, help="JSON of entmax_kernels.py, per shape"
    )
    parser.add_argument("--recorded", type=Path, nargs="+", required=True, help="JSON of recorded.py")
    parser.add_argument("--first-static", type=Path, nargs="+", required=True, help="JSON of first_static.py")
    parser.add_argument("--evaluation", type=Path, required=True, help="JSON of evaluation.py")
    parser.add_argument("--cpu", type=Path, nargs=2, required=True, help="JSON of generate.py on a CPU, now and before")
    parser.add_argument("--busy", type=Path, required=True, help="JSON of busy.py")
    parser.add_argument("--entmax-model", type=Path, nargs="+", required=True, help="JSON of entmax_model.py")
    parser.add_argument("--conversion", type=Path, required=True, help="finetune.json of a Sparsefinder adapter")
    parser.add_argument("--steps", type=Path, nargs="+", required=True, help="JSON of default generate, Sparsefinder")
    parser.add_argument(
        "--recorded-steps", type=Path, nargs="+", required=True, help="JSON of default generate, steps recorded"
    )
    parser.add_argument("--prediction", type=Path, nargs="+", required=True, help="JSON of entmax_prediction.py")
    parser.add_argument("--static", type=Path, nargs="+", required=True, help="JSON of static_decode.py")
    parser.add_argument("--quality", type=Path, nargs="+", default=[], help="JSON of predicted_quality.py")
    parser.add_argument("--bidirectional", type=Path, nargs="+", default=[], help="JSON of entmax_kernels.py")
    parser.add_argument("--lengths", type=Path, help="JSON of finetune_length.py")
    parser.add_argument("--float8", type=Path, help="JSON of finetune_length.py in two precisions")
    parser.add_argument("--gpus", type=Path, nargs="+", default=[], help="JSON of several_gpus.py")
    parser.add_argument("--teachers", type=Path, nargs="+", default=[], help="JSON of finetune_teacher.py, per run")
    parser.add_argument("--products", type=Path, help="JSON of products.py")
    parser.add_argument("--product-sizes", type=Path, help="JSON of products.py --search")
    parser.add_argument("--head-shares", type=Path, help="JSON of head_shares.py")
    parser.add_argument(
        "--flex", type=Path, nargs="+", default=[], help="JSON of entmax_prediction.py beside FlexAttention"
    )
    parser.add_argument(
        "--fill", type=Path, nargs="*", default=[], help="Markdown files whose marked tables are replaced"
    )
    parser.add_argument("--figure", type=Path, help="the PNG to write")
    options = parser.parse_args()

    def read(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text("utf-8"))

    kernels, model = joined_kernels(list(map(read, options.kernels))), joined(list(map(read, options.model)))
    profiles = list(map(read, options.profiles))
    generate = [joined_generate(list(map(read, options.generate))), read(options.generate_before)]
    wider, first_calls, sizes = read(options.wider), read(options.first_calls), list(map(read, options.sizes))
    entmax = [list(map(read, paths)) for paths in options.entmax]
    tables = all_tables(
        kernels=kernels,
        wider=wider,
        model=model,
        profiles=profiles,
        first_calls=first_calls,
        sizes=sizes,
        generate=generate,
        entmax=entmax,
        evaluation=read(options.evaluation),
        cpu=list(map(read, options.cpu)),
        busy=read(options.busy),
        entmax_model=list(map(read, options.entmax_model)),
        conversion=read(options.conversion),
        steps=list(map(read, options.steps)),
        recorded_steps=list(map(read, options.recorded_steps)),
        shapes=list(map(read, options.shapes)),
        first_tokens=read(options.first_tokens),
        recorded=list(map(read, options.recorded)),
        first_static=list(map(read, options.first_static)),
        static=list(map(read, options.static)),
        prefills=list(map(read, options.prefills)),
        entmax_prefills=list(map(read, options.entmax_prefills)),
        prediction=list(map(read, options.prediction)),
        quality=list(map(read, options.quality)),
        bidirectional=list(map(read, options.bidirectional)),
        flex=list(map(read, options.flex)),
        lengths=read(options.lengths) if options.lengths else None,
        float8=read(options.float8) if options.float8 else None,
        gpus=[read(path) for path in options.gpus],
        teachers=list(map(read, options.teachers)),
        products=read(options.products) if options.products else None,
        product_sizes=read(options.product_sizes) if options.product_sizes else None,
        head_shares=read(options.head_shares) if options.head_shares else None,
    )
    if options.figure:
        draw(kernels, options.figure)
    for document in options.fill:
        write_text(document, fill(document.read_text("utf-8"), tables))
    if not options.fill:
        print("\n".join(f"{name}:\n\n{text}" for name, text in tables.items()))


if __name__ == "__main__":
    main()
