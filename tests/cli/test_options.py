"""Options that are made from the fields of settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from hf_sparse.cli import app
from hf_sparse.cli.methods import METHODS
from hf_sparse.cli.options import SettingsOptions, with_options
from hf_sparse.core.registry import registered_methods
from hf_sparse.finetune.config import SharedSettings


@dataclass
class Walking:
    steps: int = field(default=3, metadata={"help": "Steps to walk."})
    pace: Literal["slow", "fast"] = field(default="slow", metadata={"help": "The pace."})
    rests: Sequence[float] = field(default=(0.5,), metadata={"help": "Rests such as [1].", "option": "--rest"})
    turn: int | None = field(default=4, metadata={"help": "Steps before a turn.", "none_as": 0})
    hidden: int = field(default=1, metadata={"help": "No option.", "cli": False})


@dataclass
class Riding:
    steps: int = field(default=7, metadata={"help": "Steps of the horse."})
    saddle: bool = field(default=True, metadata={"help": "Use a saddle."})


OPTIONS = SettingsOptions({"walk": [Walking], "ride": [Riding]}, {"walk": "Walking", "ride": "Riding"})


@pytest.fixture
def invoke():
    """Run a command with the options of both, and return its result and what it was given."""
    program, given = typer.Typer(), {}

    @program.command()
    @with_options(settings=OPTIONS.parameters)
    def go(context: typer.Context, method: str, settings: dict[str, Any]) -> None:
        given.update(OPTIONS.given(context, method))

    def invoke(*arguments: str):
        given.clear()
        return CliRunner().invoke(program, list(arguments), env={"COLUMNS": "160"}), dict(given)

    return invoke


def test_only_what_is_given_counts(invoke):
    assert invoke("walk")[1] == {}
    assert invoke("walk", "--steps", "3", "--rest", "1,0.25", "--turn", "0", "--pace", "fast")[1] == {
        "steps": 3,
        "rests": [1.0, 0.25],
        "turn": None,
        "pace": "fast",
    }
    assert invoke("ride", "--no-saddle")[1] == {"saddle": False}


def test_options_of_another_method(invoke):
    result, given = invoke("walk", "--saddle")
    assert result.exit_code == 2 and not given
    assert "--saddle is no option of walk: see 'Options of Riding' in --help" in " ".join(result.output.split())


def test_help(invoke):
    shown = " ".join(invoke("--help")[0].output.replace("│", " ").split())
    assert "Options of Walking" in shown and "Options of Riding" in shown and "--hidden" not in shown
    assert "Walking: Steps to walk. Riding: Steps of the horse." in shown and "[default: 3]" not in shown
    assert "<slow|fast>" in shown or "[slow|fast]" in shown
    assert "Rests such as [1]." in shown and "Steps before a turn. 0 stands for None." in shown


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_an_option(name):
    """But for those that say that they have none."""
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    method = METHODS[name]
    settings: dict[str, list[Any]] = {
        "patch": [method.adapter],
        "finetune": [SharedSettings, method.training],
        "eval": [method.evaluation],
    }
    for verb, kinds in settings.items():
        options = {parameter.name: parameter for parameter in commands[verb].params}
        expected = {f.name for kind in kinds for f in fields(kind) if f.metadata.get("cli", True)}
        assert expected <= options.keys()
        assert all(options[option].help for option in expected)


def test_methods_describe_themselves_as_they_are_registered():
    registered = registered_methods()
    for method in METHODS.values():
        other = registered[method.peft_type]
        assert (method.name, method.label) == (other.name, other.layer.label)
        assert issubclass(other.config, method.adapter) and other.config.__name__ == method.adapter.config_name
        training = other.training()
        assert training.settings_type is method.training
        assert {"distill", "lm", *method.training.objectives} == set(training.objectives)
