"""Train a model in one function from checks to metrics, and repeat the optimiser step."""

import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, TensorDataset

from hf_sparse.core.checks import is_integer
from hf_sparse.data import check_chunks, fingerprint, first_token, tensors
from hf_sparse.environment import describe, is_main_process
from hf_sparse.errors import DataError
from hf_sparse.finetune import checkpoint, recorded_loss, teacher
from hf_sparse.finetune.config import FinetuneConfig
from hf_sparse.finetune.float8 import products_in_float8
from hf_sparse.finetune.identity import adapter_sha256, adapter_tensors, base_sha256, changed
from hf_sparse.finetune.journal import Journal
from hf_sparse.finetune.launch import is_sharded
from hf_sparse.finetune.order import ShuffledRows, first_rows
from hf_sparse.finetune.peak import share_of_peak
from hf_sparse.finetune.processes import (
    average_gradients,
    batch_weights,
    copy_from_first_process,
    make_accelerator,
    prepare_model,
    separate_accelerate_state,
    warn_of_slow_dtype,
)
from hf_sparse.finetune.recompute import recomputed
from hf_sparse.finetune.record import parameter_counts, weights_after, write_metrics
from hf_sparse.finetune.sharding import reshard, share_of_base
from hf_sparse.finetune.stages import Stage, Training, training_of
from hf_sparse.folders import locked
from hf_sparse.overlap import sketch
from hf_sparse.patches.heads import parameters_saved, untrained_modules
from hf_sparse.progress import ProgressLines, is_terminal

# Settings that say how the chunks of a step are divided, and not which they are.
_DIVISION = ("batch_size", "gradient_accumulation_steps", "processes")

#: The most chunks that a method reads to fit what is fitted, and not trained.
FITTED = 8

_SAMPLED = 4  # steps of a stage that an estimate measures: a step that is recorded at all is so in the third


def finetune(model: nn.Module, dataset: Any, config: FinetuneConfig | None = None) -> dict[str, Any]:
    """Train what sparse attention has learned parameters for; the base model stays frozen.

    What that is, and in which stages, each method says. LoRA, of an adapter with a `lora_rank`, is trained beside it;
    the teacher is the base model without it. Modules that are saved with the adapter (`modules_to_save`), such as a
    head with labels, stay as they are: `transformers.Trainer` trains them.

    Args:
        model: what `peft.get_peft_model` returned, or a model patched by `hf_sparse.patch` whose other parameters are
            frozen.
        dataset: packed chunks, `[N, T]` int64, or a mapping or `datasets.Dataset` with `input_ids` of equal lengths. A
            masked language model needs `labels` as well, see `hf_sparse.data.mask_tokens`.
        config: settings; the defaults are the measured recipe of the model's method.

    Returns:
        The metrics that `finetune.json` holds: settings, parameters, tokens, time, and the history of the loss.
        The model is left in `eval` mode.

    Raises:
        DataError: chunks that cannot train this model.
        TypeError: the settings are no `FinetuneConfig`.
        ValueError: parameters other than the adapter's would be trained, the method or model has no such objective or
            setting, gradients are switched off, or a loss, a gradient or what is learned is not finite.
        BusyError: another run holds `output_dir`.
    """
    return _train(model, dataset, config)


