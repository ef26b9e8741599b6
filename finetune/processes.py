"""Set up accelerate for a run, and keep its processes alike."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, GradientAccumulationPlugin, broadcast
from torch import Tensor, nn

from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.environment import is_launched, launched_processes
from hf_sparse.finetune.config import FinetuneConfig
from hf_sparse.finetune.float8 import check_float8, float8_recipe
from hf_sparse.finetune.journal import check_tracker
from hf_sparse.finetune.launch import check_devices, check_launch, is_sharded, is_zero3, without_deepspeed_engine
from hf_sparse.finetune.sharding import shard_base


@contextmanager
def separate_accelerate_state() -> Iterator[None]:
    """Let accelerate begin anew within a `with` block, and give the caller's state back after it.

    accelerate keeps device and precision of its first use for the whole process. Where processes were launched
    together they keep the device, which is bound to their group. With DeepSpeed the engine is kept there too, which is
    not used here.
    """
    keeps_device = is_launched() and not is_zero3()
    kinds: list[Any] = [AcceleratorState] if keeps_device else [AcceleratorState, PartialState]
    before = [dict(kind._shared_state) for kind in kinds]
    for kind in kinds:
        kind._shared_state.clear()
    try:
        yield
    finally:
        for kind, state in zip(kinds, before, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """Return an `Accelerator` for the settings of a run.

    Raises:
        ValueError: the launcher was asked for something else than the settings say, or did not give what it was asked
            for, see `check_launch`.
    """
    check_launch()
    # Without `cpu=True`, several processes on a machine without an accelerator would each train alone.
    cpu = config.cpu or not torch.accelerator.is_available()
    check_devices(cpu=cpu)
    _check_precision(config)
    check_tracker(config.tracker, config.output_dir)
    in_float8 = config.mixed_precision == "fp8"
    if in_float8:
        check_float8(cpu=cpu)
    with without_deepspeed_engine():
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # Not of the environment, where a launcher may have left another number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
            cpu=cpu,
            log_with=config.tracker,
            project_dir=config.output_dir,
            kwargs_handlers=[float8_recipe()] if in_float8 else None,
        )
    if accelerator.num_processes != launched_processes():
        raise ValueError(f"expected {launched_processes()} processes, and accelerate found {accelerator.num_processes}")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"finetune does not train with the engine {accelerator.distributed_type.value} of accelerate")
    return accelerator


def prepare_model(accelerator: Accelerator, model: nn.Module, layers: Sequence[SparseAttentionLayer]) -> nn.Module:
    """Return a model as accelerate runs it: on the device of the process, whole or divided, with its precision.

    It is never within `DistributedDataParallel`, see `average_gradients`.
    """
    sharded = is_sharded()
    if sharded:
        model = shard_base(accelerator, model, layers)
    return accelerator.prepare_model(model, device_placement=not sharded, evaluation_mode=True)


def _check_precision(config: FinetuneConfig) -> None:
    """Check that a launcher that was asked for a precision or for clipping was asked for those of the settings."""
    precision, norm = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), None
    if is_zero3():
        plugin = DeepSpeedPlugin()
        norm = plugin.gradient_clipping
        precision = next(
            (name for name in ("fp16", "bf16") if plugin.hf_ds_config.is_true(f"{name}.enabled")), precision
        )
    if precision not in ("no", config.mixed_precision):
        raise ValueError(
            f"the launcher was asked for mixed_precision {precision!r}, and the settings say "
            f"{config.mixed_precision!r}: give both the same"
        )
    if norm not in (None, "auto", config.max_grad_norm):
        raise ValueError(
            f"the launcher was asked for gradient_clipping {norm}, and the settings say max_grad_norm "
            f"{config.max_grad_norm}: give both the same"
        )


def warn_of_slow_dtype(model: nn.Module, accelerator: Accelerator) -> None:
    """Warn that half precision is slow on a CPU: transformers loads checkpoints in the dtype they are stored in."""
    halves = {p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    if accelerator.mixed_precision == "bf16":
        halves.add(torch.bfloat16)
    if halves and accelerator.device.type == "cpu" and accelerator.is_main_process:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
        warnings.warn(
            f"training in {names} on a CPU is about 10 times slower than in float32: load the base model with "
            'dtype="float32", and leave mixed_precision at "no"',
            stacklevel=4,
        )


def batch_weights(accelerator: Accelerator, targets: Sequence[int | None]) -> list[float]:
    """Return weights for the batches of an optimiser step, whose mean over all batches and processes is 1.

    With them the mean of the losses is that over all targets of the step, however these lie in its batches.

    Args:
        accelerator: of the run.
        targets: of each batch of this process, see `hf_sparse.finetune.stages.Training.targets`.
    """
    counts = [count for count in targets if count is not None]
    if not counts:
        return [1.0] * len(targets)
    count = torch.tensor(sum(counts), device=accelerator.device)
    mean = accelerator.reduce(count, "sum").item() / (len(counts) * accelerator.num_processes)
    return [number / mean for number in counts]


def average_gradients(accelerator: Accelerator, parameters: Mapping[str, nn.Parameter], loss: Tensor) -> Tensor:
    """Replace gradients by their mean over all processes, and return the mean of the loss.

    `DistributedDataParallel` would do it for losses that are made of what the model returns. These are also made of
    what is read inside the model, whose own forward may run without gradients.

    Args:
        accelerator: of the run.
        parameters: by name, the same ones in every process; where one has no gradient it counts as 0.
        loss: a scalar.
    """
    if accelerator.num_processes == 1:
        return loss
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    *means, loss = _together(lambda flat: accelerator.reduce(flat, "mean"), [*gradients, loss])
    for parameter, mean in zip(parameters.values(), means, strict=True):
        parameter.grad = mean
    return loss


@torch.no_grad()
def copy_from_first_process(layers: Sequence[nn.Module]) -> None:
    """Give parameters and buffers of layers in every process the values that they have in the first one."""
    if launched_processes() > 1:
        tensors = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
        for tensor, first in zip(tensors, _together(broadcast, tensors), strict=True):
            tensor.copy_(first)


def _together(operation: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what a collective operation makes of each tensor, called once for all of a device and dtype.

    Args:
        operation: takes and returns `[N]`; all numbers are treated alike.
        tensors: of the same shapes and dtypes, in the same order, in all processes.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(number)
    results = list(tensors)
    for numbers in alike.values():
        flat = operation(torch.cat([tensors[number].detach().flatten() for number in numbers]))
        parts = flat.split([tensors[number].numel() for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            results[number] = part.view(tensors[number].shape)
    return results
