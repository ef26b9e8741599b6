"""Time calls and their kernels, measure the bandwidth of memory, and name the commit that a benchmark runs at."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

QUANTILES = (0.5, 0.2, 0.8)
NAMED = 20  # kernels of a call that are told apart


def milliseconds(run: Callable[[], object], device: str, repeat_ms: int) -> dict[str, float]:
    """Return median and quantiles of the time of a call, in milliseconds.

    Args:
        run: what is called, again and again; the first call is not counted.
        device: `"cuda"` or `"cpu"`.
        repeat_ms: how long it is repeated.
    """
    if device == "cuda":
        from triton.testing import do_bench

        median, low, high = do_bench(run, warmup=25, rep=repeat_ms, quantiles=list(QUANTILES))
    else:
        times: list[float] = []
        while len(times) < 4 or sum(times) < repeat_ms:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
        fifths = statistics.quantiles(times[1:], n=5, method="inclusive")
        median, low, high = statistics.median(times[1:]), fifths[0], fifths[-1]
    return {"median_ms": median, "p20_ms": low, "p80_ms": high}


def wait(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def profiler(device: str) -> profile:
    """Return a profiler of what a CPU, and a GPU where it is one, does."""
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda"))


def kernels_of(events: Sequence[Any], calls: int) -> dict[str, Any]:
    """Return milliseconds and launches of one of `calls` calls, and of its longest kernels."""
    kernels: dict[str, list[float]] = {}
    for event in events:
        if str(event.device_type).endswith("CUDA"):
            kernels.setdefault(event.name, []).append((event.time_range.end - event.time_range.start) / 1e3)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:NAMED]
    return {
        "kernels_ms": sum(map(sum, kernels.values())) / calls,
        "launches": round(sum(map(len, kernels.values())) / calls),
        "kernels": [
            {"name": name, "ms": sum(times) / calls, "launches": round(len(times) / calls)} for name, times in longest
        ],
    }


def copy_bandwidth(device: str) -> float:
    """Return the bytes per second, read and written, of a large copy."""
    size = 1 << (32 if device == "cuda" else 26)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * milliseconds(lambda: target.copy_(source), device, 200)["median_ms"])


def current_commit() -> str | None:
    """Return the commit of this checkout, with `+` if files were changed since; `None` outside a repository.

    `HF_SPARSE_COMMIT` names it where there is no repository to ask.
    """
    if "HF_SPARSE_COMMIT" in os.environ:
        return os.environ["HF_SPARSE_COMMIT"]
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed.strip())
