"""What makes a better scorer: trains one per setting and seed, and measures each on text that training never saw.

    python benchmarks/learning/sweep.py --output runs.jsonl
    python benchmarks/learning/sweep.py --output runs.jsonl --table docs/experiments.md

Without more it reads the bundled checkpoint and text. With `--model` and `--text`, a causal language model and a text
file of which `--train` and `--held-out` are slices of chunks. The base is loaded once and stays frozen. Every run
appends one line of JSON; a run that the file holds already is not repeated, and one that was stopped goes on from its
last checkpoint, beside the file. Perplexity and divergence (KL from dense, nats per token) are those of hard selection.
"""

import argparse
import json
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from settings import RECIPES, SETTINGS, Recipe, Setting
from table import write_table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseKConfig
from hf_sparse.adapters.repo import write_repo
from hf_sparse.base_model import resolve_base
from hf_sparse.data import fingerprint, pack, read_text, select_chunks
from hf_sparse.demo.text import documents
from hf_sparse.environment import describe
from hf_sparse.evaluation import budget_of, compare
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.workflow import save_adapter

BASELINES = ("dense", "recency")


def main() -> None:
    arguments = _arguments()
    if arguments.table:
        write_table(read_lines(arguments.output), arguments.table)
        return
    recipe = RECIPES[arguments.recipe or ("demo" if arguments.model == "demo" else "default")]
    model, tokenizer = load(arguments.model, arguments.device, arguments.dtype)
    training, held_out = texts(tokenizer, recipe, arguments)
    slots = arguments.slots or recipe.evaluation_slots
    found = read_lines(arguments.output)
    names = arguments.only or [*BASELINES, *SETTINGS]
    if arguments.shares:
        shares = json.loads(arguments.shares.read_text())["shares"]
        SETTINGS["shares"] = Setting("slots divided among the layers", {"layer_shares": shares})
    unknown = [part for name in names for part in name.split("+") if part not in (*BASELINES, *SETTINGS)]
    if unknown:
        sys.exit(f"no setting {', '.join(unknown)}; there are {', '.join([*BASELINES, *SETTINGS])}")
    for seed in arguments.seeds:  # all settings with one seed before the next: a stopped sweep compares them all
        for name in names:
            identity = {
                "model": Path(arguments.model).name,
                "name": name,
                "seed": seed,
                "settings": _settings(recipe, name, seed, arguments.steps),
                "training_sha256": fingerprint(training),
                "held_out_sha256": fingerprint(held_out),
            }
            if name not in ("recipe", *BASELINES) and _same_run(recipe, name):
                continue
            if name in BASELINES:
                if seed != arguments.seeds[0]:
                    continue
                identity = {**identity, "seed": None, "settings": {}, "training_sha256": None}
            before = [line for line in found if all(line[key] == identity[key] for key in ("model", "name", "seed"))]
            if before:
                changed = [key for key, value in identity.items() if before[0][key] != value]
                if changed:
                    sys.exit(
                        f"{arguments.output} holds {name} (seed {seed}) with other {', '.join(changed)}: use another "
                        "--output, or delete that line"
                    )
                continue
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            line = {**identity, **run(model, recipe, name, identity["settings"], training, held_out, slots, arguments)}
            found.append(line)
            with arguments.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if name not in BASELINES:
                shutil.rmtree(_partial(arguments.output, name, identity["settings"]))


