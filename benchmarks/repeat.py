"""Repeat measurements on a machine of your own: jobs of `jobs.toml`, one after the other or beside one another.

    python benchmarks/repeat.py --list
    python benchmarks/repeat.py --gpus 0 --out DIR --model smollm2=FOLDER --model wikitext=FILE --jobs prefill
    python benchmarks/repeat.py --gpus 0 1 --lanes 2 --seconds 1500 --out DIR

A job has `commands`, arguments of the Python that runs this file, one after the other and without a shell; the number
of `gpus` that it sees; what it `needs`: packages, or paths that `--model NAME=PATH` gives for `{NAME}` in a command;
the `seconds` after which it is ended with all processes that it started; and the files that it `writes` into the folder
`{out}`. A job that cannot run here is reported with the reason.

A lane runs one job at a time. GPUs are divided among the lanes; more lanes than GPUs share them, and slow one another
down. What a job prints is in `DIR/NAME.log`, whose last line says how it ended. A job that ended well and whose files
are there is not run again; remove its log to repeat it.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import inf
from pathlib import Path
from threading import Event
from typing import Any

ROOT = Path(__file__).parents[1]
GRACE = 10.0  # seconds between SIGTERM, at which launchers end their workers, and SIGKILL
WELL = "rc 0 after"  # how the last line of a log begins when all went well


@dataclass
class Job:
    """Hold an entry of the list; the name is its heading."""

    name: str
    commands: list[str]
    seconds: float
    writes: list[str]
    gpus: int = 0
    needs: list[str] = field(default_factory=list)


def lacking(job: Job, out: Path) -> list[str]:
    """Return the files that a job has not written."""
    return [name for name in job.writes if not (out / name).exists()]


def outcome_without_run(job: Job, out: Path, models: dict[str, Path], gpus: int) -> str | None:
    """Return why a job is not run in a lane with so many GPUs: it was there, or something is missing; else `None`."""
    log = out / f"{job.name}.log"
    earlier = log.read_text("utf-8", "replace") if log.exists() else ""
    if earlier.rpartition("\n\n")[2].startswith(WELL) and not lacking(job, out):
        return "was there"
    if job.gpus > gpus:
        return f"not run: GPUs of a lane: {gpus}, it takes {job.gpus}"
    for name in job.needs:
        if any(f"{{{name}}}" in command for command in job.commands):
            if name not in models:
                return f"not run: it needs --model {name}=PATH"
        elif find_spec(name) is None:
            return f"not run: it needs the package {name}"
    return None


def run(job: Job, out: Path, models: dict[str, Path], gpus: list[str], deadline: float, stopped: Event) -> str:
    """Run the commands of a job until one fails or its time is over, and return the last line of its log."""
    began = time.monotonic()
    end = min(began + job.seconds, deadline)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[: job.gpus]), "PYTHONUNBUFFERED": "1"}
    with (out / f"{job.name}.log").open("w", encoding="utf-8") as log:
        for command in job.commands:
            words = [sys.executable, *(word.format(out=out, **models) for word in shlex.split(command))]
            print("$", shlex.join(words), file=log, flush=True)
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **streams)
            while process.poll() is None and time.monotonic() < end and not stopped.is_set():
                stopped.wait(0.1)
            killed = process.poll() is None
            end_group(process)
            if killed or process.returncode:
                break
        outcome = f"rc {process.returncode}"
        if killed:
            outcome += ", interrupted" if stopped.is_set() else ", killed at its limit"
        elif process.returncode == 0 and (names := lacking(job, out)):
            outcome += f", without {', '.join(names)}"
        outcome += f" after {time.monotonic() - began:.0f} s"
        print(f"\n{outcome}", file=log)
    return outcome


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started and left in its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def named_path(text: str) -> tuple[str, Path]:
    """Read NAME=PATH, of a path that exists."""
    name, _, path = text.partition("=")
    if not path or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"expected NAME=PATH with a path that exists, got {text!r}")
    return name, Path(path).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="print the jobs, and run none")
    parser.add_argument("--jobs", nargs="+", metavar="NAME", help="run these, in this order; by default all")
    parser.add_argument("--out", type=Path, default=Path("repeated"), help="folder for results and logs")
    parser.add_argument("--model", type=named_path, action="append", default=[], help="NAME=PATH, of a model or a text")
    parser.add_argument("--gpus", nargs="+", default=[], metavar="NUMBER", help="GPUs to use, by default none")
    parser.add_argument("--lanes", type=int, default=1, help="jobs beside one another")
    parser.add_argument("--seconds", type=float, default=inf, help="after so many nothing runs any more")
    parser.add_argument("--commit", help="to write into results, where there is no repository to ask")
    parser.add_argument("--file", type=Path, default=Path(__file__).with_name("jobs.toml"), help="the list of jobs")
    args = parser.parse_args()
    known = {name: Job(name, **entry) for name, entry in tomllib.loads(args.file.read_text("utf-8")).items()}
    if args.lanes < 1:
        parser.error(f"expected at least one lane, got {args.lanes}")
    if unknown := set(args.jobs or ()) - set(known):
        parser.error(f"expected names that --list prints, got {', '.join(sorted(unknown))}")
    jobs = [known[name] for name in args.jobs or known]
    if args.list:
        for job in jobs:
            print(f"{job.name:28}{job.gpus} GPUs {job.seconds:5.0f} s  {', '.join(job.needs)}".rstrip())
        return
    deadline, models, out = time.monotonic() + args.seconds, dict(args.model), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.commit:
        os.environ["HF_SPARSE_COMMIT"] = args.commit
    share = max(len(args.gpus) // args.lanes, min(len(args.gpus), 1))  # GPUs of a lane
    told = {job.name: outcome_without_run(job, out, models, share) for job in jobs}
    waiting, stopped = deque(job for job in jobs if told[job.name] is None), Event()

    def lane(number: int) -> None:
        own = [args.gpus[(number * share + place) % len(args.gpus)] for place in range(share)]
        while time.monotonic() < deadline and not stopped.is_set():
            try:
                job = waiting.popleft()
            except IndexError:
                return
            print(f"{job.name}: begins", flush=True)
            told[job.name] = run(job, out, models, own, deadline, stopped)
            print(f"{job.name}: {told[job.name]}", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(args.lanes) as pool:
        try:
            list(pool.map(lane, range(args.lanes)))
        except KeyboardInterrupt:
            stopped.set()
    outcomes = {name: outcome or "not run: the time was over" for name, outcome in told.items()}
    print(*(f"{name:28}{outcome}" for name, outcome in outcomes.items()), sep="\n")
    raise SystemExit(not all(outcome == "was there" or outcome.startswith(WELL) for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
