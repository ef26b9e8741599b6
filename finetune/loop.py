"""The training loop, flat: one function from checks to metrics."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from hf_sparse.data import check_chunks, fingerprint, tensors
from hf_sparse.errors import DataError
from hf_sparse.files import write_json
from hf_sparse.finetune import checkpoint
from hf_sparse.finetune.config import FinetuneConfig
from hf_sparse.finetune.objectives import OBJECTIVES, UNSETTLED
from hf_sparse.finetune.recompute import recomputed
from hf_sparse.machine import describe
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.ops import sparsek
from hf_sparse.patches import methods_in_use
from hf_sparse.tasks import kind_of


def finetune(model: nn.Module, dataset: Any, config: FinetuneConfig | None = None) -> dict[str, Any]:
    """Train the scorers of a patched model; the base model stays frozen.

    Args:
        model: what `peft.get_peft_model` returned, or a model patched by `hf_sparse.patch` whose other parameters are
            frozen.
        dataset: packed chunks, `[N, T]` int64, or a mapping or `datasets.Dataset` with `input_ids` of equal lengths. A
            masked language model needs `labels` as well, see `hf_sparse.data.mask_tokens`.
        config: settings; the defaults are the measured recipe.

    Returns:
        The metrics that `finetune.json` holds: settings, parameters, tokens, time, and the history of the loss.
        The model is left in `eval` mode.

    Raises:
        DataError: chunks that cannot train this model.
        ValueError: parameters other than the scorers' would be trained, the model has no such objective, or the loss is
            not finite.
    """
    config = config or FinetuneConfig()
    methods = methods_in_use(model, SparseKAttention)
    chunks, labels = tensors(model, dataset)
    scorers = _check(model, methods, chunks, labels, config)
    objectives = OBJECTIVES[kind_of(model)]
    output = Path(config.output_dir) if config.output_dir else None
    identity = config.settings() | {"chunks": fingerprint(chunks, labels), "adapter": _adapter(methods)}
    restart = checkpoint.latest(output) if output and config.resume else None
    state: dict[str, Any] = checkpoint.load_state(restart) if restart else {"step": 0, "history": [], "seconds": 0.0}
    if restart and state["settings"] != identity:
        changed = [key for key, value in identity.items() if state["settings"].get(key) != value]
        raise ValueError(f"cannot resume with other settings than the checkpoint's; different: {', '.join(changed)}")

    with _own_accelerate_state(), _training(model, methods):
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=config.cpu,
        )
        prepared = accelerator.prepare_model(model)
        plain = torch.optim.AdamW(scorers.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
        if restart:
            checkpoint.load(restart, scorers, plain)
        optimizer = accelerator.prepare_optimizer(plain)
        per_step = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        order = _Shuffled(len(chunks), config.seed, start=state["step"] * per_step)
        rows = TensorDataset(chunks) if labels is None else TensorDataset(chunks, labels)
        batches = iter(accelerator.prepare_data_loader(DataLoader(rows, config.batch_size, sampler=order)))
        plan = [(stage, step, steps) for stage, steps in config.stages for step in range(steps)]
        history: list[dict[str, Any]] = state["history"]
        began = time.perf_counter() - state["seconds"]
        bar = tqdm(total=len(plan), initial=state["step"], desc="scorers", unit="step", disable=not config.progress)
        try:
            for number in range(state["step"], len(plan)):
                tick = time.perf_counter()
                objective, step, steps = plan[number]
                if step == 0:
                    plain.state.clear()  # moments of another loss
                rate = _learning_rate(config, step, steps)
                for group in plain.param_groups:
                    group["lr"] = rate
                logged = objective != "attention" and (number % max(1, len(plan) // 50) == 0 or number + 1 == len(plan))
                losses: list[Tensor] = []
                support: list[float] = []
                scale = _score_scale(config, objective, step, steps)
                mixture = _mixture(config) if objective == "distill" else {}
                with _scaled(methods, scale), _supports(methods, support if logged else None):
                    for _ in range(config.gradient_accumulation_steps):
                        with accelerator.accumulate(prepared):
                            batch = next(batches)
                            repeat = config.gradient_checkpointing and objective != "attention"
                            with recomputed(model) if repeat else nullcontext():
                                loss = objectives[objective](prepared, *batch, **mixture)
                            if not torch.isfinite(loss):
                                raise ValueError(
                                    f"the loss of step {number + 1} ({objective}) is {loss.item()}; the scorers are "
                                    "those of the step before; try a lower learning_rate"
                                )
                            accelerator.backward(loss)
                            losses.append(accelerator.gather(loss.detach()).mean())
                            if accelerator.sync_gradients:
                                accelerator.clip_grad_norm_(scorers.values(), config.max_grad_norm)
                                if step == 0 or number == state["step"]:
                                    _check_gradients(model, scorers)
                            optimizer.step()
                            optimizer.zero_grad()
                value = float(torch.stack(losses).mean())
                speed = per_step * chunks.shape[1] / (time.perf_counter() - tick)
                bar.update()
                bar.set_postfix(stage=objective, loss=f"{value:.4f}", tokens_s=f"{speed:,.0f}")
                row = {"step": number + 1, "stage": objective, "loss": value, "learning_rate": rate}
                row["tokens_per_second"] = speed
                if scale != 1:
                    row["score_scale"] = scale
                if support:
                    row["support"] = sum(support) / len(support)
                history.append(row)
                if output and config.checkpoint_every and (number + 1) % config.checkpoint_every == 0:
                    accelerator.wait_for_everyone()
                    if accelerator.is_main_process:
                        kept = {"settings": identity, "history": history, "seconds": time.perf_counter() - began}
                        checkpoint.save(output, number + 1, scorers, plain, kept)
        finally:
            bar.close()
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)

        seconds, tokens = time.perf_counter() - began, len(plan) * per_step * chunks.shape[1]
        metrics = {
            "format": 1,
            "objective": config.objective,
            "settings": config.settings()
            | {"length": chunks.shape[1], "chunks": len(chunks), "chunks_sha256": identity["chunks"]},
            "trainable_parameters": sum(p.numel() for p in scorers.values()),
            "all_parameters": sum(p.numel() for p in model.parameters()),
            "gradient_checkpointing": config.gradient_checkpointing,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "history": history,
            **describe(),
        }
        if accelerator.device.type == "cuda":
            metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if output and accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "finetune.json", metrics)
    return metrics


@contextmanager
def _training(model: nn.Module, methods: list[SparseKAttention]) -> Iterator[None]:
    """Soft gates, and the base model's dropout off; everything in `eval` mode afterwards, whatever happens."""
    model.eval()
    for method in methods:
        method.train()
    try:
        yield
    finally:
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


