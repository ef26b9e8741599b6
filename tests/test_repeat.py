"""Check `benchmarks/repeat.py`, and that every job of `benchmarks/jobs.toml` can be started as it stands there."""

import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from hf_sparse.cli import app

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "repeat.py"
JOBS = tomllib.loads((ROOT / "benchmarks" / "jobs.toml").read_text("utf-8"))

#: Parse the arguments of every script as it would be started, and print what went wrong. Nothing else of it runs.
#: Packages that are not installed here, which some scripts import at the top, are stood in for.
PARSE = """
import argparse, json, runpy, sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import peft  # before anything is stood in for: it looks what there is

class Parsed(Exception):
    pass

def parse(self, *arguments):
    parsed(self, *arguments)
    raise Parsed

class Absent:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ("triton", "vllm") else None

    def create_module(self, spec):
        return MagicMock()

    def exec_module(self, module):
        pass

parsed, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, parse
sys.meta_path.append(Absent())
sys.path.insert(0, "benchmarks")
failed = []
for words in json.load(sys.stdin):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
        failed.append([words, "it parsed no arguments"])
    except Parsed:
        pass
    except (Exception, SystemExit) as error:
        failed.append([words, repr(error)])
print(json.dumps(failed))
"""


def commands() -> list[list[str]]:
    """Split every command of the jobs into its words, with names in place of what is given on the command line."""
    return [
        shlex.split(command.replace("{", "").replace("}", "")) for job in JOBS.values() for command in job["commands"]
    ]


