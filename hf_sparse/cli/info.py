"""Say what an adapter is: `hf-sparse info`."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from hf_sparse.cli.common import Folder, console_for_tables, load_workflow


def info(
    folder: Folder,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what the adapter in DIR is: method, base model, budget, parameters, and what it was trained and measured on.

    Neither the base model nor the network is needed. DIR may hold a full model too, whose measurements are on its card.
    """
    load_workflow()
    from hf_sparse.adapters.load import adapter_in

    with adapter_in(folder) as adapter:
        show(adapter, as_json=json)


def show(adapter: Any, *, as_json: bool) -> None:
    """Print what is known of an adapter, of an `AdapterFolder`."""
    from json import dumps

    content = describe(adapter)
    if as_json:
        typer.echo(dumps(content, indent=2))
        return
    console, view = console_for_tables(), Table.grid(padding=(0, 2))
    for name, value in content.items():
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            view.add_row(name.replace("_", " "), escape(shown))
    console.print(view)
    if content["measured"] is not None and adapter.evaluation is not None and "measurement_problem" not in content:
        from hf_sparse.evaluation import tables

        for table in tables(adapter.evaluation):
            console.print(table)


def describe(adapter: Any) -> dict[str, Any]:
    """Return what is known of an adapter, of an `AdapterFolder`; `None` for what is not there."""
    from hf_sparse.core.registry import method_of
    from hf_sparse.errors import DataError

    config = adapter.config
    content = {
        "method": method_of(config).layer.label,
        "base_model": adapter.base_model,
        "model_class": adapter.model_class,
        "attends_to": config.attended(),
        "layers": "all" if config.layers is None else ", ".join(map(str, config.layers)),
        "parameters": adapter.parameters - adapter.lora_parameters,
        "lora_parameters": adapter.lora_parameters or None,
        "head_parameters": adapter.head_parameters or None,
        "trained": None if adapter.training is None else _training(adapter.training),
        "measured": None if adapter.evaluation is None else _measured(adapter.evaluation),
    }
    for problem, check in (("training_problem", "checked_training"), ("measurement_problem", "checked_evaluation")):
        try:
            getattr(adapter, check)
        except DataError as error:
            content[problem] = str(error)
    return content


def _training(training: dict[str, Any]) -> str:
    """Return a few words on a finetune.json: the losses of each stage, for those of two cannot be compared."""
    history = training.get("history") or []
    losses: dict[str, list[float]] = {}
    for row in history:
        losses.setdefault(row.get("stage", training["objective"]), []).append(row["loss"])
    words = [f"{stage} {of_stage[0]:.4g} to {of_stage[-1]:.4g}" for stage, of_stage in losses.items()]
    loss = f", loss of {', of '.join(words)}" if words else ""
    return f"{training['objective']}, {len(history)} steps, {training['tokens']:,} tokens{loss}"


def _measured(evaluation: dict[str, Any]) -> str:
    """Return a few words on an eval.json."""
    text = evaluation.get("text") or {}
    return f"{text.get('name')}: {text.get('chunks')} chunks of {text.get('length')} tokens"