def estimate(model: nn.Module, dataset: Any, config: FinetuneConfig | None = None) -> dict[str, Any]:
    """Measure the first steps of every stage of a run, and tell what all of it would take; nothing is written.

    Args:
        model, dataset, config: see `finetune`. The model is as it was afterwards.

    Returns:
        `steps`, `tokens`, `seconds`, `tokens_per_second`, and `peak_memory_bytes` of this process: of the GPU, or, of a
        run on the CPU, of all that the process holds.
    """
    if config is not None:
        nowhere: dict[str, Any] = {"output_dir": None, "checkpoint_every": 0, "resume": False, "tracker": None}
        config = replace(config, **nowhere, progress=False)
    training = training_of(model, FinetuneConfig() if config is None else config)
    kept = [
        (tensor, tensor.detach().clone()) for layer in training.layers for tensor in adapter_tensors(layer).values()
    ]
    try:
        metrics = _train(model, dataset, config, sampled=True)
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        training.undo()
    last = {row["stage"]: row["tokens_per_second"] for row in metrics["history"]}  # the first ones compile kernels
    tokens_per_step = metrics["tokens"] // len(metrics["history"])
    steps = sum(stage.steps for stage in training.stages)
    seconds = metrics["seconds"] - sum(tokens_per_step / row["tokens_per_second"] for row in metrics["history"])
    seconds += sum(stage.steps * tokens_per_step / last[stage.label] for stage in training.stages)
    tokens, memory = steps * tokens_per_step, metrics.get("peak_memory_bytes", _peak_memory())
    told = {"steps": steps, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    return told | {"peak_memory_bytes": memory}


def _train(model: nn.Module, dataset: Any, config: FinetuneConfig | None, *, sampled: bool = False) -> dict[str, Any]:
    """Do what `finetune` does, or the first steps of every stage only."""
    config = FinetuneConfig() if config is None else config
    if not isinstance(config, FinetuneConfig):
        raise TypeError(f"expected a FinetuneConfig, got {type(config).__name__}: {config!r}")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ValueError("finetune needs gradients, which torch.no_grad and torch.inference_mode switch off around it")
    training = training_of(model, config)
    chunks, labels = tensors(model, dataset)
    check_chunks(model, chunks, labels)
    training.check(chunks)
    learned = training.parameters
    _check_frozen(model, training)
    _warn_of_untrained(model, training)
    output = Path(config.output_dir) if config.output_dir else None
    settings = training.recorded_settings()
    identity = settings | {"chunks": fingerprint(chunks, labels), "adapter": training.identity()}
    state: dict[str, Any] = {"step": 0, "history": [], "seconds": 0.0}

    with ExitStack() as stack:
        stack.enter_context(separate_accelerate_state())
        stack.enter_context(_only_trained(model, training))
        accelerator = make_accelerator(config)
        warn_of_slow_dtype(model, accelerator)
        identity["processes"] = accelerator.num_processes
        identity = json.loads(json.dumps(identity))  # as checkpoints hold it
        weights_before = adapter_sha256(training.layers)
        origin: dict[str, Any] = {}
        if output and (config.checkpoint_every or config.resume):
            origin = {"base": base_sha256(model, training.layers), "first_weights": weights_before}
            if is_main_process():
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(output))
                checkpoint.settle(output)
            accelerator.wait_for_everyone()
        most = _SAMPLED if sampled else math.inf
        plan = [(stage, step) for stage in training.stages for step in range(int(min(stage.steps, most)))]
        # The model moves to its device here, before a checkpoint's moments are put beside its parameters.
        prepared = prepare_model(accelerator, model, training.layers)
        adamw = _optimizer(training, config)
        restart = checkpoint.latest(output) if output and config.resume else None
        if output and restart:
            state = checkpoint.load_state(restart)
            if weights_after(output, state) == weights_before:  # the run ended with these weights, and may be repeated
                origin["first_weights"] = state["origin"]["first_weights"]
            _check_resumable(restart, state, identity, origin, len(plan))
            checkpoint.load_into(restart, state, learned, adamw)
            checkpoint.check_steps(restart, adamw, plan[state["step"] - 1][1] + 1)
        history: list[dict[str, Any]] = state["history"]
        began = time.perf_counter() - state["seconds"]
        optimizer = accelerator.prepare_optimizer(adamw)
        chunks_per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        tokens_per_step = chunks_per_step * chunks.shape[1]
        order = ShuffledRows(len(chunks), config.seed, start=state["step"] * chunks_per_step)
        rows = TensorDataset(chunks) if labels is None else TensorDataset(chunks, labels)
        batches = iter(accelerator.prepare_data_loader(DataLoader(rows, config.batch_size, sampler=order)))
        copy_from_first_process(training.layers)
        stack.enter_context(products_in_float8(accelerator, model))
        run = _Run(config, training, accelerator, prepared, adamw, optimizer)
        journal = Journal(output, accelerator, settings, history)
        trained_on = first_rows(len(chunks), config.seed, len(plan) * chunks_per_step)

        def read() -> None:
            """Run the model on the first chunks, which methods fit to."""
            trained_on.update(range(min(FITTED, len(chunks))))
            for chunk in chunks[:FITTED].split(config.batch_size):
                prepared(input_ids=chunk.to(accelerator.device))

        try:
            first = [part[: config.batch_size].to(accelerator.device) for part in (chunks, labels) if part is not None]
            if config.progress and accelerator.is_main_process:
                processes = accelerator.num_processes
                shared = f" in each of {processes} processes" if processes > 1 else ""
                print(f"{training.plan(chunks)}{shared}", file=sys.stderr, flush=True)
            report = state["report"] if restart else training.begin(prepared, *first)
            if restart:
                training.resume(report)
            bar: Any = ProgressLines(len(plan), f"{training.learned}, step", state["step"])
            if is_terminal() or not (config.progress and accelerator.is_main_process):
                shown = {"desc": training.learned, "unit": "step", "disable": not config.progress}
                bar = tqdm(total=len(plan), initial=state["step"], **shown)
            for number in range(state["step"], len(plan)):
                stage, step = plan[number]
                enters = step == 0 or number == state["step"]
                if enters:
                    for name, parameter in learned.items():
                        parameter.requires_grad_(name in stage.parameters)
                    training.enter(stage, read)
                tick = time.perf_counter()  # what a stage prepares is no part of its first step
                if step == 0:
                    adamw.state.clear()  # it holds moments of the loss of the stage before
                share = _share_of_peak(config, stage, step)
                for group in adamw.param_groups:
                    group["lr"] = share * (config.lora_learning_rate if group["is_lora"] else stage.learning_rate)
                logged = number % max(1, len(plan) // 50) == 0 or step + 1 == stage.steps
                accumulated = [next(batches) for _ in range(config.gradient_accumulation_steps)]
                with training.step(stage, step, number, logged=logged) as measured:
                    loss, norm = _optimiser_step(run, stage, number, accumulated, check_gradients=enters)
                speed = tokens_per_step / (time.perf_counter() - tick)
                bar.update()
                bar.set_postfix(stage=stage.label, loss=f"{loss:.4f}", tokens_s=f"{speed:,.0f}")
                rate = share * stage.learning_rate  # of what the method itself learns; LoRA has its own
                row = {"step": number + 1, "stage": stage.label, "loss": loss, "learning_rate": rate}
                history.append(row | {"gradient_norm": norm, "tokens_per_second": speed} | measured)
                noted = {**history[-1], "seconds": time.perf_counter() - began, **_of_gpu(run, stage, speed)}
                journal.add(noted, training.problem(stage, history[-1]))
                if output and config.checkpoint_every and (number + 1) % config.checkpoint_every == 0:
                    accelerator.wait_for_everyone()
                    if accelerator.is_main_process:
                        content = {"settings": identity, "origin": origin, "history": history, "report": report}
                        content["seconds"] = time.perf_counter() - began
                        checkpoint.save(output, number + 1, learned, adamw, content)
            bar.close()
            journal.close()
            if not sampled:
                training.finish(prepared, read, *first, report=report)
            # Each process has fitted its own buffers; on GPUs the order of sums, and so the last bits, differ.
            copy_from_first_process(training.layers)
            _check_fitted(training)
        finally:
            adamw.zero_grad()
            for parameter in learned.values():
                parameter.requires_grad_(True)
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            reshard(model)
            teacher.forget(model)
            recorded_loss.forget(model)

        seconds, tokens = time.perf_counter() - began, len(plan) * tokens_per_step
        read_rows = sorted(trained_on)
        data = {"length": chunks.shape[1], "chunks": len(chunks), "chunks_sha256": identity["chunks"]}
        data |= {"first_token": first_token(model, chunks), "processes": accelerator.num_processes}
        weights = {"before": origin.get("first_weights", weights_before), "after": adapter_sha256(training.layers)}
        metrics = {
            "format": 1,
            "objective": config.objective,
            "settings": settings | data,
            **parameter_counts(model, training),
            "gradient_checkpointing": config.gradient_checkpointing,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "trained_on": sketch(chunks[read_rows], None if labels is None else labels[read_rows]),
            "history": history,
            "parameters_sha256": weights,
            **report,
            **describe(),
        }
        if is_sharded():
            metrics["base_share"] = share_of_base(model, training.layers)
        if accelerator.device.type == "cuda":
            metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if output and accelerator.is_main_process:
            write_metrics(output, metrics)
    return metrics


@dataclass(frozen=True)
class _Run:
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


def _optimiser_step(
    run: _Run, stage: Stage, number: int, batches: Sequence[Sequence[Tensor]], *, check_gradients: bool
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
    if not _are_finite(stage.parameters.values()):
        raise ValueError(
            f"the {training.learned} are not finite after step {number + 1} ({stage.label}), and nothing of them is "
            "saved; try a lower learning_rate"
        )
    return seen[-1], math.hypot(*norms)


def _backward(run: _Run, stage: Stage, batches: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
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


def _optimizer(training: Training, config: FinetuneConfig) -> torch.optim.AdamW:
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


def _clip(run: _Run) -> list[Tensor]:
    """Clip the gradients of each group of parameters, and return the norms that they had, scalars on the device."""
    groups = run.adamw.param_groups
    return [run.accelerator.clip_grad_norm_(group["params"], run.config.max_grad_norm) for group in groups]


def _of_gpu(run: _Run, stage: Stage, speed: float) -> dict[str, float]:
    """Return what `finetune.jsonl` tells of the GPU in a step at `speed` tokens per second; nothing on a CPU."""
    device = run.accelerator.device
    if device.type != "cuda":
        return {}
    told: dict[str, float] = {"memory_bytes": torch.cuda.max_memory_allocated()}
    speed, name = speed / run.accelerator.num_processes, torch.cuda.get_device_name(device)
    share = share_of_peak(run.model, stage.name, speed, name, mixed_precision=run.config.mixed_precision)
    return told if share is None else {**told, "share_of_peak": share}


def _peak_memory() -> int:
    """Return the most bytes that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _share_of_peak(config: FinetuneConfig, stage: Stage, step: int) -> float:
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


@contextmanager
def _only_trained(model: nn.Module, training: Training) -> Iterator[None]:
    """Put sparse layers into `train` mode and the base model, without dropout, into `eval` mode, for a `with` block.

    What no stage trains, such as LoRA with an objective that only reads the model, or a head, gets no gradient
    meanwhile. Afterwards all is in `eval` mode, whatever happens.
    """
    learned = {id(parameter) for parameter in training.parameters.values()}
    of_adapter = [p for layer in training.layers for p in layer.parameters()] + parameters_saved(model)
    idle = [parameter for parameter in of_adapter if parameter.requires_grad and id(parameter) not in learned]
    model.eval()
    for layer in training.layers:
        layer.train()
    for parameter in idle:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in idle:
            parameter.requires_grad_(True)
        model.eval()


def _check_frozen(model: nn.Module, training: Training) -> None:
    """Make what is trained trainable, and raise `ValueError` if anything but the adapter's parameters is besides."""
    for parameter in training.parameters.values():
        parameter.requires_grad_(True)
    of_adapter = {id(p) for layer in training.layers for p in layer.parameters()}
    of_adapter |= {id(p) for p in parameters_saved(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in of_adapter]
    if others:
        raise ValueError(
            f"{len(others)} parameters besides the {training.learned} would be trained, the first is {others[0]}: "
            "freeze them (model.requires_grad_(False)) or use peft.get_peft_model"
        )


def _warn_of_untrained(model: nn.Module, training: Training) -> None:
    """Warn of modules that are saved with the adapter and have random weights."""
    if untrained := untrained_modules(model):
        warnings.warn(
            f"{' and '.join(untrained)} of the adapter has the random weights that it was made with, and finetune "
            f"leaves it so, for it trains the {training.learned}: train it with transformers.Trainer, before or after",
            stacklevel=4,
        )


def _chunks_per_step(settings: Mapping[str, Any]) -> int:
    """Return how many chunks all processes read in an optimiser step; 0 for settings that are damaged."""
    numbers: list[Any] = [settings.get(name) for name in _DIVISION]
    return math.prod(numbers) if all(is_integer(number, 1) for number in numbers) else 0


def _check_resumable(
    folder: Path, state: Mapping[str, Any], identity: Mapping[str, Any], origin: Mapping[str, Any], steps: int
) -> None:
    """Raise for a checkpoint of another run than this one.

    Raises:
        DataError: it began with another base model or with other weights, or is of a step beyond the plan.
        ValueError: its settings are others.
    """
    different = [key for key, value in identity.items() if state["settings"].get(key) != value]
    if set(different) <= set(_DIVISION) and _chunks_per_step(state["settings"]) == _chunks_per_step(identity):
        different = []  # the same chunks, divided among processes and batches in another way
    if different or state["settings"].keys() != identity.keys():
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


def _check_gradients(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """Raise `ValueError` unless, after a backward, all that is trained has a gradient, and nothing else has one."""
    missing = [name for name, p in trained.items() if p.grad is None]
    foreign = [name for name, p in model.named_parameters() if p.grad is not None and name not in trained]
    if foreign or missing:
        kind = "a frozen parameter received a" if foreign else "a trained parameter received no"
        raise ValueError(f"{kind} gradient: {(foreign or missing)[0]}")
    if not any(p.grad.any() for p in trained.values() if p.grad is not None):
        raise ValueError("all gradients are 0: nothing can be learned from these chunks")


def _check_fitted(training: Training) -> None:
    """Raise `ValueError` if a tensor is not finite in the end; one that was never fitted is NaN throughout."""
    for layer in training.layers:
        if not _are_finite(t for t in adapter_tensors(layer).values() if not t.isnan().all()):
            raise ValueError(f"what was fitted after the last step is not finite in layer {layer.layer}")


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether all numbers of all tensors are finite; the device is waited for once."""
    largest = get_total_norm([tensor.detach() for tensor in tensors if tensor.numel()], torch.inf)
    return bool(largest.isfinite())
