"""Each layer imports only those above it in the list of CONTRIBUTING.md, and neutral rooms know no method."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"hf_sparse": "hf_sparse", "patches": "hf_sparse.patches", "finetune": "hf_sparse.finetune"}

LAYERS = [
    ("_compat", "access_tokens", "atomic_files", "bundled", "command_line", "embeddings", "environment", "errors"),
    ("folders", "late_imports"),
    ("metrics", "weights"),
    ("ops",),
    ("core",),
    ("patches",),
    ("tuner",),
    ("model_kinds", "base_model", "chunks", "data", "overlap", "texts"),
    ("finetune",),
    ("evaluation", "figures", "adapters", "hub"),
    ("workflow",),
    ("methods",),
    ("demo", "cli", "library", "__main__", "__init__"),
]

#: The layers that may name a method; all others reach methods through `hf_sparse.core.registry`.
METHODS, TOP = "methods", ("demo", "cli", "library", "__main__", "__init__")


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


def test_neutral_modules_import_no_method():
    known = modules()
    neutral = {name for name in known if name.split(".")[1] not in (METHODS, *TOP)}
    pairs = {(module, other) for module in neutral for other in imported(known[module], known)}
    assert not {(module, other) for module, other in pairs if other.split(".")[1] == METHODS}


def test_methods_import_no_other_method():
    known = modules()
    for module in known:
        parts = module.split(".")
        if parts[1] == METHODS and len(parts) > 3:
            others = {other.split(".")[2] for other in imported(known[module], known) if other.split(".")[1] == METHODS}
            assert others <= {parts[2]}, module
