"""Keep how far a run has come, and go on from its last checkpoint if that is of the same run."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_sparse.core.checks import is_integer
from hf_sparse.environment import is_main_process
from hf_sparse.errors import DataError
from hf_sparse.finetune import checkpoint
from hf_sparse.finetune.identity import changed
from hf_sparse.finetune.record import weights_after
from hf_sparse.finetune.stages import Stage
from hf_sparse.folders import locked

# Settings that say how the chunks of a step are divided, and not which they are.
_DIVISION = ("batch_size", "gradient_accumulation_steps", "processes")


@dataclass
class Progress:
    """Hold how far a run has come, as its checkpoints have it.

    Attributes:
        identity: settings and fingerprints, which a run that goes on must have alike.
        origin: hashes of what the run began with: the weights of the adapter, and of the base if it has checkpoints.
        history: a row for each optimiser step that was taken.
        report: what the method tells of the run besides.
        began: when it would have begun without a break, in seconds of `time.perf_counter`.
    """

    identity: dict[str, Any]
    origin: dict[str, str]
    history: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @property
    def step(self) -> int:
        """Return how many optimiser steps were taken."""
        return len(self.history)

    @property
    def seconds(self) -> float:
        """Return how long the run has taken, without breaks."""
        return time.perf_counter() - self.began

    def save(self, output: Path, learned: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint into the folder of the run."""
        content = {"settings": self.identity, "origin": self.origin, "history": self.history, "report": self.report}
        checkpoint.save(output, self.step, learned, optimizer, {**content, "seconds": self.seconds})


@contextmanager
def held(output: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep the folder of a run with checkpoints from other runs for the length of a `with` block.

    Raises:
        BusyError: another run holds it.
        DataError: a file has the name of a checkpoint.
    """
    with ExitStack() as stack:
        if is_main_process():
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output))
            checkpoint.recover(output)
        accelerator.wait_for_everyone()
        yield


def resume(
    output: Path,
    new: Progress,
    plan: Sequence[tuple[Stage, int]],
    learned: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    adapter: Mapping[str, Any],
) -> Progress:
    """Load the last checkpoint of a run: put back parameters and optimiser state, and return how far it had come.

    Args:
        output: the folder of the run.
        new: of a run from the start, which it is if there is no checkpoint.
        plan: the stage of every step, and the step's number in it.
        learned: by name, all that is trained.
        optimizer: AdamW over them.
        adapter: defaults of the fields of the adapter's configuration, which a checkpoint has that was written before
            there were such fields.

    Raises:
        DataError: the checkpoint is damaged, or of a run that began with other weights.
        ValueError: its settings are others.
    """
    folder = checkpoint.latest(output)
    if folder is None:
        return new
    state, origin = checkpoint.load_state(folder), new.origin
    if weights_after(output, state) == origin["first_weights"]:  # the run ended with them, and may be repeated
        origin = origin | {"first_weights": state["origin"]["first_weights"]}
    settings = {"length": new.identity["length"], **state["settings"]}  # an older hf-sparse did not note it
    if isinstance(settings.get("adapter"), dict):
        settings = settings | {"adapter": {**adapter, **settings["adapter"]}}
    _check_resumable(folder, state | {"settings": settings}, new.identity, origin, len(plan))
    checkpoint.load_into(folder, state, learned, optimizer)
    checkpoint.check_steps(folder, optimizer, plan[state["step"] - 1][1] + 1)
    return Progress(new.identity, origin, state["history"], state["report"], time.perf_counter() - state["seconds"])


def _check_resumable(
    folder: Path, state: Mapping[str, Any], identity: Mapping[str, Any], origin: Mapping[str, Any], steps: int
) -> None:
    """Raise for a checkpoint of another run than this one.

    Raises:
        DataError: it began with another base model or with other weights, or is of a step beyond the plan.
        ValueError: its settings are others.
    """
    settings = state["settings"]
    different = [
        name
        for name, value in {**settings, **identity}.items()  # a name that one of them lacks is different as well
        if name not in identity or name not in settings or settings[name] != value
    ]
    if set(different) <= set(_DIVISION) and _chunks_per_step(settings) == _chunks_per_step(identity):
        different = []  # the same chunks, divided among processes and batches in another way
    if different:
        raise ValueError(f"cannot resume with other settings than the checkpoint's; different: {', '.join(different)}")
    names = {"base": "another base model (weights or dtype)", "first_weights": "other first weights"}
    noted = state["origin"] if state["format"] > 1 else {}  # an older hf-sparse noted nothing
    if others := changed(noted, origin):
        raise DataError(
            f"cannot resume from {folder.name}: it began with {names[others[0]]} than this run; load what it began "
            "with, or start over without resume"
        )
    if state["step"] > steps:
        raise DataError(
            f"cannot resume from {folder.name}: expected at most the {steps} steps of this run, got {state['step']}"
        )


def _chunks_per_step(settings: Mapping[str, Any]) -> int:
    """Return how many chunks all processes read in an optimiser step; 0 for settings that are damaged."""
    numbers: list[Any] = [settings.get(name) for name in _DIVISION]
    return math.prod(numbers) if all(is_integer(number, 1) for number in numbers) else 0
