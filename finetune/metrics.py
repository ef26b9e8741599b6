"""Make the metrics of a run: what was trained on what, for how long, and what came of it."""

from collections.abc import Collection
from typing import Any

import torch
from torch.utils.data import TensorDataset

from hf_sparse.data import first_token
from hf_sparse.environment import describe
from hf_sparse.finetune.identity import adapter_sha256
from hf_sparse.finetune.launch import is_sharded, is_zero3
from hf_sparse.finetune.optimiser_step import Run
from hf_sparse.finetune.resume import Progress
from hf_sparse.finetune.sharding import share_of_base, size
from hf_sparse.finetune.stages import Training
from hf_sparse.overlap import sketch
from hf_sparse.patches.heads import parameters_saved


def metrics_of(run: Run, progress: Progress, data: TensorDataset, rows: Collection[int]) -> dict[str, Any]:
    """Return the metrics of a run that has ended.

    Args:
        run: with all that its steps used.
        progress: after the last step.
        data: all chunks `[N, T]`, and labels where the model needs them.
        rows: the numbers of the chunks that were read.
    """
    training, accelerator, chunks = run.training, run.accelerator, data.tensors[0]
    tokens, seconds, read = progress.step * run.chunks_per_step * chunks.shape[1], progress.seconds, sorted(rows)
    metrics = {
        "format": 1,
        "objective": run.config.objective,
        "settings": {
            **training.recorded_settings(),
            "length": chunks.shape[1],
            "chunks": len(chunks),
            "chunks_sha256": progress.identity["chunks"],
            "first_token": first_token(training.model, chunks),
            "processes": accelerator.num_processes,
        },
        **_parameter_counts(training),
        "gradient_checkpointing": run.config.gradient_checkpointing,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "trained_on": sketch(*(part[read] for part in data.tensors)),
        "history": progress.history,
        "parameters_sha256": {
            "before": progress.origin["first_weights"],
            "after": adapter_sha256(training.layers),
        },
        **progress.report,
        **describe(*_engines(run)),
    }
    if is_sharded():
        metrics["base_share"] = share_of_base(training.model, training.layers)
    if accelerator.device.type == "cuda":
        metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return metrics


def _engines(run: Run) -> list[str]:
    """List the packages that divided the base or multiplied with it."""
    in_float8 = run.config.mixed_precision == "fp8"
    return [name for name, took_part in (("deepspeed", is_zero3()), ("torchao", in_float8)) if took_part]


def _parameter_counts(training: Training) -> dict[str, Any]:
    """Return what was trained and how many parameters there are, as the metrics have it."""
    learned, head = training.parameters, parameters_saved(training.model)
    return {
        "trained": training.learned,
        "trainable_parameters": sum(p.numel() for p in learned.values()),
        "lora_parameters": sum(p.numel() for name, p in learned.items() if name in training.lora),
        "all_parameters": sum(map(size, training.model.parameters())),
        **({"head_parameters": sum(p.numel() for p in head)} if head else {}),
    }
