"""Each layer imports only those above it in the list of CONTRIBUTING.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"hf_sparse": "hf_sparse", "patches": "hf_sparse.patches", "finetune": "hf_sparse.finetune"}

LAYERS = [
    ("errors", "embeddings", "files", "folders", "machine", "metrics", "tokens", "weights", "demo.__init__", "_compat"),
    ("ops",),
    ("methods",),
    ("patches",),
    ("tuner",),
    ("tasks", "base", "data", "overlap"),
    ("finetune",),
    ("evaluation", "figures", "adapter", "card", "results", "repo", "kept", "hub", "saving"),
    ("workflow", "report", "demo", "cli", "__main__", "__init__"),
]


def modules() -> dict[str, Path]:
    """Every source file by its long name; a package's is that of its `__init__`."""
    return {
        ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)): path
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def layer(module: str) -> int:
    short = module.removeprefix("hf_sparse.")
    (found,) = {n for n, names in enumerate(LAYERS) if short in names} or {
        n for n, names in enumerate(LAYERS) if any(short.startswith(f"{name}.") for name in names)
    }
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of hf-sparse that a file imports, those within its functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        for name in names:
            if name.split(".")[0] == "hf_sparse":
                # A module, a package, or a name that one of them holds.
                holder = name.rpartition(".")[0]
                yield next(m for m in (name, f"{name}.__init__", holder, f"{holder}.__init__") if m in known)


def test_imports_go_up_the_list():
    known = modules()
    pairs = {(module, other) for module, path in known.items() for other in imported(path, known)}
    assert len(pairs) > 300
    assert not {(module, other) for module, other in pairs if layer(other) > layer(module)}


def test_what_serves_all_methods_imports_none():
    known = modules()
    neutral = ["tuner", "finetune.loop", "finetune.training", "adapter", "card", "repo", "hub", "workflow", "report"]
    found = {name: set(imported(known[f"hf_sparse.{name}"], known)) for name in neutral}
    methods = ("hf_sparse.methods.sparsek", "hf_sparse.methods.sparsefinder")
    assert not {(name, other) for name, others in found.items() for other in others if other.startswith(methods)}
