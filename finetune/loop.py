"""Train a model in one function, from checks to metrics."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_sparse.data import check_chunks, fingerprint, tensors
from hf_sparse.finetune import recorded_loss, teacher
from hf_sparse.finetune.config import FinetuneConfig
from hf_sparse.finetune.float8 import products_in_float8
from hf_sparse.finetune.identity import adapter_sha256, adapter_tensors, base_sha256
from hf_sparse.finetune.journal import Journal
from hf_sparse.finetune.metrics import metrics_of
from hf_sparse.finetune.optimiser_step import Run, are_finite, make_optimizer, set_learning_rates, take_step
from hf_sparse.finetune.order import ShuffledRows, first_rows
from hf_sparse.finetune.peak import share_of_peak
from hf_sparse.finetune.processes import (
    copy_from_first_process,
    make_accelerator,
    prepare_model,
    separate_accelerate_state,
    warn_of_slow_dtype,
)
from hf_sparse.finetune.record import write_metrics
from hf_sparse.finetune.resume import Progress, held, resume
from hf_sparse.finetune.sharding import reshard
from hf_sparse.finetune.stages import Stage, Training, training_of
from hf_sparse.finetune.trainable import check_frozen, only_trained, warn_of_untrained
from hf_sparse.progress import ProgressLines, is_terminal

#: The most chunks that a method reads to fit what is fitted, and not trained.
FITTED = 8

_SAMPLED = 4  # steps of a stage that an estimate measures: a step that is recorded at all is so in the third
_LOGGED = 50  # steps of a run that measure what costs time

_Plan = Sequence[tuple[Stage, int]]  # of every optimiser step the stage, and its number within that


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
        TypeError: the settings are no `FinetuneConfig`, or the model is what wraps one, as `torch.compile` does.
        ValueError: parameters other than the adapter's would be trained, the method or model has no such objective or
            setting, the adapter or gradients are switched off, or a loss, a gradient or what is learned is not finite.
        BusyError: another run holds `output_dir`.
    """
    return _train(model, dataset, config)