def _check(
    model: nn.Module,
    methods: list[SparseKAttention],
    chunks: Tensor,
    labels: Tensor | None,
    config: FinetuneConfig,
) -> dict[str, nn.Parameter]:
    """The scorers' parameters by name, once everything fits."""
    if not methods:
        raise ValueError(
            "the model has no sparse attention: use peft.get_peft_model(model, hf_sparse.SparseKConfig(...))"
        )
    kind = kind_of(model)
    if config.objective not in OBJECTIVES[kind]:
        raise ValueError(
            f"the objective {config.objective!r} needs a model with a language modelling head, which this has not; "
            f"choose one of {', '.join(OBJECTIVES[kind])}"
        )
    if _mixture(config) and kind != "causal":
        raise ValueError("lm_weight and hidden_weight are for causal language models, which this model is not")
    check_chunks(model, chunks, labels)
    length, slots = chunks.shape[1], max(method.config.slots for method in methods)
    if length <= slots:
        raise DataError(
            f"chunks of {length} tokens cannot train a budget of {slots} slots (k + window + sinks): every key is "
            "kept, so there would be no gradient; use longer chunks or a smaller budget"
        )
    needed = max(method.budget.sinks + method.budget.window for method in methods) + UNSETTLED + 2
    if methods[0].causal and config.stages[0][0] == "attention" and length < needed:
        raise DataError(
            f"chunks of {length} tokens are too short for the objective `attention`, which needs {needed} (sinks + "
            f"window + {UNSETTLED + 2}); use longer chunks, or warm_start_steps=0"
        )
    active = {id(p) for method in methods for p in method.sparsek_scorer[method.active].parameters()}
    scorers = {name: p for name, p in model.named_parameters() if id(p) in active}
    for parameter in scorers.values():
        parameter.requires_grad_(True)
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in active]
    if others:
        raise ValueError(
            f"{len(others)} parameters besides the scorers would be trained, the first is {others[0]}: freeze them "
            "(model.requires_grad_(False)) or use peft.get_peft_model"
        )
    return scorers


