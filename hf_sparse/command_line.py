"""Tell whether Python was started to run the command line, which answers most mistakes without importing torch."""

import sys
from collections.abc import Sequence
from pathlib import PurePath

#: Names of the console script, see `[project.scripts]` in pyproject.toml.
_SCRIPTS = ("hf-sparse", "hf-sparse.exe")


def is_command_line(arguments: Sequence[str], original: Sequence[str]) -> bool:
    """Tell whether Python was asked to run `hf-sparse` or `-m hf_sparse`.

    A program that imports hf_sparse, a worker process of the command line, and a test are none. Where this cannot be
    told (embedded interpreters, wrappers of other names) the answer is no, and the command line is slow but works.

    Args:
        arguments: `sys.argv`. While Python looks for the module of `-m`, its first element is `"-m"`.
        original: `sys.orig_argv`, which begins with the interpreter and its own options.

    >>> is_command_line(["/bin/hf-sparse", "--help"], ["python", "/bin/hf-sparse", "--help"])
    True
    >>> is_command_line(["-m", "--help"], ["python", "-X", "dev", "-m", "hf_sparse", "--help"])
    True
    >>> is_command_line(["-m", "hf_sparse"], ["python", "-m", "another_module", "hf_sparse"])
    False
    """
    if not arguments or len(arguments) >= len(original):
        return False
    target = original[len(original) - len(arguments)]  # what to run, followed by the arguments for it
    if arguments[0] == "-m":
        return target in ("hf_sparse", "-mhf_sparse")
    return target == arguments[0] and PurePath(target).name in _SCRIPTS


def started_as_command_line() -> bool:
    """Tell whether this process is `hf-sparse` or `python -m hf_sparse`."""
    return is_command_line(getattr(sys, "argv", []), sys.orig_argv)
