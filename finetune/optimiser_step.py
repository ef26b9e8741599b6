"""Take an optimiser step: the gradients of its batches, their mean over all processes, and the checks of both."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from hf_sparse.finetune.config import FinetuneConfig
from hf_sparse.finetune.processes import average_gradients, batch_weights
from hf_sparse.finetune.recompute import recomputed
from hf_sparse.finetune.stages import Stage, Training


@dataclass(frozen=True)
class Run:
    """Hold what every optimiser step of a run uses.

    Attributes:
        config: settings.
        training: of the model's method.
        accelerator: of this process.
        model: the model as accelerate prepared it.
        adamw: the optimiser over all that is trained, a group for LoRA and one for the rest.
        optimizer: `adamw` as accelerate prepared it.
    """

    config: FinetuneConfig
    training: Training
    accelerator: Accelerator
    model: nn.Module
    adamw: torch.optim.AdamW
    optimizer: Any

    @property
    def chunks_per_step(self) -> int:
        """Return how many chunks all processes read in an optimiser step."""
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.accelerator.num_processes


def make_optimizer(training: Training, config: FinetuneConfig) -> torch.optim.AdamW:
    """Make an optimiser over all that is trained.

    LoRA has a group of its own, which has its own learning rate and is clipped apart: its gradients would shrink the
    steps of what the method itself learns.
    """
    groups: list[dict[str, Any]] = [
        {
            "params": [p for name, p in training.parameters.items() if (name in training.lora) == is_lora],
            "is_lora": is_lora,
        }
        for is_lora in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def set_learning_rates(run: Run, stage: Stage, step: int) -> float:
    """Set the learning rates of a step of a stage, and return that of what the method itself learns."""
    share = _schedule(run.config, stage, step)
    for group in run.adamw.param_groups:
        group["lr"] = share * (run.config.lora_learning_rate if group["is_lora"] else stage.learning_rate)
    return share * stage.learning_rate


def take_step(
    run: Run, stage: Stage, number: int, batches: Sequence[Sequence[Tensor]], *, check_gradients: bool
) -> tuple[float, float]:
    """Take one optimiser step.

    Args:
        run: of the step.
        stage: of the step.
        number: of the step, within the run.
        batches: as many as are accumulated; each has chunks `[B, T]`, and labels where the model needs them.
        check_gradients: whether to see that the loss reaches all that the stage trains, and nothing else.

    Returns:
        The mean loss of all processes, and the norm of the gradient before it was clipped.

    Raises:
        ValueError: loss, gradients or the new weights are not finite. But for the last case nothing has changed.
    """
    training = run.training
    losses, loss = _backward(run, stage, batches)
    if check_gradients and losses.isfinite().all():  # else all processes stop below, together
        _check_gradients(training.model, stage.parameters)
    loss = average_gradients(run.accelerator, stage.parameters, loss)
    # What a look at a number would wait for is looked at once, when the device has all of the step to do.
    looked_at = torch.stack([value.to(loss.device) for value in (*losses, loss, *_clip(run))]).tolist()
    seen, norms = looked_at[: len(losses) + 1], looked_at[len(losses) + 1 :]
    _check_losses(training, stage, number, seen)
    if not all(map(math.isfinite, norms)):
        raise _diverged(f"the gradient of step {number + 1} ({stage.label}) is not finite", training)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if not are_finite(stage.parameters.values()):
        raise ValueError(
            f"the {training.learned} are not finite after step {number + 1} ({stage.label}), and nothing of them is "
            "saved; try a lower learning_rate"
        )
    return seen[-1], math.hypot(*norms)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether all numbers of all tensors are finite; the device is waited for once."""
    largest = get_total_norm([tensor.detach() for tensor in tensors if tensor.numel()], torch.inf)
    return bool(largest.isfinite())


def _backward(run: Run, stage: Stage, batches: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Add up the gradients of the batches of an optimiser step.

    Returns:
        The loss of each batch `[A]`, and the mean of this process, weighted.
    """
    training, accelerator = run.training, run.accelerator
    weights = batch_weights(accelerator, [training.targets(stage, *batch) for batch in batches])
    repeated = run.config.gradient_checkpointing and stage.repeatable
    losses, weighted = [], []
    for batch, weight in zip(batches, weights, strict=True):
        with accelerator.accumulate(run.model):
            with recomputed(training.model) if repeated else nullcontext():
                loss = training.loss(stage, run.model, *batch)
            accelerator.backward(weight * loss)
            losses.append(loss.detach())
            weighted.append((weight * loss).detach())
    return torch.stack(losses), torch.stack(weighted).mean()


def _clip(run: Run) -> list[Tensor]:
    """Clip the gradients of each group of parameters, and return the norms that they had, scalars on the device."""
    groups = run.adamw.param_groups
    return [run.accelerator.clip_grad_norm_(group["params"], run.config.max_grad_norm) for group in groups]


def _schedule(config: FinetuneConfig, stage: Stage, step: int) -> float:
    """Return the learning rate of a step, in units of its peak."""
    warm = min(config.warmup_steps, stage.steps // 2)
    if step < warm:
        return (step + 1) / warm
    return (stage.steps - step) / max(1, stage.steps - warm)


def _check_losses(training: Training, stage: Stage, number: int, losses: Sequence[float]) -> None:
    """Raise `ValueError` for a loss of a step that is not finite."""
    for loss in losses:
        if not math.isfinite(loss):
            raise _diverged(f"the loss of step {number + 1} ({stage.label}) is {loss}", training)


def _diverged(problem: str, training: Training) -> ValueError:
    """Make the error for a step that was not taken."""
    return ValueError(f"{problem}; the {training.learned} are those of the step before; try a lower learning_rate")


def _check_gradients(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """Raise `ValueError` unless, after a backward, all that is trained has a gradient, and nothing else has one."""
    missing = [name for name, p in trained.items() if p.grad is None]
    foreign = [name for name, p in model.named_parameters() if p.grad is not None and name not in trained]
    if foreign or missing:
        kind = "a frozen parameter received a" if foreign else "a trained parameter received no"
        raise ValueError(f"{kind} gradient: {(foreign or missing)[0]}")
    if not any(p.grad.any() for p in trained.values() if p.grad is not None):
        raise ValueError("all gradients are 0: nothing can be learned from these chunks")
