"""Write what every step of a run was like: lines of JSON in its folder, trackers of accelerate, and early warnings."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

FILE = "finetune.jsonl"

_VANISHED = 1e-6  # of the largest gradient norm of a stage


class Journal:
    """Note the steps of a run, in its first process.

    Args:
        output: the folder of the run; `None` writes no file.
        accelerator: of this process, made with the tracker that was asked for.
        settings: of the run, which trackers show.
        earlier: rows of the steps before, of a run that is resumed.
    """

    def __init__(
        self,
        output: Path | None,
        accelerator: Accelerator,
        settings: Mapping[str, Any],
        earlier: Sequence[Mapping[str, Any]],
    ) -> None:
        self._path = output / FILE if output and accelerator.is_main_process else None
        self._accelerator = accelerator
        self._largest: dict[str, float] = {}
        self._warned: set[str] = set()
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(json.dumps(row) + "\n" for row in earlier), "utf-8")
        if accelerator.log_with:
            shown = {name: value if isinstance(value, int | float) else str(value) for name, value in settings.items()}
            accelerator.init_trackers("hf-sparse", config=shown)

    def add(self, row: Mapping[str, Any], problem: str | None) -> None:
        """Note a step.

        Args:
            row: of the history, and what else is measured.
            problem: what the method finds wrong with it, a warning that is given once.
        """
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        self._accelerator.log(numbers, step=row["step"])
        norm, stage = row["gradient_norm"], row["stage"]
        largest = self._largest[stage] = max(norm, self._largest.get(stage, 0.0))
        if norm <= _VANISHED * largest:
            problem = f"the gradient has vanished: its norm is {norm:.3g}, and was {largest:.3g}"
        if problem and stage not in self._warned and self._accelerator.is_main_process:
            self._warned.add(stage)
            warnings.warn(f"step {row['step']} ({stage}): {problem}", stacklevel=3)

    def close(self) -> None:
        """Let the trackers write what they hold and end, also after an error; the processes stay together."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


def check_tracker(name: str | None, output: str | None) -> None:
    """Check that a tracker can be used, which accelerate would leave out without one.

    Raises:
        ValueError: accelerate does not know it, its package is missing, or it needs a folder.
    """
    if name is None:
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"tracker must be one of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {name!r}")
    if name not in [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]:
        raise ValueError(f"the tracker {name!r} is not installed")
    if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and output is None:
        raise ValueError(f"the tracker {name!r} writes files, and needs an output_dir")