def run(
    base: Any,
    recipe: Recipe,
    name: str,
    settings: dict[str, Any],
    training: Tensor,
    held_out: Tensor,
    slots: list[int],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Train and measure one setting, and leave the base as it was."""
    config = SparseKConfig(**settings.get("adapter", recipe.adapter))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.get("training", {}).get("seed", 0))
        model = get_peft_model(base, config)
    result: dict[str, Any] = {}
    try:
        if name not in BASELINES:
            options = {"progress": False, "cpu": arguments.device == "cpu", "resume": True, "checkpoint_every": 20}
            options["output_dir"] = str(_partial(arguments.output, name, settings))
            chunks = training.reshape(-1, settings["length"])
            if arguments.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            metrics = finetune(model, chunks, FinetuneConfig(**settings["training"], **options))
            history = [row for row in metrics["history"] if row["stage"] == metrics["objective"]]
            tail = history[-max(1, len(history) // 10) :]
            result = {
                "seconds": metrics["seconds"],
                "tokens": metrics["tokens"],
                "parameters": metrics["trainable_parameters"],
                "lora_parameters": metrics["lora_parameters"],
                "first_loss": history[0]["loss"],
                "last_loss": sum(row["loss"] for row in tail) / len(tail),
                "support": next((row["support"] for row in reversed(history) if "support" in row), None),
                "peak_memory_bytes": metrics.get("peak_memory_bytes"),
            }
            if arguments.adapters:
                model.active_peft_config.base_model_name_or_path = arguments.model
                save_adapter(model, arguments.adapters / name)
                write_repo(arguments.adapters / name, training=metrics)
        model.eval()
        began = time.perf_counter()
        runs = {str(n): (budget_of(model).resized(n), name if name in BASELINES else "learned") for n in slots}
        losses = compare(model, held_out, list(runs.values()), batch_size=arguments.batch_size)
        result["quality"] = {
            n: {"perplexity": losses[run].perplexity, "divergence": losses[run].mean_divergence}
            for n, run in runs.items()
        }
        result["evaluation_seconds"] = time.perf_counter() - began
    finally:
        model.unload()
    return {**result, **describe()}


def load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    source = resolve_base(name)
    options = {"trust_remote_code": False, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **options)
    return model.to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def texts(tokenizer: Any, recipe: Recipe, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training chunks `[N, recipe.length]` and held-out chunks `[M, recipe.evaluation_length]`."""
    if arguments.text is None:
        training = pack(tokenizer, "\n\n".join(islice(documents("train"), 0, None, 8)), recipe.length)
        held_out = pack(tokenizer, "\n\n".join(documents("held_out")), recipe.evaluation_length)
        return training, held_out[:: max(1, len(held_out) // 8)][:8]
    text = read_text(arguments.text)
    training, held_out = (pack(tokenizer, text, n) for n in (recipe.length, recipe.evaluation_length))
    return select_chunks(training, arguments.train), select_chunks(held_out, arguments.held_out)


def _settings(recipe: Recipe, name: str, seed: int, steps: int | None) -> dict[str, Any]:
    """What determines a run, in full."""
    adapter, training, length = {**recipe.adapter}, {**recipe.training, "seed": seed}, recipe.length
    if steps is not None:
        training["steps"] = steps
    for part in name.split("+"):
        setting = SETTINGS.get(part, Setting(""))
        adapter |= setting.adapter
        training |= setting.training
        training["learning_rate"] *= setting.rate
        training["batch_size"] *= setting.shorter
        training["steps"] *= setting.longer
        length //= setting.shorter
    return {"adapter": adapter, "training": training, "length": length}


def _same_run(recipe: Recipe, name: str) -> bool:
    """Whether a setting changes nothing of this recipe."""
    return _settings(recipe, name, 0, None) == _settings(recipe, "recipe", 0, None)


def _partial(output: Path, name: str, settings: dict[str, Any]) -> Path:
    """Where a run keeps its checkpoints until its line is written."""
    return output.with_suffix(".partial") / f"{name}-{settings['training']['seed']}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--model", default="demo", help="folder or id of a causal language model, or 'demo'")
    parser.add_argument("--text", type=Path, help="text file; the bundled text without it")
    parser.add_argument("--train", default="0:110", help="chunks START:STOP of the text")
    parser.add_argument("--held-out", default="110:130", help="chunks START:STOP of the text")
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="what the settings change")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings; all without it; A+B is both")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--slots", nargs="+", type=int, help="budgets of the evaluation")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--batch-size", type=int, default=4, help="of the evaluation")
    parser.add_argument("--shares", type=Path, metavar="FILE", help="what shares.py wrote; adds the setting 'shares'")
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="keep each trained adapter in DIR/NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the tables into FILE, and run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
