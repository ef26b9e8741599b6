"""The training loop, flat: one function from checks to metrics."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, broadcast, tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from hf_sparse.data import check_chunks, fingerprint, tensors
from hf_sparse.files import write_json
from hf_sparse.finetune import checkpoint
from hf_sparse.finetune.config import FinetuneConfig
from hf_sparse.finetune.recompute import recomputed
from hf_sparse.finetune.training import Stage, Training
from hf_sparse.finetune.trainings import training_of, without_effect
from hf_sparse.machine import describe

# Ways to divide one model among processes.
_SHARDING = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)

# Chunks that predictors are fitted to in the end, at most.
FITTED = 8


def finetune(model: nn.Module, dataset: Any, config: FinetuneConfig | None = None) -> dict[str, Any]:
    """Train what sparse attention has learned parameters for; the base model stays frozen.

    Of SparseK these are the scorers; of Sparsefinder first the logit scales, then the projections, and in the end its
    predictors are fitted to the training text. LoRA, of an adapter with a `lora_rank`, is trained beside the scorers or
    scales; the teacher is the base model without it.

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
            setting, gradients are switched off, or the loss is not finite.
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
    output = Path(config.output_dir) if config.output_dir else None
    settings = config.settings(without_effect(training))
    identity = settings | {"chunks": fingerprint(chunks, labels), "adapter": training.identity()}
    restart = checkpoint.latest(output) if output and config.resume else None
    state: dict[str, Any] = {"step": 0, "history": [], "seconds": 0.0}
    if restart:
        state = checkpoint.load_state(restart)

    with _own_accelerate_state(), _training(model, training):
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
        identity["processes"] = accelerator.num_processes
        if restart and state["settings"] != identity:
            changed = [key for key, value in identity.items() if state["settings"].get(key) != value]
            raise ValueError(
                f"cannot resume with other settings than the checkpoint's; different: {', '.join(changed)}"
            )
        # LoRA has a learning rate of its own, and is clipped apart: its gradients would shrink the steps of scorers.
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in learned.items() if (name in training.lora) == is_lora], "is_lora": is_lora}
            for is_lora in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        plain = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        if restart:
            checkpoint.load(restart, learned, plain)
        optimizer = accelerator.prepare_optimizer(plain)
        per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        order = _Shuffled(len(chunks), config.seed, start=state["step"] * per_step)
        rows = TensorDataset(chunks) if labels is None else TensorDataset(chunks, labels)
        batches = iter(accelerator.prepare_data_loader(DataLoader(rows, config.batch_size, sampler=order)))
        plan = [(stage, step) for stage in training.stages for step in range(stage.steps)]
        history: list[dict[str, Any]] = state["history"]
        began = time.perf_counter() - state["seconds"]
        prepared = accelerator.prepare_model(model, evaluation_mode=True)  # processes are kept alike here, see `_mean`
        _as_the_first(training)

        def read() -> None:
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
                with training.step(stage, step, number, logged=logged) as extra:
                    for _ in range(config.gradient_accumulation_steps):
                        with accelerator.accumulate(prepared):
                            batch = next(batches)
                            repeat = config.gradient_checkpointing and stage.repeatable
                            with recomputed(model) if repeat else nullcontext():
                                loss = training.loss(stage, prepared, *batch)
                            if not torch.isfinite(loss):
                                raise ValueError(
                                    f"the loss of step {number + 1} ({stage.label}) is {loss.item()}; the "
                                    f"{training.learned} are those of the step before; try a lower learning_rate"
                                )
                            accelerator.backward(loss)
                            losses.append(accelerator.gather(loss.detach()).mean())
                            if accelerator.sync_gradients:
                                if step == 0 or number == state["step"]:
                                    _check_gradients(model, stage.parameters)
                                _mean(accelerator, stage.parameters)
                                for group in groups:
                                    accelerator.clip_grad_norm_(group["params"], config.max_grad_norm)
                            optimizer.step()
                            optimizer.zero_grad()
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
                        kept = {"settings": identity, "history": history, "seconds": time.perf_counter() - began}
                        checkpoint.save(output, number + 1, learned, plain, kept | {"report": report})
            bar.close()
            training.finish(prepared, read, *first, report=report)
            _as_the_first(training)  # each process has fitted what is fitted, with sums in another order on a GPU
        finally:
            for parameter in learned.values():
                parameter.requires_grad_(True)
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)

        seconds, tokens = time.perf_counter() - began, len(plan) * per_step * chunks.shape[1]
        metrics = {
            "format": 1,
            "objective": config.objective,
            "settings": settings
            | {"length": chunks.shape[1], "chunks": len(chunks), "chunks_sha256": identity["chunks"]}
            | {"processes": accelerator.num_processes},
            "trained": training.learned,
            "trainable_parameters": sum(p.numel() for p in learned.values()),
            "lora_parameters": sum(p.numel() for name, p in learned.items() if name in training.lora),
            "all_parameters": sum(p.numel() for p in model.parameters()),
            "gradient_checkpointing": config.gradient_checkpointing,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "history": history,
            **report,
            **describe(),
        }
        if accelerator.device.type == "cuda":
            metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if output and accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "finetune.json", metrics)
    return metrics


def _as_the_first(training: Training) -> None:
    """The tensors of the first process in all processes."""
    for method in training.methods:
        for tensor in (*method.parameters(), *method.buffers()):
            tensor.data = broadcast(tensor.data)


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

    What no stage trains, such as LoRA with the objective `attention`, gets no gradient meanwhile.
    """
    learned = {id(parameter) for parameter in training.parameters.values()}
    own = [parameter for method in training.methods for parameter in method.parameters()]
    idle = [parameter for parameter in own if parameter.requires_grad and id(parameter) not in learned]
    model.eval()
    for method in training.methods:
        method.train()
    for parameter in idle:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in idle:
            parameter.requires_grad_(True)
        model.eval()


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


def _check_frozen(model: nn.Module, training: Training) -> None:
    """What is trained is trainable, and nothing else is but the adapter's own."""
    for parameter in training.parameters.values():
        parameter.requires_grad_(True)
    own = {id(p) for method in training.methods for p in method.parameters()}
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
