"""Help and mistakes in arguments are answered without torch: none of these commands may import it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

# Runs many command lines in one interpreter: by its name, and in what it imports, this is the script.
PROGRAM = """
import contextlib, io, json, sys
import hf_sparse.cli

ended = []
for arguments in json.load(sys.stdin):
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = hf_sparse.cli.main()
        except SystemExit as end:
            code = end.code
    ended.append([code, output.getvalue(), errors.getvalue()])
json.dump(ended, sys.stdout)
"""
SCRIPT = [str(Path(sys.executable).with_name("hf-sparse"))]
MODULE = [sys.executable, "-m", "hf_sparse"]


@pytest.fixture
def run(tmp_path):
    """Run a command line in which the heavy libraries cannot be imported."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "transformers", "peft", "accelerate", "datasets"):
        (blocked / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    environment = {**os.environ, "PYTHONPATH": str(blocked), "COLUMNS": "200"}
    for adapter, peft_type in (("sparsek", "HF_SPARSE_SPARSEK"), ("sparsefinder", "HF_SPARSE_SPARSEFINDER")):
        (tmp_path / adapter).mkdir()
        (tmp_path / adapter / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type, "lora_rank": 0}))

    def run(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, input=stdin, capture_output=True, text=True)

    return run


@pytest.fixture
def run_all(run, tmp_path):
    """Run many command lines in one interpreter, and return the exit code, output and errors of each."""
    program = tmp_path / "hf-sparse"
    program.write_text(PROGRAM)

    def run_all(lines: Iterable[str]) -> list[tuple[int, str, str]]:
        completed = run(sys.executable, str(program), stdin=json.dumps([line.split() for line in lines]))
        assert completed.returncode == 0, completed.stderr
        return json.loads(completed.stdout)

    return run_all


def test_the_libraries_are_blocked(run):
    completed = run(*SCRIPT, "demo")
    assert completed.returncode != 0 and "was imported" in completed.stderr


@pytest.mark.parametrize("program", [SCRIPT, MODULE], ids=["script", "module"])
def test_version(run, program):
    completed = run(*program, "--version")
    assert completed.returncode == 0 and completed.stdout.startswith("hf-sparse "), completed.stderr


def test_help(run, run_all):
    verbs = ["", "patch", "finetune", "divide", "unpatch", "eval", "report", "info", "generate", "chat", "push"]
    verbs += ["export", "serve", "demo"]
    for verb, (code, output, errors) in zip(verbs, run_all(f"{verb} --help" for verb in verbs), strict=True):
        assert code == 0 and f"Usage: hf-sparse {verb}" in output, (verb, output, errors)
    assert "Usage: hf-sparse patch" in run(*SCRIPT, "patch", "--help").stdout


MISTAKES = [
    ("train", 2, "No such command 'train'"),
    ("patch demo", 2, "Missing option '--output'"),
    ("patch demo --output out --kk 3", 2, "No such option: --kk"),
    ("patch demo --output out --k many", 2, "Invalid value for '--k'"),
    ("patch demo --output out --layers all", 2, "expected whole numbers such as 0,1, got 'all'"),
    ("patch demo --output out --scorer tree", 2, "Invalid value for '--scorer'"),
    ("patch demo --output out --k -3", 1, "SparseKConfig.k must be an integer of at least 1, got -3"),
    (
        "patch demo --output out --lora-rank -1",
        1,
        "SparseKConfig.lora_rank must be an integer of at least 0, got -1",
    ),
    ("patch demo --output out --tile 16", 2, "--tile is no option of sparsek: see 'Options of Sparsefinder'"),
    ("patch demo --output out --method sparsefinder --tile 3", 1, "SparsefinderConfig.tile must be None or one of"),
    ("finetune sparsek", 2, "expected either --text FILE or --dataset NAME"),
    ("finetune sparsek --text t --split dev", 2, "--split has no effect without --dataset"),
    ("finetune sparsek --text t --steps 0", 1, "steps must be an integer of at least 1, got 0"),
    ("finetune sparsek --text t --graph-rows 3", 2, "--graph-rows is no option of sparsek"),
    (
        "finetune sparsek --text t --objective graph",
        1,
        "SparseK has no objective 'graph'; choose one of distill, lm",
    ),
    ("finetune sparsefinder --text t --graph-rows 0", 1, "graph_rows must be an integer of at least 1, got 0"),
    (
        "finetune sparsek --text t --objective lm --lm-weight 1",
        1,
        "lm_weight and hidden_weight belong to 'distill'",
    ),
    (
        "finetune sparsek --text t --objective attention --teacher-window 8",
        1,
        "teacher_window belongs to 'distill'; the objective 'attention' has no teacher of whole texts",
    ),
    ("finetune sparsek --text t --teacher-window -1", 1, "teacher_window must be an integer of at least 0, got -1"),
    ("finetune sparsek --text t --lora-steps 3", 1, "lora_steps: the adapter has no LoRA, its lora_rank is 0"),
    ("finetune sparsek --text t --chunks some", 1, "chunks must be START:STOP, got 'some'"),
    ("eval sparsek --text t --length 1", 1, "length must be at least 2 tokens, got 1"),
    ("eval sparsek --text t --batch-size 0", 1, "batch_size must be at least 1, got 0"),
    ("eval sparsek", 2, "expected --text FILE, --dataset NAME, --task NAME or --longbench FILE"),
    ("eval sparsek --text t --dataset d", 2, "expected either --text FILE or --dataset NAME"),
    ("eval sparsek --text t --column body", 2, "--column has no effect without --dataset"),
    ("eval sparsek --text t --sparsity half", 2, "expected numbers such as 0.5,0.8, got 'half'"),
    ("eval sparsefinder --text t --slots 9", 2, "--slots is no option of sparsefinder: see 'Options of SparseK'"),
    ("eval sparsefinder --text t --sparsity 1.5", 1, "sparsities must be a list of numbers, at least 0 and below 1"),
    ("report sparsek --chunks 0:2", 2, "--chunks has no effect without --text or --dataset"),
    ("report sparsek --text t --dataset d", 2, "expected either --text FILE or --dataset NAME"),
    ("report sparsek --split test", 2, "--split has no effect without --dataset"),
    ("push sparsek", 2, "Missing argument 'REPO_ID'"),
    ("export sparsek", 2, "Missing argument 'OUT'"),
    ("serve", 2, "Missing argument 'ADAPTER'"),
]


