"""Ask scorers trained on plain text, or on text with hidden facts, what they keep for questions and long answers.

    python benchmarks/retrieval.py --model MODEL --text TEXT --chunks :62 --held-out 62:66 --output retrieval.json

A run trains new scorers with `finetune` on chunks of which `--runs` says the share with facts and questions, or goes on
with the scorers of the run before on longer chunks (`LENGTHxSTEPS`). Every run is asked the tasks (`--tasks`, whose
wordings are not those of the training), is measured on held-out chunks, and follows traces with the prompt kept
(`--traces`). Selections without training are measured once, with as many slots; with the prompt kept, `random` is
"prompt kept, the rest at random". The JSON is written after each measurement.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import current_commit  # beside this file
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseKConfig
from hf_sparse.atomic_files import write_json
from hf_sparse.core.overrides import override
from hf_sparse.data import pack, read_text, select_chunks
from hf_sparse.environment import describe
from hf_sparse.evaluation import compare
from hf_sparse.evaluation.tasks import run_task
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.methods.sparsek.evaluation.contenders import at_budget, budget_of, sparsek_layers
from hf_sparse.retrieval import hide_facts


def train(model: Any, tokenizer: Any, text: str, run: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train the scorers of a model as a run says, and return how that was done."""
    length, steps, share, settings = options.length, options.steps, options.shares[0], {}
    if "x" in run:  # with the scorers of the run before
        length, steps = map(int, run.split("x"))
        settings = {"warm_start_steps": 0, "learning_rate": options.longer_rate}
    else:
        share = options.shares[0] = float(run)
        settings = {} if options.warm_start is None else {"warm_start_steps": options.warm_start}
    size = options.length if length == options.length else length
    chunks = select_chunks(pack(tokenizer, text, options.length), options.chunks)
    if size != options.length:  # the same part of the text in longer chunks
        flat = chunks.flatten()
        chunks = flat[: len(flat) // size * size].view(-1, size)
    chunks = hide_facts(tokenizer, chunks, share, seed=options.seed)
    config = FinetuneConfig(
        steps=steps, batch_size=options.batch_size, seed=options.seed, progress=False, cpu=options.cpu, **settings
    )
    metrics = finetune(model, chunks, config)
    keys = ("settings", "tokens", "seconds", "peak_memory_bytes", "trainable_parameters", "parameters")
    return {"retrieval": share} | {key: metrics[key] for key in keys if key in metrics}


class Record:
    """Hold the JSON, and fill it one measurement after the other until the time is over."""

    def __init__(self, options: argparse.Namespace, content: dict[str, Any]) -> None:
        self.content, self.output, self.limit = content, options.output, options.limit
        self.began = time.monotonic()

    def measure(self, where: dict[str, Any], name: str, measurement: Callable[..., Any], *arguments: Any) -> bool:
        """Put what a function returns under a name; a failure is noted and does not end the run."""
        if time.monotonic() - self.began > self.limit:
            print(f"{name}: left out, the time is over", flush=True)
            return False
        start = time.monotonic()
        try:
            where[name] = measurement(*arguments)
        except Exception as error:  # the next measurement may succeed
            where[name] = {"error": f"{type(error).__name__}: {error}"}
        print(
            f"{time.monotonic() - self.began:6.1f} s (+{time.monotonic() - start:.1f}) {name}: {where[name]}",
            flush=True,
        )
        if self.output:
            write_json(self.output, self.content)
        return "error" not in where[name]


class Asking:
    """Put tasks to contenders of a model, and let them follow traces."""

    def __init__(self, record: Record, model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
        self.record, self.model, self.tokenizer, self.options = record, model, tokenizer, options

    def tasks_at(self, where: dict[str, Any], names: Sequence[str], slots: int) -> None:
        """Ask all tasks in the longer texts, at another budget."""
        with at_budget(self.model, budget_of(self.model).resized(slots)):
            self.tasks(where, names, self.options.longer_lengths, f", {slots} slots")

    def tasks(self, where: dict[str, Any], names: Sequence[str], lengths: Sequence[int], suffix: str = "") -> None:
        """Ask all tasks."""
        options = self.options
        for contender in names:
            cells = where.setdefault(contender, {})
            for length in lengths:
                if contender in options.slow and length > options.slow_limit:
                    continue
                for task in options.tasks:
                    samples = options.samples if task == "passkey" else options.samples_without_depth
                    name = f"{task}, {length}{suffix}"
                    self.record.measure(cells, name, self._values, task, contender, length, samples)

    def traces(self, where: dict[str, Any], names: Sequence[str]) -> None:
        """Follow all traces with the prompt kept; that of `random` is the selection `prompt_random`."""
        options = self.options
        for contender in names:
            cells = where.setdefault("prompt kept, " + contender, {})
            with override([layer.config for layer in sparsek_layers(self.model)], pin_prompt=-1):
                for length in options.trace_lengths:
                    for task in options.traces:
                        arguments = (task, contender, length, options.trace_samples)
                        self.record.measure(cells, f"{task}, {length}", self._values, *arguments)

    def _values(self, task: str, contender: str, length: int, samples: int) -> Any:
        given: dict[str, Any] = {"lengths": [length], "samples": samples, "selections": [contender], "progress": False}
        given |= {"batch_size": max(1, self.options.batch_tokens // length), "seed": self.options.seed + 1}
        return run_task(self.model, self.tokenizer, task, **given)["results"][contender]["values"]


def quality(model: Any, tokens: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Return perplexity and KL from dense attention on held-out chunks."""
    runs = [(budget_of(model), name) for name in names]
    losses = compare(model, tokens, runs)
    return {
        name: {"perplexity": losses[run].perplexity, "kl": losses[run].mean_divergence}
        for run, name in zip(runs, names, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--chunks", default=":62", help="of --length tokens, to train on")
    parser.add_argument("--held-out", default="62:66")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--runs", nargs="+", default=["0.3", "8192x30", "0"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--warm-start", type=int)
    parser.add_argument("--longer-rate", type=float, default=1e-2, help="learning rate of runs that go on")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--baselines", nargs="*", default=["snapkv", "key_difference", "recency", "h2o"])
    parser.add_argument("--slow", nargs="*", default=["h2o"], help="baselines that are asked short texts, at the end")
    parser.add_argument("--slow-limit", type=int, default=4096)
    parser.add_argument("--tasks", nargs="*", default=["passkey", "multi_key", "variable_tracking"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument(
        "--longer-slots", type=int, default=1024, help="for longer texts, after the second run; 0: none"
    )
    parser.add_argument("--longer-lengths", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--samples", type=int, default=2, help="for each depth of a pass key")
    parser.add_argument("--samples-without-depth", type=int, default=10)
    parser.add_argument("--traces", nargs="*", default=["program", "arithmetic"])
    parser.add_argument("--trace-baselines", nargs="*", default=["random", "recency", "key_difference"])
    parser.add_argument("--trace-lengths", type=int, nargs="+", default=[1024, 4096, 2048])
    parser.add_argument("--trace-samples", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=2**16, help="tokens of a batch of prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing more begins")
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--save", type=Path, help="folder for the adapters")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    options.shares = [0.0]
    device = "cpu" if options.cpu or not torch.cuda.is_available() else "cuda"
    named = ("length", "slots", "window", "chunks", "held_out", "seed", "dtype", "samples", "samples_without_depth")
    content: dict[str, Any] = {
        "format": 1,
        "benchmark": "retrieval",
        "commit": options.commit or current_commit(),
        "model": Path(options.model).name,
        "text": Path(options.text).name,
        "settings": {name: getattr(options, name) for name in (*named, "trace_samples")},
        "runs": {},
        "without training": {},
        **describe(),
    }
    record = Record(options, content)
    text, tokenizer = read_text(options.text), AutoTokenizer.from_pretrained(options.model)
    held_out = select_chunks(pack(tokenizer, text, options.length), options.held_out)
    model: Any = None
    for number, run in enumerate(options.runs):
        if model is None or "x" not in run:
            model = None
            gc.collect()
            base: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
            torch.manual_seed(options.seed)
            sinks = SparseKConfig().sinks
            settings = {"k": options.slots - options.window - sinks, "window": options.window, "sinks": sinks}
            model = get_peft_model(base.to(device), SparseKConfig(**settings))
        entry = content["runs"].setdefault(run, {})
        if not record.measure(entry, "training", train, model, tokenizer, text, run, options):
            continue
        if options.save:
            model.save_pretrained(options.save / f"run-{number}")
        asking = Asking(record, model, tokenizer, options)
        asking.tasks(entry, ["learned"], options.lengths)
        record.measure(entry, "held-out text", quality, model, held_out, ["dense", "learned"])
        untrained = content["without training"]
        if number == 0:
            fast = [name for name in options.baselines if name not in options.slow]
            asking.tasks(untrained, ["dense", *fast], options.lengths)
        asking.traces(entry, ["learned"])
        if number == 0:
            asking.traces(untrained, ["dense", *options.trace_baselines])
            record.measure(untrained, "held-out text", quality, model, held_out, ["recency", "key_difference"])
        if number == 1 and options.longer_slots:
            asking.tasks_at(entry, ["learned"], options.longer_slots)
            asking.tasks_at(untrained, ["dense"], options.longer_slots)
    asking.tasks(untrained, options.slow, options.lengths)


if __name__ == "__main__":
    main()
