"""Read the options of a run from a YAML file, and write the command that does a run again."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from hf_sparse.cli.options import was_given

#: Options that say how and where a run works, and not what it gives.
_NOT_REPEATED = {"config", "dry_run", "resume", "tracker"}


def read_options(context: typer.Context, path: Path | None) -> Path | None:
    """Give options that are not on the command line the values that they have in a YAML file, for `--config`.

    Raises:
        typer.BadParameter: the file cannot be read, holds no mapping, or names an option that the verb does not have.
    """
    if path is None:
        return None
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} must hold options by their names, got {type(content).__name__}")
    values = {str(name).replace("-", "_"): value for name, value in content.items()}
    known = {p.name for p in context.command.params if p.param_type_name == "option"} - {"config", "help"}
    if unknown := sorted(values.keys() - known):
        raise typer.BadParameter(f"{path} has {', '.join(unknown)}, which are no options; see --help")
    several = {p.name for p in context.command.params if getattr(p, "multiple", False)}
    joined = {name: _text(value) if name not in several else value for name, value in values.items()}
    context.default_map = {**(context.default_map or {}), **joined}
    return path


def repeating_command(context: typer.Context) -> str:
    """Return the command that does the same run again, with the names of files instead of their paths."""
    words = ["hf-sparse", str(context.info_name), "DIR"]
    for parameter in context.command.params:
        name = str(parameter.name)
        if parameter.param_type_name != "option" or name in _NOT_REPEATED or not was_given(context, name):
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append(parameter.opts[0] if value else (parameter.secondary_opts or [""])[0])
            continue
        for one in value if name == "text" else [value]:
            words += [
                parameter.opts[0],
                Path(one).name if isinstance(one, Path) or Path(str(one)).exists() else _text(one),
            ]
    return shlex.join(word for word in words if word)


def _text(value: Any) -> Any:
    """Return a value as it is written on the command line: lists with commas."""
    if isinstance(value, Iterable) and not isinstance(value, str | dict):
        return ",".join(map(str, value))
    return value if value is None or isinstance(value, bool) else str(value)
