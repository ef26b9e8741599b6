"""Make options of the command line, by hand or from the fields of settings."""

import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

#: How a list of numbers is written, by the type of its elements, in `--help` and in messages.
_LISTS = {int: ("N,N,...", "whole numbers such as 0,1"), float: ("X,X,...", "numbers such as 0.5,0.8")}


def option(name: str, kind: Any, default: Any, help: str, *names: str, **details: Any) -> Parameter:
    """Return a parameter of a verb of which typer makes an option.

    Args:
        name: the parameter's name in Python, from which the option's follows.
        kind: the type of its value.
        default: the value that holds where the option is not given.
        help: one or two sentences.
        names: other names than those that typer would choose.
        details: other arguments of `typer.Option`.
    """
    if not names and len(name) == 1:
        names = (f"--{name}",)  # typer's choice has one hyphen
    annotation = Annotated[kind, typer.Option(*names, help=escape(help), **details)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_options(**groups: Sequence[Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb groups of options: each argument named as a group becomes a dictionary of their values by name."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @wraps(verb)
        def run(**values: Any) -> None:
            collected = {group: {p.name: values.pop(p.name) for p in options} for group, options in groups.items()}
            verb(**values, **collected)

        written = signature(verb)
        own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in written.parameters.values() if p.name not in groups]
        parameters = [*own, *(p for options in groups.values() for p in options)]
        run.__signature__ = written.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def at_least(least: int, name: str, unit: str = "") -> Callable[[int | None], int | None]:
    """Return a callback for an option that refuses small numbers before anything is loaded, as the library does after.

    Args:
        least: the smallest number.
        name: what the message calls the number.
        unit: what is counted.
    """

    def check(value: int | None) -> int | None:
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}{unit and f' {unit}'}, got {value}")
        return value

    return check


def is_range(text: str | None) -> str | None:
    """Refuse an option's value that is not `START:STOP` before anything is loaded, as the library does after."""
    if text is not None and not re.fullmatch(r"\s*[+-]?\d*\s*:\s*[+-]?\d*\s*", text):
        raise ValueError(f"chunks must be START:STOP, got {text!r}")
    return text


def was_given(context: typer.Context, name: str) -> bool:
    """Tell whether an option stood on the command line, or in the file of options that was named there."""
    return getattr(context.get_parameter_source(name), "name", "") in ("COMMANDLINE", "DEFAULT_MAP")


def refuse_without(context: typer.Context, what: str, names: Iterable[str]) -> None:
    """Refuse options about something that was not asked for.

    Raises:
        typer.BadParameter: one of them was given.
    """
    for name in names:
        if was_given(context, name):
            raise typer.BadParameter(f"{_spelling(context, name)} has no effect without {what}")


class SettingsOptions:
    """Hold the options of a verb that are fields of settings, each once though several methods may have it.

    What all methods have is listed first; what one method alone has is listed in a panel named after it.

    Attributes:
        parameters: for `with_options`.
    """

    def __init__(self, classes: Mapping[str, Sequence[type]], labels: Mapping[str, str]) -> None:
        """Read the fields of dataclasses.

        Args:
            classes: the settings that each method takes, by the method's name.
            labels: what panels call the methods.
        """
        hints: dict[str, Any] = {}
        self._fields: dict[str, dict[str, Field[Any]]] = {}  # by name of the option and of the method
        self._panels: dict[str, str] = {}
        for method, kinds in classes.items():
            for kind in kinds:
                hints |= get_type_hints(kind)
                for field in fields(kind):
                    if field.metadata.get("cli", True):
                        self._fields.setdefault(field.name, {})[method] = field
        for name, owners in self._fields.items():
            if len(owners) < len(classes):
                self._panels[name] = f"Options of {' and '.join(labels[method] for method in owners)}"
        # sorted() keeps the order of the fields among those with and without a panel.
        names = sorted(self._fields, key=lambda name: name in self._panels)
        self.parameters = [self._parameter(name, hints[name], labels) for name in names]

    def given(self, context: typer.Context, method: str | None) -> dict[str, Any]:
        """Return the values that stood on the command line by the names of their fields.

        Args:
            context: of the verb.
            method: the method that they are for; `None` if that is not known yet.

        Raises:
            typer.BadParameter: an option that this method does not have.
        """
        values = {}
        for name, owners in self._fields.items():
            if not was_given(context, name):
                continue
            if method is not None and method not in owners:
                raise typer.BadParameter(
                    f"{_spelling(context, name)} is no option of {method}: see {self._panels[name]!r} in --help"
                )
            value = context.params[name]
            absent = next(iter(owners.values())).metadata.get("none_as", MISSING)
            values[name] = None if value == absent else value
        return values

    def marked(self, mark: str) -> set[str]:
        """Return the names of the options whose fields have a mark in their metadata."""
        return {
            name for name, owners in self._fields.items() if any(field.metadata.get(mark) for field in owners.values())
        }

    def replace(self, parameter: Parameter) -> None:
        """Put an option that was made by hand in the place of the one that follows from its field."""
        self.parameters = [parameter if p.name == parameter.name else p for p in self.parameters]

    def _parameter(self, name: str, hint: Any, labels: Mapping[str, str]) -> Parameter:
        """Return the option for a field, which has the same type in all methods that have it."""
        owners = self._fields[name]
        field = next(iter(owners.values()))
        helps = {method: _help(field) for method, field in owners.items()}
        together = len(set(helps.values())) == 1
        help = _help(field) if together else " ".join(f"{labels[method]}: {text}" for method, text in helps.items())
        same_default = all(_default(other) == _default(field) for other in owners.values())
        details: dict[str, Any] = {"rich_help_panel": self._panels.get(name)}
        if "metavar" in field.metadata:
            details["metavar"] = field.metadata["metavar"]
        names = [field.metadata["option"]] if "option" in field.metadata else []
        kind = _without_none(hint)
        if get_origin(kind) in (list, Sequence):
            (element,) = get_args(kind)
            details = {"metavar": _LISTS[element][0], "parser": _list_parser(element), **details}
            return option(name, Any, None, help, *names, **details)
        return option(name, kind | None, _default(field) if same_default else None, help, *names, **details)


def _help(field: Field[Any]) -> str:
    """Return the help of a field, and what stands for `None` on the command line."""
    text: str = field.metadata["help"]
    return f"{text} {field.metadata['none_as']} stands for None." if "none_as" in field.metadata else text


def _default(field: Field[Any]) -> Any:
    """Return the default of a field."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _without_none(hint: Any) -> Any:
    """Return `T` of the type `T | None`, and other types as they are."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (kind,) = (kind for kind in get_args(hint) if kind is not types.NoneType)
    return kind


def _list_parser(element: type) -> Callable[[str], list[Any]]:
    """Return a function that reads numbers with commas between them."""

    def parse(text: str) -> list[Any]:
        try:
            return [element(number) for number in text.split(",")]
        except ValueError:
            raise typer.BadParameter(f"expected {_LISTS[element][1]}, got {text!r}") from None

    return parse


def list_option(name: str, element: type, help: str) -> Parameter:
    """Return an option whose value is a list of numbers with commas between them; `None` where it is not given."""
    return option(name, Any, None, help, metavar=_LISTS[element][0], parser=_list_parser(element))


def _spelling(context: typer.Context, name: str) -> str:
    """Return an option as it is written on the command line."""
    return next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
