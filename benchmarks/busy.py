"""How long a training step of the demo takes on a CPU on which other programs work too.

    python benchmarks/busy.py --output busy.json

Threads of OpenMP that wait for one another look at a lock again and again before they sleep. On a machine of few cores
with other work they keep the core from the thread that they wait for. Each setting of the environment below runs in
processes of its own, which alternate, beside as many processes that do nothing but count; the median over all steps but
the first of each process. The command line of hf-sparse sets what is called "command line" here.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import current_commit  # beside this file
from transformers import AutoModelForCausalLM

from hf_sparse import SparseKConfig, patch
from hf_sparse.atomic_files import write_json
from hf_sparse.bundled import CHECKPOINT
from hf_sparse.environment import describe

SETTINGS: dict[str, dict[str, str]] = {
    "as torch starts": {},
    "command line": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
READ = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # not taken over from outside
BATCH, LENGTH = 2, 512  # of the demo


def take_steps(count: int) -> None:
    """Print the seconds of forward and backward of a patched model, step by step."""
    model = patch(AutoModelForCausalLM.from_pretrained(CHECKPOINT), SparseKConfig(k=20, window=8, sinks=4)).train()
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
    for _ in range(1 + count):
        begin = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        print(time.perf_counter() - begin, flush=True)


def measure(setting: str, steps: int) -> list[float]:
    """Seconds of the steps of one process, without its first."""
    environment = {name: value for name, value in os.environ.items() if name not in READ} | SETTINGS[setting]
    command = [sys.executable, __file__, "--steps", str(steps), "--child"]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(line) for line in output.split()][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--competing", type=int, nargs="+", default=[0, 1], help="processes that count, beside it")
    parser.add_argument("--steps", type=int, default=2, help="of each process, beside the first")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each setting")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    if options.child:
        take_steps(options.steps)
        return
    result: dict[str, Any] = {
        "format": 1,
        "benchmark": "busy",
        "commit": current_commit(),
        "settings": {"steps": options.steps, "rounds": options.rounds, "batch": BATCH, "length": LENGTH},
        "rows": [],
        **describe(),
    }
    for competing in options.competing:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(competing)]
        try:
            seconds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
            for _ in range(options.rounds):
                for setting in SETTINGS:
                    seconds[setting] += measure(setting, options.steps)
                    print(f"beside {competing}: {setting:24} {seconds[setting][-1]:7.2f} s a step", flush=True)
        finally:
            for other in others:
                other.kill()
        result["rows"] += [
            {"competing": competing, "setting": name, "step_s": statistics.median(values), "steps_s": values}
            for name, values in seconds.items()
        ]
        if options.output:
            write_json(options.output, result)


if __name__ == "__main__":
    main()