def test_mistakes(run, run_all):
    for (line, code, message), ended in zip(MISTAKES, run_all(line for line, _, _ in MISTAKES), strict=True):
        shown = " ".join(ended[2].replace("│", " ").split())
        assert ended[0] == code and message in shown, (line, ended)
    line, code, message = MISTAKES[0]
    completed = run(*SCRIPT, *line.split())
    assert completed.returncode == code and message in completed.stderr


@pytest.mark.full  # this process has imported the package too
def test_plain_imports_are_whole(tmp_path):
    """A program of the user's has all names and registered methods, whatever its arguments are."""
    program = tmp_path / "program.py"
    program.write_text(
        "import hf_sparse, peft\n"
        "hf_sparse.demo.CHECKPOINT, hf_sparse.evaluation.evaluate, hf_sparse.data.pack\n"
        "assert {'HF_SPARSE_SPARSEK', 'HF_SPARSE_SPARSEFINDER'} <= set(peft.PeftType.__members__)\n"
        "assert set(hf_sparse.__all__) <= set(vars(hf_sparse))\n"
        "import hf_sparse.finetune\n"
        "assert callable(hf_sparse.finetune.finetune) and not hasattr(hf_sparse, 'no_such_name')\n"
    )
    run = subprocess.run([sys.executable, program, "-m", "hf_sparse"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.full  # test_all_verbs_of_the_command_line begins without torch, and its verbs complete the import
def test_the_import_is_completed_before_a_verb_works(tmp_path):
    """In the process of the command line, which goes by the name of its script."""
    program = tmp_path / "hf-sparse"
    program.write_text(
        "import sys\n"
        "import hf_sparse\n"
        "from hf_sparse.cli.common import load_workflow\n"
        "assert not {'torch', 'peft', 'transformers', 'hf_sparse.library'} & set(sys.modules)\n"
        "load_workflow()\n"
        "assert 'hf_sparse.library' in sys.modules and hf_sparse.SparseKConfig(k=3).k == 3\n"
        "from hf_sparse import patch, patches, unpatch\n"
        "from hf_sparse.core.registry import registered_methods\n"
        "assert {'HF_SPARSE_SPARSEK', 'HF_SPARSE_SPARSEFINDER'} == set(registered_methods())\n"
        "assert patch is patches.patch and not hasattr(hf_sparse, 'no_such_name')\n"
    )
    run = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.full  # the test before has its parts, and the tests of the verbs that each calls `load_workflow`
def test_a_verb_completes_the_import(tmp_path):
    """The methods are registered when a verb of the real program begins its work."""
    run = subprocess.run(
        [*SCRIPT, "patch", "demo", "--output", "adapter"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0 and "256 keys per query and KV head" in run.stdout, run.stderr
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "HF_SPARSE_SPARSEK"
