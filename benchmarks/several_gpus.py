"""Measure `finetune` on several GPUs of one machine: speed, memory, equal results, a killed process, resuming.

    python benchmarks/several_gpus.py --output several_gpus.json

Models are Llamas with random weights in bfloat16, trained on random tokens. With 1, 2 and 4 processes, as far as there
are GPUs, started by torchrun (DDP) or by accelerate's launcher (FSDP2, and ZeRO-3 where DeepSpeed is installed):

    1B   8,192 tokens, one chunk per process and batch. Fewer processes accumulate more batches, so that every run takes
         the same optimiser steps. SparseK, with LoRA too, and Sparsefinder. `efficiency` is the speed of a process over
         that of one alone; `difference` is the norm by which what was trained differs from one process, over the norm
         by which training has changed it.
    8B   whole on one GPU, and divided among the processes, with the same two figures; and, on four GPUs, layers of a
         70B shape, whose number is told
    map  one process whose layers `device_map` spreads over two GPUs
    kill one process of two ends by SIGKILL in its fourth step; how the others end, and what a run makes of it that
         resumes on another number of processes

With `--profile` the first process of a GPU takes another step under torch's profiler, and tells for how long the GPU
was busy in it, and with exchanging tensors.

The JSON is written after every launch, the most important ones first; `--deadline` ends a run between two of them.
Without GPUs processes run on the CPU, which tries the script out: `--tiny --processes 1 2`.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import dispatch_model
from llamas import LLAMA_1B, LLAMA_8B, TINY  # beside this file
from measuring import current_commit
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse import SparsefinderConfig, SparseKConfig
from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe, is_main_process
from hf_sparse.finetune import FinetuneConfig, checkpoint, config_file, finetune, loop, optimiser_step

LLAMA_70B = LLAMA_8B | {"hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 28_672}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": LLAMA_1B,
    "8B": LLAMA_8B,
    "70B": LLAMA_70B | {"num_hidden_layers": 20},
    "tiny": LLAMA_8B | TINY,
}
LENGTH = 8_192
KILLED = {"rank": 1, "step": 4}
METHODS = ("sparsek", "sparsek lora", "sparsefinder")
DIVIDING = ("fsdp2", "zero3")  # engines that divide the base among the processes


def method(name: str, tiny: bool) -> Any:
    """Return the configuration of a method by its name in a case."""
    budget: dict[str, Any] = {"k": 12, "window": 16, "sinks": 4} if tiny else {"k": 508, "window": 512, "sinks": 4}
    if name == "sparsefinder":
        return SparsefinderConfig(tile=8, window=8) if tiny else SparsefinderConfig()
    return SparseKConfig(**budget, lora_rank=8 if name == "sparsek lora" else 0)


def work(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one case in this process, beside the others of its launch, and return the figures of it."""
    tiny = case["shape"] == "tiny"
    length = 96 if tiny else LENGTH
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    with device:
        config = LlamaConfig(**SHAPES[case["shape"]], max_position_embeddings=length)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    if "gpus" in case:
        place_layers(base, case["gpus"])
    model = get_peft_model(base.eval(), method(case["method"], tiny))
    before = {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    if case["engine"] in DIVIDING:  # as a checkpoint that is too large for one GPU is loaded
        model.to("cpu")
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randint(0, config.vocab_size, (16, length), generator=generator)
    settings: dict[str, Any] = {"steps": case["steps"], "warmup_steps": 1, "batch_size": 1, "progress": False}
    settings |= (
        {"graph_steps": 0} if case["method"] == "sparsefinder" else {"warm_start_steps": 0, "divide_heads": False}
    )
    if "output" in case:
        settings |= {"output_dir": case["output"], "checkpoint_every": 1, "resume": True}
        resumed = checkpoint.latest(Path(case["output"]))
    if "killed" in case and os.environ["RANK"] == str(case["killed"]["rank"]):
        kill_at(case["killed"]["step"])
    profiled = profile_step(case["steps"]) if "profile" in case else {}
    metrics = finetune(model, chunks, FinetuneConfig(**settings, gradient_accumulation_steps=case["accumulation"]))
    learned = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    if is_main_process():
        save_file(learned, folder / f"{case['name']}.safetensors")
        save_file(before, folder / f"{case['name']}-before.safetensors")
    row: dict[str, Any] = {name: metrics[name] for name in ("peak_memory_bytes", "base_share") if name in metrics}
    measured = metrics["history"][1 : -1 if "profile" in case else None]
    row["tokens_per_second"] = statistics.median(step["tokens_per_second"] for step in measured)
    row |= {"profile": profiled} if profiled else {}
    if "output" in case:
        row["resumed_from"] = resumed and resumed.name
    return row | {"losses": [step["loss"] for step in metrics["history"]]}


def profile_step(number: int) -> dict[str, float]:
    """Return what will hold the times of an optimiser step, counted from 1, once this process has taken it.

    Milliseconds by the clock, of kernels, of those that exchange tensors, and in which any kernel ran.
    """
    told: dict[str, float] = {}
    calls, take = [], loop.take_step

    def take_profiled(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) != number or not torch.cuda.is_available() or not is_main_process():
            return take(*arguments, **options)
        torch.cuda.synchronize()
        with torch.profiler.profile() as profiler:
            begin = time.perf_counter()
            result = take(*arguments, **options)
            torch.cuda.synchronize()
            told["step_ms"] = 1e3 * (time.perf_counter() - begin)
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in events)
        exchanges = [span for span in spans if "nccl" in span[2].lower()]
        computing = [span for span in spans if "nccl" not in span[2].lower()]
        told.update(busy_ms=covered(spans), computing_ms=covered(computing), exchanging_ms=covered(exchanges))
        told["kernels"] = len(computing)
        return result

    loop.take_step = take_profiled
    return told


