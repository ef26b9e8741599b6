"""The training loop, flat: one function from checks to metrics."""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, broadcast, tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from hf_sparse.atomic_files import write_json
from hf_sparse.data import check_chunks, fingerprint, first_token, tensors
from hf_sparse.environment import describe, is_main_process
from hf_sparse.errors import DataError
from hf_sparse.finetune import checkpoint
from hf_sparse.finetune.config import FinetuneConfig
from hf_sparse.finetune.identity import adapter_sha256, adapter_tensors, base_sha256, changed
from hf_sparse.finetune.recompute import recomputed
from hf_sparse.finetune.stages import Stage, Training, training_of
from hf_sparse.folders import locked
from hf_sparse.overlap import sketch
from hf_sparse.patches.heads import parameters_saved, untrained_modules

# Ways to divide one model among processes.
_SHARDING = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)

# Chunks that predictors are fitted to in the end, at most.
FITTED = 8


def finetune(model: nn.Module, dataset: Any, config: FinetuneConfig | None = None) -> dict[str, Any]:
    """Train what sparse attention has learned parameters for; the base model stays frozen.

    Of SparseK these are the scorers; of Sparsefinder first the logit scales, then the projections, and in the end its
    predictors are fitted to the training text. LoRA, of an adapter with a `lora_rank`, is trained beside the scorers or
    scales; the teacher is the base model without it. Modules that are saved with the adapter (`modules_to_save`), such
    as a head with labels, stay as they are: `transformers.Trainer` trains them.

    Args:
        model: what `peft.get_peft_model` returned, or a model patched by `hf_sparse.patch` whose other parameters are
            frozen.
        dataset: packed chunks, `[N, T]` int64, or a mapping or `datasets.Dataset` with `input_ids` of equal lengths. A
            masked language model needs `labels` as well, see `hf_sparse.data.mask_tokens`.
        config: settings; the defaults are the measured recipe of either method.

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
    head = parameters_saved(model)
    if untrained := untrained_modules(model):
        warnings.warn(
            f"{' and '.join(untrained)} of the adapter has the random weights that it was made with, and finetune "
            f"leaves it so, for it trains the {training.learned}: train it with transformers.Trainer, before or after",
            stacklevel=2,
        )
    output = Path(config.output_dir) if config.output_dir else None
    settings = training.recorded_settings()
    identity = settings | {"chunks": fingerprint(chunks, labels), "adapter": training.identity()}
    state: dict[str, Any] = {"step": 0, "history": [], "seconds": 0.0}

    with ExitStack() as stack:
        stack.enter_context(_own_accelerate_state())
        stack.enter_context(_training(model, training))
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            # Of processes without an accelerator each would train alone, were it not told that there is none.
            cpu=config.cpu or not torch.accelerator.is_available(),
        )
        if accelerator.distributed_type in _SHARDING:
            raise ValueError(
                f"finetune trains whole models in each process, and accelerate was configured for "
                f"{accelerator.distributed_type.value}: launch it with torchrun, or another accelerate configuration"
            )
        _warn_of_slow_dtype(model, accelerator)
        identity["processes"] = accelerator.num_processes
        identity = json.loads(json.dumps(identity))  # as checkpoints hold it
        began_with = adapter_sha256(training.layers)
        origin: dict[str, Any] = {}
        if output and (config.checkpoint_every or config.resume):
            origin = {"base": base_sha256(model, training.layers), "first_weights": began_with}
            if is_main_process():
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(output))
                checkpoint.settle(output)
            accelerator.wait_for_everyone()
        plan = [(stage, step) for stage in training.stages for step in range(stage.steps)]
        restart = checkpoint.latest(output) if output and config.resume else None
        if restart:
            state = checkpoint.load_state(restart)
            if _finished(output, state) == began_with:  # the run ended with these weights, and may be repeated
                origin["first_weights"] = state["origin"]["first_weights"]
            _check_resumable(restart, state, identity, origin, len(plan))
        # LoRA has a learning rate of its own, and is clipped apart: its gradients would shrink the steps of scorers.
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in learned.items() if (name in training.lora) == is_lora], "is_lora": is_lora}
            for is_lora in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        plain = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        if restart:
            checkpoint.load_into(restart, state, learned, plain)
            checkpoint.check_steps(restart, plain, plan[state["step"] - 1][1] + 1)
        optimizer = accelerator.prepare_optimizer(plain)
        per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        order = _Shuffled(len(chunks), config.seed, start=state["step"] * per_step)
        rows = TensorDataset(chunks) if labels is None else TensorDataset(chunks, labels)
        batches = iter(accelerator.prepare_data_loader(DataLoader(rows, config.batch_size, sampler=order)))
        history: list[dict[str, Any]] = state["history"]
        began = time.perf_counter() - state["seconds"]
        prepared = accelerator.prepare_model(model, evaluation_mode=True)  # processes are kept alike here, see `_mean`
        _as_the_first(training)

        trained_on = _first_rows(len(chunks), config.seed, len(plan) * per_step)

        def read() -> None:
            trained_on.update(range(min(FITTED, len(chunks))))
            for chunk in chunks[:FITTED].split(config.batch_size):
                prepared(input_ids=chunk.to(accelerator.device))

        try:
            first = [part[: config.batch_size].to(accelerator.device) for part in (chunks, labels) if part is not None]
            report = state["report"] if restart else training.begin(prepared, *first)
            bar = tqdm(
                total=len(plan), initial=state["step"], desc=training.learned, unit="step", disable=not config.progress
            )
            for number in range(state["step"], len(plan)):
                tick = time.perf_counter()
                stage, step = plan[number]
                if step == 0 or number == state["step"]:
                    for name, parameter in learned.items():
                        parameter.requires_grad_(name in stage.parameters)
                    training.enter(stage, read)
                if step == 0:
                    plain.state.clear()  # moments of another loss
                share = _share_of_peak(config, stage, step)
                for group in plain.param_groups:
                    group["lr"] = share * (config.lora_learning_rate if group["is_lora"] else stage.learning_rate)
                logged = number % max(1, len(plan) // 50) == 0 or step + 1 == stage.steps
                losses: list[Tensor] = []
                parts = [next(batches) for _ in range(config.gradient_accumulation_steps)]
                weights = _weights(accelerator, [training.targets(stage, *batch) for batch in parts])
                with training.step(stage, step, number, logged=logged) as extra:
                    for batch, weight in zip(parts, weights, strict=True):
                        with accelerator.accumulate(prepared):
                            repeat = config.gradient_checkpointing and stage.repeatable
                            with recomputed(model) if repeat else nullcontext():
                                loss = training.loss(stage, prepared, *batch)
                            if not torch.isfinite(loss):
                                raise ValueError(
                                    f"the loss of step {number + 1} ({stage.label}) is {loss.item()}; the "
                                    f"{training.learned} are those of the step before; try a lower learning_rate"
                                )
                            loss = weight * loss
                            accelerator.backward(loss)
                            losses.append(accelerator.gather(loss.detach()).mean())
                            if accelerator.sync_gradients:
                                if step == 0 or number == state["step"]:
                                    _check_gradients(model, stage.parameters)
                                _mean(accelerator, stage.parameters)
                                norms = [
                                    float(accelerator.clip_grad_norm_(group["params"], config.max_grad_norm))
                                    for group in groups
                                ]
                                if not all(map(math.isfinite, norms)):
                                    raise ValueError(
                                        f"the gradient of step {number + 1} ({stage.label}) is not finite; the "
                                        f"{training.learned} are those of the step before; try a lower learning_rate"
                                    )
                            optimizer.step()
                            optimizer.zero_grad()
                if not _are_finite(stage.parameters.values()):
                    raise ValueError(
                        f"the {training.learned} are not finite after step {number + 1} ({stage.label}), and nothing "
                        "of them is saved; try a lower learning_rate"
                    )
                value = float(torch.stack(losses).mean())
                speed = per_step * chunks.shape[1] / (time.perf_counter() - tick)
                bar.update()
                bar.set_postfix(stage=stage.label, loss=f"{value:.4f}", tokens_s=f"{speed:,.0f}")
                rate = share * stage.learning_rate  # beside LoRA, that of what the method itself learns
                row = {"step": number + 1, "stage": stage.label, "loss": value, "learning_rate": rate}
                history.append(row | {"tokens_per_second": speed} | extra)
                if output and config.checkpoint_every and (number + 1) % config.checkpoint_every == 0:
                    accelerator.wait_for_everyone()
                    if accelerator.is_main_process:
                        kept = {"settings": identity, "origin": origin, "history": history, "report": report}
                        seconds = time.perf_counter() - began
                        checkpoint.save(output, number + 1, learned, plain, kept | {"seconds": seconds})
            bar.close()
            training.finish(prepared, read, *first, report=report)
            _as_the_first(training)  # each process has fitted what is fitted, with sums in another order on a GPU
            for method in training.layers:
                # What was never fitted is NaN throughout.
                if not _are_finite(t for t in adapter_tensors(method).values() if not t.isnan().all()):
                    raise ValueError(f"what was fitted after the last step is not finite in layer {method.layer}")
        finally:
            plain.zero_grad()
            for parameter in learned.values():
                parameter.requires_grad_(True)
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)

        seconds, tokens = time.perf_counter() - began, len(plan) * per_step * chunks.shape[1]
        used = sorted(trained_on)
        metrics = {
            "format": 1,
            "objective": config.objective,
            "settings": settings
            | {"length": chunks.shape[1], "chunks": len(chunks), "chunks_sha256": identity["chunks"]}
            | {"first_token": first_token(model, chunks), "processes": accelerator.num_processes},
            "trained": training.learned,
            "trainable_parameters": sum(p.numel() for p in learned.values()),
            "lora_parameters": sum(p.numel() for name, p in learned.items() if name in training.lora),
            "all_parameters": sum(p.numel() for p in model.parameters()),
            **({"head_parameters": sum(p.numel() for p in head)} if head else {}),
            "gradient_checkpointing": config.gradient_checkpointing,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "trained_on": sketch(chunks[used], None if labels is None else labels[used]),
            "history": history,
            "parameters_sha256": {
                "before": origin.get("first_weights", began_with),
                "after": adapter_sha256(training.layers),
            },
            **report,
            **describe(),
        }
        if accelerator.device.type == "cuda":
            metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if output and accelerator.is_main_process:
            if (output / "adapter_config.json").exists():  # it would be beside weights of which it does not tell
                _name_weights(output)
            else:
                output.mkdir(parents=True, exist_ok=True)
                write_json(output / "finetune.json", metrics)
    return metrics


def _name_weights(output: Path) -> None:
    """Let the finetune.json of an earlier run say of which weights it tells, before others take their place."""
    try:
        metrics = json.loads((output / "finetune.json").read_text("utf-8"))
        weights = (output / "adapter_model.safetensors").read_bytes()
    except (OSError, ValueError, RecursionError):  # there is none, or it is damaged and nobody will show it
        return
    if isinstance(metrics, dict) and "weights_sha256" not in metrics:
        write_json(output / "finetune.json", metrics | {"weights_sha256": hashlib.sha256(weights).hexdigest()})


def _finished(output: Path | None, state: Mapping[str, Any]) -> str | None:
    """sha256 of the weights that a run ended with, if the finetune.json in a folder is of the run of a checkpoint."""
    try:
        metrics = json.loads((output / "finetune.json").read_text("utf-8")) if output else {}
        run = metrics["parameters_sha256"]
        return str(run["after"]) if run["before"] == state["origin"]["first_weights"] else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # it only helps where it is whole
        return None


def _check_resumable(
    folder: Path, state: Mapping[str, Any], identity: Mapping[str, Any], origin: Mapping[str, Any], steps: int
) -> None:
    """Raise for a checkpoint of another run than this one.

    Raises:
        DataError: it began with another base model or with other weights, or is of a step beyond the plan.
        ValueError: its settings are others.
    """
    if state["settings"] != identity:
        different = [key for key, value in identity.items() if state["settings"].get(key) != value]
        raise ValueError(f"cannot resume with other settings than the checkpoint's; different: {', '.join(different)}")
    what = {"base": "another base model (weights or dtype)", "first_weights": "other first weights"}
    noted = state["origin"] if state["format"] > 1 else {}  # an older hf-sparse did not
    if others := changed(noted, origin):
        raise DataError(
            f"cannot resume from {folder.name}: it began with {what[others[0]]} than this run; load what it began "
            "with, or start over without resume"
        )
    if state["step"] > steps:
        raise DataError(f"cannot resume from {folder.name}: the run has {steps} steps")


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _as_the_first(training: Training) -> None:
    """The tensors of the first process in all processes."""
    for method in training.layers:
        for tensor in (*method.parameters(), *method.buffers()):
            tensor.data = broadcast(tensor.data)


def _weights(accelerator: Accelerator, targets: list[int]) -> list[float]:
    """Weights of the batches of an optimiser step, whose mean over all batches and processes is 1.

    With them the mean of the losses is that over all targets of the step, however these lie in its batches.

    Args:
        targets: of each batch of this process, see `Training.targets`.
    """
    count = torch.tensor(sum(targets), device=accelerator.device)
    mean = accelerator.reduce(count, "sum").item() / (len(targets) * accelerator.num_processes)
    return [number / mean for number in targets]


def _mean(accelerator: Accelerator, parameters: Mapping[str, nn.Parameter]) -> None:
    """Gradients averaged over all processes.

    `DistributedDataParallel` would do it for losses that are made of what the model returns. These are also made of
    what is read inside the model, whose own forward may run without gradients.
    """
    if accelerator.num_processes > 1:
        for parameter in parameters.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, "mean")


@contextmanager
def _training(model: nn.Module, training: Training) -> Iterator[None]:
    """Methods as they are trained, no dropout in the base model; all in `eval` mode afterwards, whatever happens.

    What no stage trains, such as LoRA with the objective `attention`, or a head, gets no gradient meanwhile.
    """
    learned = {id(parameter) for parameter in training.parameters.values()}
    own = [parameter for method in training.layers for parameter in method.parameters()] + parameters_saved(model)
    idle = [parameter for parameter in own if parameter.requires_grad and id(parameter) not in learned]
    model.eval()
    for method in training.layers:
        method.train()
    for parameter in idle:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in idle:
            parameter.requires_grad_(True)
        model.eval()


def _warn_of_slow_dtype(model: nn.Module, accelerator: Accelerator) -> None:
    """Warn that half precision is slow on a CPU: transformers loads checkpoints in the dtype they are stored in."""
    halves = {p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    if accelerator.mixed_precision == "bf16":
        halves.add(torch.bfloat16)
    if halves and accelerator.device.type == "cpu" and accelerator.is_main_process:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
        warnings.warn(
            f"training in {names} on a CPU is about 10 times slower than in float32: load the base model with "
            'dtype="float32", and leave mixed_precision at "no"',
            stacklevel=3,
        )


@contextmanager
def _own_accelerate_state() -> Iterator[None]:
    """A fresh accelerate within a `with` block, and the caller's again after it.

    accelerate keeps device and precision of its first use for the whole process. Where processes were launched
    together they keep the device, which is bound to their group.
    """
    kinds: list[Any] = [AcceleratorState] if "LOCAL_RANK" in os.environ else [AcceleratorState, PartialState]
    before = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    try:
        yield
    finally:
        for kind, state in zip(kinds, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


class _Shuffled(Sampler[int]):
    """Endless permutations of `range(n)`, a function of seed and position alone: any run can start anywhere."""

    def __init__(self, n: int, seed: int, start: int) -> None:
        self.n, self.seed, self.start = n, seed, start

    def __iter__(self) -> Iterator[int]:
        epoch, skip = divmod(self.start, self.n)
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            yield from torch.randperm(self.n, generator=generator)[skip:].tolist()
            epoch, skip = epoch + 1, 0


def _first_rows(n: int, seed: int, count: int) -> set[int]:
    """The rows of a dataset of `n` among the first `count` that a run reads."""
    return set(range(n)) if count >= n else set(islice(_Shuffled(n, seed, start=0), count))


def _check_frozen(model: nn.Module, training: Training) -> None:
    """What is trained is trainable, and nothing else is but the adapter's own."""
    for parameter in training.parameters.values():
        parameter.requires_grad_(True)
    own = {id(p) for method in training.layers for p in method.parameters()}
    own |= {id(p) for p in parameters_saved(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        raise ValueError(
            f"{len(others)} parameters besides the {training.learned} would be trained, the first is {others[0]}: "
            "freeze them (model.requires_grad_(False)) or use peft.get_peft_model"
        )


def _check_gradients(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """After the first backward: all that is trained has a gradient, and nothing else has one."""
    missing = [name for name, p in trained.items() if p.grad is None]
    foreign = [name for name, p in model.named_parameters() if p.grad is not None and name not in trained]
    if foreign or missing:
        kind = "a frozen parameter received a" if foreign else "a trained parameter received no"
        raise ValueError(f"{kind} gradient: {(foreign or missing)[0]}")
    if not any(p.grad.any() for p in trained.values() if p.grad is not None):
        raise ValueError("all gradients are 0: nothing can be learned from these chunks")


def _share_of_peak(config: FinetuneConfig, stage: Stage, step: int) -> float:
    """The learning rate of a step, in units of its peak."""
    warm = min(config.warmup_steps, stage.steps // 2)
    if step < warm:
        return (step + 1) / warm
    return (stage.steps - step) / max(1, stage.steps - warm)