def _check_gradients(model: nn.Module, scorers: dict[str, nn.Parameter]) -> None:
    """After the first backward: every scorer has a gradient, and nothing else has one."""
    missing = [name for name, p in scorers.items() if p.grad is None]
    foreign = [name for name, p in model.named_parameters() if p.grad is not None and name not in scorers]
    if foreign or missing:
        kind = "a frozen parameter received a" if foreign else "a scorer received no"
        raise ValueError(f"{kind} gradient: {(foreign or missing)[0]}")
    if not any(p.grad.any() for p in scorers.values() if p.grad is not None):
        raise ValueError("all gradients are 0: nothing can be learned from these chunks")


def _adapter(methods: list[SparseKAttention]) -> dict[str, Any]:
    """What a checkpoint's scorers were trained for."""
    names = (
        "k",
        "window",
        "sinks",
        "scorer",
        "scorer_hidden_size",
        "position_slope",
        "learn_slope",
        "layer_shares",
        "support",
        "layers",
        "base_shape",
    )
    return {name: getattr(methods[0].config, name) for name in names}


def _learning_rate(config: FinetuneConfig, step: int, steps: int) -> float:
    warm = min(config.warmup_steps, steps // 2)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * (steps - step) / max(1, steps - warm)


def _mixture(config: FinetuneConfig) -> dict[str, float]:
    """What is added to the objective `distill`."""
    weights = {"lm_weight": config.lm_weight, "hidden_weight": config.hidden_weight}
    return {name: weight for name, weight in weights.items() if weight}


def _score_scale(config: FinetuneConfig, objective: str, step: int, steps: int) -> float:
    """By what the scores of a step are multiplied; the warm start has no gates."""
    if objective != config.objective:
        return 1.0
    return config.final_scale ** (step / max(1, steps - 1))


@contextmanager
def _scaled(methods: list[SparseKAttention], scale: float) -> Iterator[None]:
    """Scores times `scale` within a `with` block."""

    def multiply(module: nn.Module, args: Any, scores: Tensor) -> Tensor:
        return scale * scores

    scorers = [method.sparsek_scorer[method.active] for method in methods if scale != 1]
    hooks = [scorer.register_forward_hook(multiply) for scorer in scorers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _supports:
    """Measures, over the forwards inside a `with` block, how many keys the gates of the last query spread over."""

    def __init__(self, methods: list[SparseKAttention], into: list[float] | None) -> None:
        self.methods, self.into, self.hooks = methods, into, []  # type: ignore[var-annotated]

    def __enter__(self) -> None:
        if self.into is None:
            return
        for method in self.methods:
            hook = self._measure(method)
            self.hooks.append(method.sparsek_scorer[method.active].register_forward_hook(hook))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _measure(self, method: SparseKAttention) -> Any:
        def hook(module: nn.Module, args: Any, scores: Tensor) -> None:
            budget, into = method.budget, self.into
            end = scores.shape[-1] - (budget.window if method.causal else 0)
            eligible = scores.detach()[..., budget.sinks : end]
            support = method.config.soft_support(budget.k)
            if support is not None:
                eligible = eligible.topk(min(support, eligible.shape[-1])).values
            if into is not None:
                into.append(float((sparsek(eligible, budget.k) > 0).sum(-1).float().mean()))

        return hook