def covered(spans: list[tuple[float, float, str]]) -> float:
    """Return the milliseconds that spans of microseconds, in the order of their beginnings, cover together."""
    end, total = float("-inf"), 0.0
    for begin, stop, _ in spans:
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total / 1e3


def place_layers(base: Any, gpus: int) -> None:
    """Spread the layers of a model over several GPUs, as `from_pretrained` does with a `device_map`."""
    places: list[Any] = list(range(gpus)) if torch.cuda.is_available() else ["cpu"] * gpus
    layers = base.config.num_hidden_layers
    device_map = {f"model.layers.{number}": places[number * gpus // layers] for number in range(layers)}
    device_map |= {"model.embed_tokens": places[0], "model.rotary_emb": places[0]}
    device_map |= {"model.norm": places[-1], "lm_head": places[-1]}
    dispatch_model(base, device_map, main_device=places[0], force_hooks=True)


def kill_at(step: int) -> None:
    """Let this process end by SIGKILL before it averages the gradients of an optimiser step."""
    calls, average = [], optimiser_step.average_gradients

    def average_or_end(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return average(*arguments)

    optimiser_step.average_gradients = average_or_end  # type: ignore[assignment]


def launch(engine: str, processes: int, cases: list[dict[str, Any]], folder: Path, limit: float) -> dict[str, Any]:
    """Run cases one after another in several processes; return what they told, how all ended, and when."""
    out = folder / "told.jsonl"
    out.unlink(missing_ok=True)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    if engine in DIVIDING:
        config = ["--config_file", str(config_file(engine)), "--num_processes", str(processes)]
        launcher = ["accelerate.commands.launch", *config]
    start = ["-m", *launcher] if engine != "none" else []
    command = [sys.executable, *start, __file__, "--cases", json.dumps(cases), "--output", str(folder)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher with all that it started
        _, errors = process.communicate()
    code = process.returncode
    told = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    row = {"engine": engine, "processes": processes, "exit_code": code, "seconds": time.perf_counter() - began}
    if code:
        row["errors"] = [line for line in errors.splitlines() if "Error" in line or "Signal" in line][-4:]
    return row | {"cases": told}


def difference(folder: Path, name: str, alone: str) -> float | None:
    """Return by how much two runs differ, over how much the one alone has changed; `None` if one is missing."""
    paths = [folder / f"{run}.safetensors" for run in (name, alone, f"{alone}-before")]
    if not all(path.exists() for path in paths):
        return None
    one, other, before = (
        torch.cat([tensor.double().flatten() for _, tensor in sorted(load_file(path).items())]).nan_to_num()
        for path in paths  # what was not fitted is NaN
    )
    return float((one - other).norm() / (other - before).norm())


def plan(options: argparse.Namespace, folder: Path) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """List the launches: engine, processes, and cases; the most important ones first."""
    most = max(options.processes)

    def case(name: str, engine: str, count: int, shape: str, steps: int, **more: Any) -> dict[str, Any]:
        label = f"{name} {shape} {engine} {count}"
        shape = "tiny" if options.tiny else shape
        steps = (min(steps, 3) if options.tiny else steps) + options.profile
        more |= {"profile": True} if options.profile else {}
        alone = f"{label.rpartition(engine)[0]}ddp 1"
        found = {"name": label, "method": name, "engine": engine, "shape": shape, "steps": steps, "alone": alone}
        return found | more

    def training(engine: str, count: int) -> tuple[str, int, list[dict[str, Any]]]:
        share = {"accumulation": most // count}
        return engine, count, [case(name, engine, count, "1B", 5, **share) for name in options.methods]

    several = [count for count in options.processes if count > 1]
    dividing = [engine for engine in options.engines if engine in DIVIDING]
    launches = [training("ddp", count) for count in options.processes]
    launches.append(("ddp", 1, [case("sparsek", "ddp", 1, "8B", 3, accumulation=most)]))
    launches += [training(engine, count) for engine in dividing for count in several]
    for engine, count in product(dividing, several):
        cases = [case("sparsek", engine, count, "8B", 3, accumulation=most // count)]
        cases += [case("sparsek", engine, count, "70B", 3, accumulation=1)] if count >= 4 else []
        launches.append((engine, count, cases))
    small: dict[str, Any] = {"method": "sparsek", "shape": "tiny", "steps": 6}
    for engine in options.engines if most > 1 else ():
        place = {"output": str(folder / f"run-{engine}"), "accumulation": most // 2}
        launches.append((engine, 2, [small | place | {"name": f"killed {engine}", "engine": engine, "killed": KILLED}]))
        for count in dict.fromkeys((1, most)):  # each goes on from a copy of what the killed run left
            copy = {"output": f"{place['output']}-{count}", "copied": place["output"], "accumulation": most // count}
            going_on = small | copy | {"name": f"resumed {engine} {count}", "engine": engine if count > 1 else "ddp"}
            launches.append((going_on["engine"], count, [going_on]))
    placed = small | {"name": "placed on 2 GPUs", "engine": "none", "accumulation": most, "gpus": 2}
    launches += [("none", 1, [placed])] if most > 1 else []  # accelerate's launchers refuse such models
    return [*launches, ("ddp", 1, [small | {"name": "whole", "engine": "ddp", "accumulation": most}])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", help="by default 1, 2 and 4, as far as there are GPUs")
    installed = DIVIDING if find_spec("deepspeed") else DIVIDING[:1]
    parser.add_argument("--engines", nargs="+", choices=["ddp", *DIVIDING], default=["ddp", *installed])
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="launches in which the name of a case has such a word"
    )
    parser.add_argument("--profile", action="store_true", help="profile a further step of each training")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="of the 1B shape")
    parser.add_argument("--deadline", type=float, default=3600, help="seconds after which no launch begins")
    parser.add_argument("--tiny", action="store_true", help="models of no size, to try the script out")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--cases", type=json.loads, help=argparse.SUPPRESS)  # of a launched process
    options = parser.parse_args()
    if options.cases:
        for case in options.cases:
            row = {"case": case["name"], "rank": int(os.environ.get("RANK", "0"))}
            try:
                row |= work(case, options.output)
            except torch.OutOfMemoryError as error:
                row["out_of_memory"] = str(error).split(".")[0]
            with (options.output / "told.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        return
    began = time.perf_counter()
    options.processes = options.processes or [n for n in (1, 2, 4) if n <= max(1, torch.cuda.device_count())]
    result: dict[str, Any] = {"format": 1, "benchmark": "several_gpus", "commit": options.commit or current_commit()}
    result |= {**describe(), "gpus": torch.cuda.device_count(), "layers_of_70B": 20, "launches": []}
    with TemporaryDirectory() as place:
        folder = Path(place)
        for engine, count, cases in plan(options, folder):
            names = " ".join(case["name"] for case in cases).split()
            if options.only and not set(options.only) & set(names):
                continue
            left = options.deadline - (time.perf_counter() - began)
            if left <= 0:
                break
            for case in cases:
                if "copied" in case:
                    subprocess.run(["cp", "-r", case["copied"], case["output"]], check=False)
            row = launch(engine, count, cases, folder, max(30, left))
            compare(row, cases, folder, result["launches"])
            result["launches"].append(row)
            print(f"{time.perf_counter() - began:.0f} s: {json.dumps(row)}", flush=True)
            write_json(options.output, result)


def compare(row: dict[str, Any], cases: list[dict[str, Any]], folder: Path, earlier: list[dict[str, Any]]) -> None:
    """Add to what the first process told of each case how it compares with one process."""
    first = {told["case"]: told for launch in earlier for told in launch["cases"] if told["rank"] == 0}
    for case in cases:
        told = next((told for told in row["cases"] if told["case"] == case["name"] and told["rank"] == 0), None)
        if told is None:
            continue
        alone = first.get(case.get("alone"))
        if alone is not None and row["processes"] > 1:
            told["efficiency"] = told["tokens_per_second"] / alone["tokens_per_second"] / row["processes"]
            told["difference"] = difference(folder, case["name"], case["alone"])
        if case["name"] == "whole":  # all that has been trained in the same way
            runs = sorted([*folder.glob("resumed *"), *folder.glob("placed *")])
            names = [path.stem for path in runs if not path.stem.endswith("-before")]
            told["differences"] = {name: difference(folder, name, "whole") for name in names}


if __name__ == "__main__":
    main()
