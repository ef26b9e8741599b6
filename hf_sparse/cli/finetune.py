"""Train an adapter: `hf-sparse finetune`."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from hf_sparse.cli.common import (
    Dataset,
    Folder,
    Texts,
    check_source,
    dataset_options,
    is_measured,
    load_workflow,
    reading_options,
    say_written,
)
from hf_sparse.cli.errors import complain
from hf_sparse.cli.methods import METHODS, configuration_in, method_in, options_of
from hf_sparse.cli.options import option, refuse_without, with_options
from hf_sparse.cli.run_file import read_options, repeating_command
from hf_sparse.environment import is_launched
from hf_sparse.finetune.config import SharedSettings
from hf_sparse.finetune.launch import check_launch, launch

#: The objectives that only one method has, with the method's label and a few words on each.
_OBJECTIVES = {
    name: f"{name} ({method.label}): {summary}"
    for method in METHODS.values()
    for name, summary in method.training.objectives.items()
}
_SETTINGS = options_of(lambda method: [SharedSettings, method.training])
_SETTINGS.replace(
    option(
        "objective",
        Literal[("distill", "lm", *_OBJECTIVES)],
        SharedSettings.objective,
        " ".join(["distill: stay close to dense attention. lm: predict tokens.", *_OBJECTIVES.values()]),
    )
)
_DATASET = [
    *dataset_options(),
    option(
        "stream",
        Literal["joined", "separate"] | None,
        None,
        "Read only as many rows as the run takes, shuffled. joined: chunks go on over the end of a row. separate: no "
        "chunk holds two rows, and the rest of a row that fills none is left out.",
    ),
]


@with_options(part=_DATASET, settings=_SETTINGS.parameters, reading=reading_options())
def finetune(
    context: typer.Context,
    folder: Folder,
    part: dict[str, Any],
    settings: dict[str, Any],
    reading: dict[str, Any],
    text: Texts = None,
    dataset: Dataset = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Start N processes that share the work, with accelerate.")
    ] = None,
    accelerate_config: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How they share it: ddp; fsdp2 or zero3, which divide the base; or a file of `accelerate config`.",
        ),
    ] = "ddp",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure the first steps, tell what the run takes, and write nothing.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", is_eager=True, callback=read_options, help="YAML with options of this verb, by their names."
        ),
    ] = None,
    retrieval: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the chunks in which facts are hidden and asked for further on, so that needles are kept; by "
            "default what the method learns best with, 0 for none.",
        ),
    ] = None,
) -> None:
    """Train the adapter in DIR and write it back, with finetune.json."""
    check_source(context, text, dataset, part, needed=True)
    if num_processes is None:
        refuse_without(context, "--num-processes", ["accelerate_config"])
    if part["stream"] and reading["chunks"]:
        raise typer.BadParameter("--chunks names chunks of a whole text, and --stream reads none")
    given = _checked_settings(context, folder)
    if num_processes is not None and not is_launched():
        raise typer.Exit(launch(sys.argv[1:], num_processes, accelerate_config))
    check_launch(num_processes)
    workflow = load_workflow()
    from hf_sparse.environment import is_main_process
    from hf_sparse.finetune import FinetuneConfig
    from hf_sparse.texts import Documents, hub_dataset, read_dataset, read_texts

    settings_of_run = FinetuneConfig(**given)
    measured = is_measured(folder)
    source = None
    if dataset:
        place = (dataset, part["dataset_config"], part["split"], part["column"])
        source = hub_dataset(*place)
        words = Documents(*place, settings_of_run.seed) if part["stream"] else read_dataset(*place)
    else:
        words, _ = read_texts(text or [])
    try:
        options = {
            "separate": part["stream"] == "separate",
            "dataset": source,
            "retrieval": retrieval,
            "dry_run": dry_run,
            "command": repeating_command(context),
            **reading,
        }
        metrics = workflow.train_adapter(folder, words, settings_of_run, **options)
    except KeyboardInterrupt:
        complain(f"interrupted; the adapter in {folder} is as it was; {_way_to_go_on(folder)}")
        raise typer.Exit(130) from None
    if is_main_process():
        console = Console()
        console.print(_estimated(metrics) if dry_run else _trained(metrics), soft_wrap=True)
        if not dry_run:
            say_written(console, folder, "trained adapter and finetune.json", was_measured=measured)


def _checked_settings(context: typer.Context, folder: Path) -> dict[str, Any]:
    """Return the settings that were given, as far as they can be checked without torch.

    Raises:
        typer.BadParameter: a setting of another method than that of the adapter in the folder.
        ValueError: a value out of range, or a setting of LoRA for an adapter without.
    """
    method = method_in(folder)
    given = {**_SETTINGS.given(context, method), "output_dir": str(folder)}
    shared = SharedSettings(**{name: value for name, value in given.items() if hasattr(SharedSettings, name)})
    if method is not None:
        own = METHODS[method].training(
            **{name: value for name, value in given.items() if not hasattr(SharedSettings, name)}
        )
        own.check_objective(shared.objective)
        for_lora = [name for name in given if name in _SETTINGS.marked("needs_lora")]
        if for_lora and configuration_in(folder).get("lora_rank") == 0:
            raise ValueError(f"{', '.join(for_lora)}: the adapter has no LoRA, its lora_rank is 0")
        if shared.objective in _OBJECTIVES and shared.objective not in own.objectives:
            choices = ", ".join(["distill", "lm", *own.objectives])
            raise ValueError(f"{METHODS[method].label} has no objective {shared.objective!r}; choose one of {choices}")
    return given


def _estimated(estimate: dict[str, Any]) -> str:
    """Say what a run would take, see `hf_sparse.finetune.estimate`."""
    peak = estimate["peak_memory_bytes"]
    memory = "" if peak is None else f" and {peak / 2**30:.1f} GiB of memory in each process"
    return (
        f"{estimate['steps']} steps on {estimate['tokens']:,} tokens would take about {estimate['seconds']:.0f} s "
        f"({estimate['tokens_per_second']:,.0f} tokens/s){memory}; nothing was written"
    )


def _trained(metrics: dict[str, Any]) -> str:
    """Say what a run did, see `hf_sparse.finetune.finetune`."""
    first, last = metrics["history"][0], metrics["history"][-1]
    return (
        f"{last['step']} steps on {metrics['tokens']:,} tokens in {metrics['seconds']:.0f} s; loss of the first step "
        f"{first['loss']:.4f} ({first['stage']}), of the last {last['loss']:.4f} ({last['stage']})"
    )


def _way_to_go_on(folder: Path) -> str:
    """Say how an interrupted run is continued."""
    from hf_sparse.finetune.checkpoint import latest

    saved = latest(folder)
    if saved is None:
        return "with --checkpoint-every N a run can be resumed"
    return f"the same command with --resume continues from {saved.name}"
