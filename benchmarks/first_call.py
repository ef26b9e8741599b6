"""How long a fresh process with empty caches of compiled code waits for its first result, by family of shapes.

    python benchmarks/first_call.py --output first_calls.json

Every family has a process of its own, all side by side, each with an equal share of the cores. In it: the first
forward, the first forward with backward, that again, and all of it for a second and a third length, which should
compile nothing; and how long Triton's compiler took for each kernel, from the source to the binary.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import current_commit  # beside this file

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.selection import slots as operators

FAMILIES = {  # query heads, KV heads, head size, gates
    "hard gates, 32/8 heads of 128": (32, 8, 128, "hard"),
    "soft gates, 32/8 heads of 128": (32, 8, 128, "soft"),
    "soft gates, 9/3 heads of 64": (9, 3, 64, "soft"),
    "decoding step, 32/8 heads of 128": (32, 8, 128, None),
}
LENGTHS = (8192, 5003, 16384)


def compilations() -> list[dict[str, Any]]:
    """Filled from now on, a row for every kernel that is compiled."""
    from triton import knobs

    rows: list[dict[str, Any]] = []

    def listen(*, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            rows.append({"kernel": metadata["name"], "seconds": round(times.total / 1e6, 3)})

    knobs.compilation.listener = listen
    return rows


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def attention(heads: int, kv_heads: int, dim: int, gates: Any, length: int) -> dict[str, float]:
    query, key, value = draw(1, heads, length, dim), draw(1, kv_heads, length, dim), draw(1, kv_heads, length, dim)
    scores, upstream = torch.randn(1, kv_heads, length, device="cuda"), torch.randn_like(query)
    wanted = [scores] if gates == "soft" else [query, key, value]
    for tensor in wanted:
        tensor.requires_grad_()

    def forward() -> torch.Tensor:
        support = 2048 if gates == "soft" else None
        return sparsek_attention(query, key, value, scores, k=512, window=512, sinks=4, gates=gates, support=support)

    def both() -> object:
        return torch.autograd.grad(forward(), wanted, upstream)

    with torch.no_grad():
        first = seconds(forward)
    return {"forward_s": first, "forward_backward_s": seconds(both), "again_s": seconds(both)}


def step(heads: int, kv_heads: int, dim: int) -> dict[str, float]:
    batch, slots = 4, 1024
    keys, values = draw(batch, kv_heads, slots, dim), draw(batch, kv_heads, slots, dim)
    scores = torch.randn(batch, kv_heads, slots, device="cuda")
    positions = torch.arange(slots, device="cuda").expand(batch, kv_heads, slots).contiguous()
    seen = torch.full((batch,), slots, device="cuda")
    query, key = draw(batch, heads, 1, dim), draw(batch, kv_heads, 1, dim)

    def run() -> None:
        operators.insert_token(
            keys, values, scores, positions, seen, key, key, scores[..., :1].contiguous(), None, window=512, sinks=4
        )
        operators.attend_slots(query, keys, values, positions, scaling=dim**-0.5)

    return {"forward_s": seconds(run), "again_s": seconds(run)}


def measure(name: str) -> dict[str, Any]:
    """In a fresh process."""
    heads, kv_heads, dim, gates = FAMILIES[name]
    draw(8).sum().item()  # the CUDA context is not ours
    compiled = compilations()
    if gates is None:
        calls = {"step": step(heads, kv_heads, dim)}
    else:
        calls = {str(length): attention(heads, kv_heads, dim, gates, length) for length in LENGTHS}
    return {"cores": len(os.sched_getaffinity(0)), "calls": calls, "compiled": compiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=list(FAMILIES), help="measure it in this process and print JSON")
    parser.add_argument("--commit", help="to write into the JSON, where there is no repository to ask")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.family:
        print(json.dumps(measure(options.family)))
        return
    result: dict[str, Any] = {"format": 1, "benchmark": "first_calls", "commit": options.commit or current_commit()}
    result |= {**describe(), "rows": []}
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // len(FAMILIES))
    with tempfile.TemporaryDirectory() as empty:
        processes = {}
        for number, name in enumerate(FAMILIES):
            caches = {"TRITON_CACHE_DIR": f"{empty}/{number}", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/{number}-inductor"}
            command = [sys.executable, __file__, "--family", name]
            processes[name] = subprocess.Popen(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True)
            os.sched_setaffinity(processes[name].pid, cores[number * share :][:share] or cores)
        for name, process in processes.items():
            printed, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{name}: no result, exit status {process.returncode}")
            result["rows"].append({"family": name, **json.loads(printed)})
            print(result["rows"][-1], flush=True)
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
