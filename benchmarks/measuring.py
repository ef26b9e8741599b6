"""Time calls, and name the commit that a benchmark runs at."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

QUANTILES = (0.5, 0.2, 0.8)


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