def estimate(model: nn.Module, dataset: Any, config: FinetuneConfig | None = None) -> dict[str, Any]:
    """Measure the first steps of every stage of a run, and tell what all of it would take; nothing is written.

    Args:
        model, dataset, config: see `finetune`. The model is as it was afterwards.

    Returns:
        `steps`, `tokens`, `seconds`, `tokens_per_second`, and `peak_memory_bytes` of this process: of the GPU, or, of a
        run on the CPU, of all that the process holds; `None` where the system does not tell, as on Windows.
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
    config = _check_call(config)
    training = training_of(model, config)
    chunks, labels = tensors(model, dataset)
    check_chunks(model, chunks, labels)
    training.check(chunks)
    check_frozen(model, training)
    warn_of_untrained(model, training)
    output = Path(config.output_dir) if config.output_dir else None
    data = TensorDataset(chunks) if labels is None else TensorDataset(chunks, labels)

    with ExitStack() as stack:
        stack.enter_context(separate_accelerate_state())
        stack.enter_context(only_trained(model, training))
        accelerator = make_accelerator(config)
        warn_of_slow_dtype(model, accelerator)
        identity = _identity(training, accelerator, data)
        origin = {"first_weights": adapter_sha256(training.layers)}
        if output and (config.checkpoint_every or config.resume):
            origin = {"base": base_sha256(model, training.layers), **origin}
            stack.enter_context(held(output, accelerator))
        plan = _plan(training, most=_SAMPLED if sampled else None)
        # The model moves to its device here, before a checkpoint's moments are put beside its parameters.
        prepared = prepare_model(accelerator, model, training.layers)
        adamw = make_optimizer(training, config)
        progress = Progress(identity, origin)
        if output and config.resume:
            progress = resume(output, progress, plan, training.parameters, adamw, training.default_identity())
        run = Run(config, training, accelerator, prepared, adamw, accelerator.prepare_optimizer(adamw))
        batches = _batches(run, data, progress.step)
        copy_from_first_process(training.layers)
        stack.enter_context(products_in_float8(accelerator, model))
        journal = Journal(output, accelerator, training.recorded_settings(), progress.history)
        stack.callback(journal.close)
        rows = first_rows(len(chunks), config.seed, len(plan) * run.chunks_per_step)
        read = _reader(run, chunks, rows)
        with _given_back(run):
            first = [part[: config.batch_size].to(accelerator.device) for part in data.tensors]
            _say_plan(run, chunks)
            if progress.step:
                training.resume(progress.report)
            else:
                progress.report = training.begin(prepared, *first)
            _take_steps(run, plan, progress, batches, journal, read)
            if not sampled:
                training.finish(prepared, read, *first, report=progress.report)
            # Each process has fitted its own buffers; on GPUs the order of sums, and so the last bits, differ.
            copy_from_first_process(training.layers)
            _check_fitted(training)
        metrics = metrics_of(run, progress, data, rows)
        if output and accelerator.is_main_process:
            write_metrics(output, metrics)
    return metrics


def _check_call(config: FinetuneConfig | None) -> FinetuneConfig:
    """Return the settings; raise an error if they are none, or if there are no gradients."""
    config = FinetuneConfig() if config is None else config
    if not isinstance(config, FinetuneConfig):
        raise TypeError(f"expected a FinetuneConfig, got {type(config).__name__}: {config!r}")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ValueError("finetune needs gradients, which torch.no_grad and torch.inference_mode switch off around it")
    return config


def _identity(training: Training, accelerator: Accelerator, data: TensorDataset) -> dict[str, Any]:
    """Return what a run that goes on must have alike, as checkpoints hold it."""
    identity = {
        **training.recorded_settings(),
        "chunks": fingerprint(*data.tensors),
        "length": data.tensors[0].shape[1],  # the same tokens may be cut into other chunks
        "adapter": training.identity(),
        "processes": accelerator.num_processes,
    }
    held_as_json: dict[str, Any] = json.loads(json.dumps(identity))
    return held_as_json


def _plan(training: Training, most: int | None) -> _Plan:
    """List all optimiser steps of a run, or the first ones of every stage."""
    return [(stage, step) for stage in training.stages for step in range(stage.steps)[:most]]


def _batches(run: Run, data: TensorDataset, done: int) -> Iterator[Sequence[Tensor]]:
    """Yield the batches of this process without end, after those of the optimiser steps that are done."""
    order = ShuffledRows(len(data), run.config.seed, start=done * run.chunks_per_step)
    return iter(run.accelerator.prepare_data_loader(DataLoader(data, run.config.batch_size, sampler=order)))


def _reader(run: Run, chunks: Tensor, rows: set[int]) -> Callable[[], None]:
    """Return what runs the model on the first chunks, which methods fit to, and adds their numbers to `rows`."""

    def read() -> None:
        rows.update(range(min(FITTED, len(chunks))))
        for chunk in chunks[:FITTED].split(run.config.batch_size):
            run.model(input_ids=chunk.to(run.accelerator.device))

    return read


def _say_plan(run: Run, chunks: Tensor) -> None:
    """Print what the run is going to do."""
    if run.config.progress and run.accelerator.is_main_process:
        processes = run.accelerator.num_processes
        shared = f" in each of {processes} processes" if processes > 1 else ""
        print(f"{run.training.plan(chunks)}{shared}", file=sys.stderr, flush=True)


def _take_steps(
    run: Run,
    plan: _Plan,
    progress: Progress,
    batches: Iterator[Sequence[Tensor]],
    journal: Journal,
    read: Callable[[], None],
) -> None:
    """Take the optimiser steps of a plan that are left, and note and save how far the run has come."""
    training, config, started = run.training, run.config, progress.step
    bar = _progress_bar(run, len(plan), started)
    for number in range(started, len(plan)):
        stage, step = plan[number]
        enters = step == 0 or number == started
        if enters:
            _enter(training, stage, read)
        tick = time.perf_counter()  # what a stage prepares is no part of its first step
        if step == 0:
            run.adamw.state.clear()  # it holds moments of the loss of the stage before
        rate = set_learning_rates(run, stage, step)
        logged = number % max(1, len(plan) // _LOGGED) == 0 or step + 1 == stage.steps
        accumulated = [next(batches) for _ in range(config.gradient_accumulation_steps)]
        with training.step(stage, step, number, logged=logged) as measured:
            loss, norm = take_step(run, stage, number, accumulated, check_gradients=enters)
        speed = run.chunks_per_step * accumulated[0][0].shape[1] / (time.perf_counter() - tick)
        bar.update()
        bar.set_postfix(stage=stage.label, loss=f"{loss:.4f}", tokens_s=f"{speed:,.0f}")
        row = {"step": number + 1, "stage": stage.label, "loss": loss, "learning_rate": rate}
        row |= {"gradient_norm": norm, "tokens_per_second": speed} | measured
        progress.history.append(row)
        journal.add({**row, "seconds": progress.seconds, **_of_gpu(run, stage, speed)}, training.problem(stage, row))
        if config.output_dir and config.checkpoint_every and progress.step % config.checkpoint_every == 0:
            run.accelerator.wait_for_everyone()
            if run.accelerator.is_main_process:
                progress.save(Path(config.output_dir), training.parameters, run.adamw)
    bar.close()


def _progress_bar(run: Run, steps: int, done: int) -> Any:
    """Return a bar of the optimiser steps, or lines of them where there is no terminal."""
    learned, shown = run.training.learned, run.config.progress
    if is_terminal() or not (shown and run.accelerator.is_main_process):
        return tqdm(total=steps, initial=done, desc=learned, unit="step", disable=not shown)
    return ProgressLines(steps, f"{learned}, step", done)


def _enter(training: Training, stage: Stage, read: Callable[[], None]) -> None:
    """Let a stage begin or go on: what it does not train gets no gradient."""
    for name, parameter in training.parameters.items():
        parameter.requires_grad_(name in stage.parameters)
    training.enter(stage, read)


@contextmanager
def _given_back(run: Run) -> Iterator[None]:
    """Take from the model, after a `with` block, what its forwards and backwards have left in it."""
    model = run.training.model
    try:
        yield
    finally:
        run.adamw.zero_grad()
        run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
        reshard(model)
        teacher.forget(model)
        recorded_loss.forget(model)


def _of_gpu(run: Run, stage: Stage, speed: float) -> dict[str, float]:
    """Return what `finetune.jsonl` tells of the GPU in a step at `speed` tokens per second; nothing on a CPU."""
    device = run.accelerator.device
    if device.type != "cuda":
        return {}
    told: dict[str, float] = {"memory_bytes": torch.cuda.max_memory_allocated()}
    speed, name = speed / run.accelerator.num_processes, torch.cuda.get_device_name(device)
    share = share_of_peak(run.model, stage.name, speed, name, mixed_precision=run.config.mixed_precision)
    return told if share is None else {**told, "share_of_peak": share}


def _check_fitted(training: Training) -> None:
    """Raise `ValueError` if a tensor is not finite in the end; one that was never fitted is NaN throughout."""
    for layer in training.layers:
        if not are_finite(t for t in adapter_tensors(layer).values() if not t.isnan().all()):
            raise ValueError(f"what was fitted after the last step is not finite in layer {layer.layer}")


def _peak_memory() -> int | None:
    """Return the most bytes that this process has held; `None` on Windows, whose Python does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
