"""Check the tables of documents: what tests show of models, behaviours and other libraries, and how fast serving is.

`pytest --write-golden tests/test_document_tables.py` writes them anew, between `<!-- table: NAME -->` and
`<!-- end -->`.
"""

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_sparse  # noqa: F401 - registers families and methods
from hf_sparse.core.registry import registered_methods
from hf_sparse.patches.base import check_model_type, supported_model_types
from hf_sparse.patches.unsupported import REASONS

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"


def load(path: Path) -> Any:
    """Import a file by path: the tests are no package."""
    name = f"hf_sparse_tests_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def functions_of(path: Path) -> Iterator[ast.FunctionDef]:
    """Yield the test functions of a file."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def said(node: ast.FunctionDef) -> str:
    """Return the sentence of a test: the first paragraph of its docstring."""
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)) + "\n"


def models() -> str:
    """Every type of models with a patch, and the tiny model of it on which the behaviours are tested."""
    tested: dict[str, Any] = {}
    for entry in load(TESTS / "families.py").FAMILIES.values():
        model_type = entry.make().config.model_type
        tested.setdefault(model_type, entry)
    rows = []
    for model_type in supported_model_types():
        family, entry = check_model_type(model_type), tested.get(model_type)
        rows.append(
            [
                f"`{model_type}`",
                "" if entry is None else "decoder" if entry.causal else "encoder",
                f"`{family.attention.partition(':')[2]}`",
                "some layers keep a window of their own" if entry and entry.local else "",
                "not tested" if entry is None else f"`{entry.model}`, {'few' if entry.kin else 'all'} behaviours",
            ]
        )
    return table(["model type", "kind", "patched", "", "`make test` runs"], rows)


def refused() -> str:
    return table(["model type", "reason"], [[f"`{name}`", reason] for name, reason in REASONS.items()])


def behaviours(file: str) -> str:
    """Every behaviour of a file of the conformance tests, and what each method does."""
    names = sorted({method.name for method in registered_methods().values()}, reverse=True)  # SparseK first
    methods = load(TESTS / "conformance" / "tiny_methods.py").METHODS
    rows = []
    for node in functions_of(TESTS / "conformance" / file):
        column = node.name.removeprefix("test_").replace("_", " ")
        always = ".refused(" in ast.unparse(node) and "refusals" not in ast.unparse(node)
        cells = []
        for name in names:
            partly = any(column in method.refusals for method in methods.values() if method.name == name)
            cells.append("refused" if always else "refused in part" if partly else "tested")
        rows.append([column, said(node).replace("|", "\\|"), *cells])
    labels = {method.name: method.layer.label for method in registered_methods().values()}
    return table(["behaviour", "what is checked", *(labels[name] for name in names)], rows)


# What other tests check: the library, the file under tests/, the test, and what is true of it.
ELSEWHERE = (
    ("transformers", "conformance/test_generation.py", "test_assisted", "works until slots are full, then refused"),
    ("transformers", "conformance/test_generation.py", "test_lookup", "works until slots are full, then refused"),
    ("transformers", "conformance/test_generation.py", "test_static_cache", "works"),
    ("transformers", "conformance/test_generation.py", "test_continuous_batching", "refused"),
    ("transformers", "conformance/test_adapter.py", "test_checkpointing", "works"),
    ("transformers", "conformance/test_adapter.py", "test_dtype", "works"),
    ("transformers", "patches/test_saving.py", "test_a_trainer_saves_and_resumes", "works"),
    ("torch", "patches/test_compiled_training.py", "test_soft_gates", "works"),
    ("accelerate", "finetune/test_processes.py", "test_processes_do_what_one_does", "works"),
    ("accelerate", "finetune/test_launch.py", "test_refuses_engines_and_settings", "refused"),
    ("DeepSpeed", "finetune/test_zero3.py", "test_processes_do_what_one_does", "works"),
    ("DeepSpeed", "finetune/test_zero3.py", "test_resumes_after_a_kill", "works"),
    ("kvpress", "kvpress/test_press.py", "test_what_is_kept_is_what_the_cache_of_the_patched_model_keeps", "works"),
    ("lm-evaluation-harness", "evaluation/test_lm_eval.py", "test_a_local_task", "works"),
)
LIBRARIES = {
    "test_transformers.py": "transformers, torch",
    "test_trl.py": "TRL",
    "test_sentence_transformers.py": "Sentence-Transformers",
    "test_quantised.py": "quantised bases",
    "test_float8.py": "accelerate, torchao",
    "test_trackers.py": "trackers of accelerate",
}


def composition() -> str:
    """Tabulate every test of tests/composition, and the tests elsewhere that answer the same question."""
    rows = []
    for file, library in LIBRARIES.items():
        for node in functions_of(TESTS / "composition" / file):
            result = "refused" if "pytest.raises" in ast.unparse(node) else "works"
            rows.append([library, said(node), result, f"`composition/{file}::{node.name}`"])
    for library, file, name, result in ELSEWHERE:
        node = next(node for node in functions_of(TESTS / file) if node.name == name)
        rows.append([library, said(node).replace("|", "\\|") or name, result, f"`{file}::{name}`"])
    return table(["library", "what", "result", "test"], rows)


def test_every_file_of_composition_has_a_library():
    assert set(LIBRARIES) == {path.name for path in (TESTS / "composition").glob("test_*.py")}


def measured(name: str) -> dict[str, Any]:
    """Read what a benchmark measured on the H200."""
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}-h200.json").read_text("utf-8"))
    return content


def prompts() -> str:
    """Tabulate how fast vLLM reads many short prompts on the CPU, in both ways."""
    path = ROOT / "benchmarks" / "results" / "serving_prompts-cpu.json"
    rows = []
    for budget in json.loads(path.read_text("utf-8"))["budgets"]:
        speed, operations = budget["tokens_per_second"], budget["operations_of_a_layer"]
        rows.append(
            [
                f"{budget['slots']:,}",
                f"{budget['prompts_that_fit_into_the_slots']} of {budget['prompts']}",
                *(f"{speed[way]:,.0f}" for way in ("one by one", "together")),
                f"{speed['together'] / speed['one by one']:.2f}",
                *(f"{operations[way]:,}" for way in ("one by one", "together")),
            ]
        )
    head = ["slots", "prompts that fit", "tokens/s one by one", "side by side", "ratio"]
    return table([*head, "operations one by one", "side by side"], rows)


def pool() -> str:
    """Tabulate the decoding steps of a pool without an engine."""
    rows = [
        [
            str(step["requests"]),
            f"{1000 * step['seconds']:.2f}",
            f"{step['tokens_per_second']:,.0f}",
            f"{step['share_of_roofline']:.0%}",
            f"{1000 * step['attention_seconds']:.2f}",
            f"{step['share_of_roofline_of_attention']:.0%}",
        ]
        for step in measured("serving_pool")["steps"]
    ]
    head = ["requests", "ms a step", "tokens/s", "share of the roofline", "attention alone, ms", "its share"]
    return table(head, rows)


def served(whole: bool) -> dict[int, dict[str, dict[str, Any]]]:
    """Return what vLLM measured with some number of requests, dense and sparse."""
    runs: dict[int, dict[str, dict[str, Any]]] = {}
    for kind in ("dense", "sparse"):
        for run in measured(f"serving_vllm-{kind}")["served"]:
            if run["prompts_are_read"] == whole:
                runs.setdefault(run["requests"], {})[kind] = run
    return dict(sorted(runs.items()))


def decoding() -> str:
    """Tabulate steps of vLLM with all requests in them."""
    rows = []
    for requests, run in served(whole=False).items():
        cells = [
            text
            for kind in ("dense", "sparse")
            for text in (
                [f"{1000 * run[kind]['step_seconds']:.1f}", f"{run[kind]['tokens_per_second_of_steps']:,.0f}"]
                if kind in run
                else ["", ""]
            )
        ]
        ratio = run["dense"]["step_seconds"] / run["sparse"]["step_seconds"] if len(run) == 2 else None
        rows.append([str(requests), *cells, "" if ratio is None else f"{ratio:.1f}"])
    head = ["requests", "dense: ms a step", "tokens/s", "sparse: ms a step", "tokens/s", "times dense"]
    return table(head, rows)


def whole() -> str:
    """Tabulate whole requests of vLLM: seconds until all had their first token, and all their tokens."""
    rows = []
    for requests, run in served(whole=True).items():
        times = (
            [f"{run[kind]['seconds_to_first_tokens'][-1]:.2f}", f"{run[kind]['seconds']:.2f}"]
            if kind in run
            else ["", ""]
            for kind in ("dense", "sparse")
        )
        rows.append([str(requests), *(text for pair in times for text in pair)])
    return table(["requests", "dense: first tokens, s", "all, s", "sparse: first tokens, s", "all, s"], rows)


def two_gpus() -> str:
    """Tabulate what vLLM measured with the KV heads on two GPUs: steps of all requests, then a whole request."""
    rows = []
    for run in measured("serving_vllm-sparse-2")["served"]:
        step, speed = f"{1000 * run['step_seconds']:.1f}", f"{run['tokens_per_second_of_steps']:,.0f}"
        first = [f"{run['seconds_to_first_tokens'][-1]:.2f}", f"{run['seconds']:.2f}"]
        rows.append([str(run["requests"]), step, speed, *(first if run["prompts_are_read"] else ["", ""])])
    return table(["requests", "ms a step", "tokens/s", "prompt read: first token, s", "all, s"], rows)


TABLES = {
    "docs/serving.md": {
        "two GPUs": two_gpus,
        "prompts": prompts,
        "pool": pool,
        "decoding": decoding,
        "whole": whole,
    },
    "docs/composition.md": {"composition": composition},
    "docs/supported.md": {
        "models": models,
        "refused": refused,
        **{
            name: lambda name=name: behaviours(f"test_{name}.py")
            for name in ("exactness", "generation", "encoders", "adapter")
        },
    },
}


@pytest.mark.parametrize("document", TABLES)
def test_tables(document, request):
    path = ROOT / document
    filled = text = path.read_text("utf-8")
    for name, write in TABLES[document].items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert place.search(text), f"{document} has no place for the table {name}"
        filled = place.sub(lambda match, write=write: match[1] + write() + match[2], filled)
    if request.config.getoption("write_golden"):
        path.write_text(filled, "utf-8")
    assert filled == path.read_text("utf-8"), "pytest --write-golden tests/test_document_tables.py writes it anew"
