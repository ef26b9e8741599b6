"""Each layer imports only those above it in the list of CONTRIBUTING.md, and neutral rooms know no method."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"hf_sparse": "hf_sparse", "patches": "hf_sparse.patches", "finetune": "hf_sparse.finetune"}

LAYERS = [
    ("_compat", "access_tokens", "atomic_files", "bundled", "command_line", "embeddings", "environment", "errors"),
    ("folders", "late_imports", "progress"),
    ("metrics", "weights"),
    ("ops",),
    ("core",),
    ("patches",),
    ("tuner",),
    ("model_kinds", "base_model", "chunks", "data", "overlap", "retrieval", "texts"),
    ("finetune",),
    ("evaluation", "figures", "adapters", "hub"),
    ("workflow", "serving"),
    ("methods",),
    ("demo", "cli", "library", "__main__", "__init__"),
]

#: The layers that may import a method; all others reach methods through `hf_sparse.core.registry`.
METHODS, TOP = "methods", ("demo", "cli", "library", "__main__", "__init__")

#: What belongs to one method: the names of the two, and what one of them calls its parts.
WORDS = re.compile("sparsek|sparsefinder|scorer|slots|selection", re.IGNORECASE)

#: Where a neutral module uses such a word all the same: beginning of its name, pattern of the whole text, reason.
EXCEPTIONS = [
    ("adapters.folder", "scorers_sha256", "a key of selection.json and graphs.json, which keep their keys"),
    ("cli.divide", "hf_sparse.methods.sparsek.divide|share of the slots by layer: ", "a verb for SparseK alone"),
    ("cli.unpatch", "hf_sparse.methods.sparsefinder.unpatch", "a verb for Sparsefinder alone"),
    ("cli.evaluate", "selections|--selection|task_slots|slots", "options of `hf-sparse eval`, which keep their names"),
    (
        "evaluation",
        r"selections|selections must be (among |a list of names, such as \[)",
        "an argument of `evaluate`, which keeps its name",
    ),
    ("evaluation", "(.* )?_?slots( .*|=.*)?", "what a budget counts: `Budget.slots`, and keys of eval.json"),
    ("finetune.checkpoint", "scorers.safetensors", "a file in checkpoints of an earlier version"),
    ("patches", "SparseKCache", "the first name of `SparseCache`, which programs of users import"),
    ("workflow", "selections|slots", "an argument of `evaluate_adapter`, and `Budget.slots`"),
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


def is_neutral(module: str) -> bool:
    """Tell whether a module may name no method: all below the methods but the mathematics, and the command line."""
    room = module.split(".")[1]
    return room == "cli" or (room != "ops" and layer(module) < layer(METHODS))


def words_in_code(path: Path) -> Iterator[str]:
    """Names and strings of a file that belong to one method, apart from docstrings and comments."""
    tree = ast.parse(path.read_text("utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            docstrings.add(id(first.value))
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        names = ("id", "attr", "arg", "name", "asname", "module", "value")
        texts = (getattr(node, name, None) for name in names)
        yield from (text for text in texts if isinstance(text, str) and WORDS.search(text))


def test_neutral_code_names_no_method():
    used, named = set(), []
    for module, path in modules().items():
        if not is_neutral(module):
            continue
        short = module.removeprefix("hf_sparse.")
        for text in words_in_code(path):
            reasons = [e for e in EXCEPTIONS if short.startswith(e[0]) and re.fullmatch(e[1], text)]
            used.update(reasons)
            named += [] if reasons else [f"{module}: {text}"]
    assert not named, "\n".join(named)
    assert used == set(EXCEPTIONS)  # none is left over


def test_a_word_of_a_method_would_be_found(tmp_path):
    """The test above reads imports, names, arguments and strings, and leaves docstrings out."""
    file = tmp_path / "module.py"
    file.write_text(
        '"""SparseK"""\nfrom a.sparsek import b as scorer\n'
        'def of_slots(selection):\n    """Sparsefinder"""\n    return f(slots=g.scorers, h=f"{i} selections")\n'
    )
    expected = {"a.sparsek", "scorer", "of_slots", "selection", "slots", "scorers", " selections"}
    assert set(words_in_code(file)) == expected


def test_the_table_of_layers_is_complete():
    """CONTRIBUTING.md shows the list above, and the list names what there is and nothing else."""
    table = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("| layer, from the ground up | holds |\n|---|---|\n")[1]
    rows = [line.split("|")[1] for line in table.split("\n\n")[0].splitlines()]
    assert [tuple(re.findall("`(.*?)`", row)) for row in rows] == LAYERS
    assert {name for names in LAYERS for name in names} == {module.split(".")[1] for module in modules()}