def repeat(tmp_path: Path, jobs: dict[str, dict[str, Any]], *options: str) -> tuple[int, dict[str, str]]:
    """Run small jobs, with a limit of 20 seconds unless they name one; return the exit code and how each ended."""
    lines = []
    for name, job in jobs.items():
        entries = {"seconds": 20, "writes": []} | job
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in entries.items())]
    file = tmp_path / "jobs.toml"
    file.write_text("\n".join(lines), "utf-8")
    command = [sys.executable, SCRIPT, "--file", file, "--out", tmp_path / "out", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not done.stderr
    told = done.stdout.splitlines()
    ended = {name: line.removeprefix(name).strip() for name in jobs for line in told if line.startswith(f"{name} ")}
    return done.returncode, ended


def python(code: str) -> str:
    return shlex.join(["-c", code])


def log_of(tmp_path: Path, name: str) -> str:
    return (tmp_path / "out" / f"{name}.log").read_text("utf-8")


def test_only_a_job_that_did_all_is_done(tmp_path):
    """A job that failed, or wrote no file, is told and runs again; one that did all stays as it is."""
    note = python("import sys; open(sys.argv[1], 'a').write('x')")
    jobs = {
        "good": {"commands": [f"{note} {{out}}/good.txt", python("print('second')")], "writes": ["good.txt"]},
        "bad": {"commands": [python("raise SystemExit(3)"), python("print('never')")]},
        "empty": {"commands": [python("pass")], "writes": ["empty.json"]},
    }
    code, ended = repeat(tmp_path, jobs)
    assert code == 1
    assert ended["good"].startswith("rc 0 after") and "second" in log_of(tmp_path, "good")
    assert ended["bad"].startswith("rc 3 after") and "\nnever" not in log_of(tmp_path, "bad")
    assert ended["empty"].startswith("rc 0, without empty.json after")

    assert repeat(tmp_path, jobs)[1]["good"] == "was there"
    assert (tmp_path / "out" / "good.txt").read_text() == "x"
    (tmp_path / "out" / "good.txt").unlink()
    code, ended = repeat(tmp_path, jobs, "--jobs", "good")
    assert code == 0 and ended["good"].startswith("rc 0 after")


def test_a_job_is_killed_at_its_limit_with_all_that_it_started(tmp_path):
    """The log tells so, what was printed before stays, and the processes of the job are gone."""
    beat = tmp_path / "beat"
    child = f"""import pathlib, time
while True:
    pathlib.Path({str(beat)!r}).write_text(str(time.time()))
    time.sleep(0.05)
"""
    parent = f"""import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, '-c', {child!r}])
print('begun')
time.sleep(60)
"""
    code, ended = repeat(tmp_path, {"slow": {"commands": [python(parent)], "seconds": 5}})
    assert code == 1 and "killed at its limit" in ended["slow"] and not ended["slow"].startswith("rc 0")
    log = log_of(tmp_path, "slow").splitlines()
    assert "begun" in log and log[-1] == ended["slow"]
    last = beat.read_text()
    time.sleep(0.5)
    assert beat.read_text() == last


def test_nothing_runs_after_the_seconds_of_all(tmp_path):
    jobs = {name: {"commands": [python("import time; time.sleep(60)")]} for name in ("first", "second")}
    began = time.monotonic()
    code, ended = repeat(tmp_path, jobs, "--seconds", "1")
    assert code == 1 and time.monotonic() - began < 15
    assert "killed at its limit" in ended["first"] and ended["second"] == "not run: the time was over"


def test_lanes_have_gpus_of_their_own(tmp_path):
    """Two jobs that wait for each other run beside one another; each sees as many GPUs as it asks for."""
    meet = """import os, pathlib, sys, time
own, other = (pathlib.Path(sys.argv[1], name) for name in sys.argv[2:])
own.write_text(os.environ['CUDA_VISIBLE_DEVICES'])
while not other.exists():
    time.sleep(0.05)
"""
    pair = [("a", "b", 2), ("b", "a", 1)]
    jobs: dict[str, Any] = {
        own: {"commands": [f"{python(meet)} {{out}} {own} {other}"], "gpus": gpus, "writes": [own]}
        for own, other, gpus in pair
    }
    jobs["three"] = {"commands": [python("pass")], "gpus": 3}
    code, ended = repeat(tmp_path, jobs, "--gpus", "4", "5", "6", "7", "--lanes", "2")
    assert code == 1 and ended["three"] == "not run: GPUs of a lane: 2, it takes 3"
    assert ended["a"].startswith("rc 0 after") and ended["b"].startswith("rc 0 after")
    seen = {name: (tmp_path / "out" / name).read_text() for name in "ab"}
    assert seen in ({"a": "4,5", "b": "6"}, {"a": "6,7", "b": "4"})

    shared = {name: {"commands": jobs[name]["commands"], "gpus": 1, "writes": [f"{name}2"]} for name in ("a", "b")}
    for name in "ab":
        (tmp_path / "out" / name).unlink()
    _, ended = repeat(tmp_path, shared | {"three": jobs["three"]}, "--gpus", "4", "--lanes", "2")
    assert {(tmp_path / "out" / name).read_text() for name in "ab"} == {"4"}
    assert ended["three"] == "not run: GPUs of a lane: 1, it takes 3"


def test_what_a_job_needs_is_given_or_told(tmp_path):
    """A path goes into the command as one word; without it, or without a package, the job is not run."""
    model = tmp_path / "a model"
    model.mkdir()
    reads = python("import os, sys; print(os.path.isdir(sys.argv[1]))") + " {smollm2}"
    jobs = {
        "given": {"commands": [reads], "needs": ["smollm2", "json"]},
        "model": {"commands": [reads.replace("smollm2", "qwen")], "needs": ["qwen"]},
        "package": {"commands": [python("pass")], "needs": ["no_such_package"]},
    }
    code, ended = repeat(tmp_path, jobs, "--model", f"smollm2={model}")
    assert code == 1
    assert ended["given"].startswith("rc 0 after") and "True" in log_of(tmp_path, "given")
    assert ended["model"] == "not run: it needs --model qwen=PATH"
    assert ended["package"] == "not run: it needs the package no_such_package"


def test_scripts_take_the_arguments_of_all_jobs():
    scripts = [words for words in commands() if words[0] != "-m"]
    assert len(scripts) > 20
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(scripts), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "-m"], ids=" ".join)
def test_verbs_and_tests_of_all_jobs_exist(words, tmp_path, monkeypatch):
    if words[1] == "pytest":
        paths = [word for word in words if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths)
        return
    assert words[1] == "hf_sparse"
    monkeypatch.chdir(tmp_path)
    for name in ("wikitext", "novel"):
        Path(name).touch()
    program: Any = typer.main.get_command(app)
    program.commands[words[2]].make_context(words[2], words[3:])  # raises for what it does not know


@pytest.mark.parametrize("name", JOBS)
def test_jobs_name_what_they_need_and_write(name):
    job = JOBS[name]
    assert job["commands"] and job["writes"]
    given = {word for command in job["commands"] for word in re.findall(r"{(\w+)}", command)} - {"out"}
    assert given <= set(job.get("needs", []))
    written = " ".join(job["commands"])
    assert all(file.split("/")[0] in written for file in job["writes"])
