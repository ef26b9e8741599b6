"""Divide the frozen base model among processes with DeepSpeed's ZeRO-3; what is trained stays whole in each.

DeepSpeed's engine would make the optimiser, its state and the checkpoints its own, in files that belong to a number of
processes. So only that part of it is taken which divides parameters and gathers those of a module for its forward and
backward. The engine itself uses this part alone for a model that has no optimiser.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from deepspeed import init_distributed, ops
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from torch import nn


class _DividedBase(DeepSpeedZeRoOffload):
    """Gather the parameters of each module for its forward and its backward, and give them up after both.

    DeepSpeed expects that a backward runs through all of a model. Here a loss may depend on what a hook reads within a
    module alone: the backward of that module then ends without having begun, and is left out.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        self._begun: set[nn.Module] = set()
        module.register_forward_pre_hook(self._end_backward, prepend=True)

    def pre_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        self._begun.add(sub_module)
        super().pre_sub_module_backward_function(sub_module)

    def post_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        if sub_module in self._begun:
            self._begun.remove(sub_module)
            super().post_sub_module_backward_function(sub_module)

    def _end_backward(self, *_: Any) -> None:
        """Give up, before the next forward, what was gathered for a backward that did not reach the module's inputs."""
        self._begun.clear()
        self.release_backward_leftovers()


def divide(model: nn.Module, kept: Sequence[nn.Module], device: torch.device) -> None:
    """Divide the parameters of a model among all processes, in place.

    Args:
        model: on any device; what this process holds of it moves to its own.
        kept: modules within it that stay whole, on that device already.
        device: of this process.
    """
    if device.type == "cpu":  # where DeepSpeed would compile this operator for a minute, to use it in inference only
        ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    init_distributed(verbose=False)  # takes the group that accelerate has made
    asked = DeepSpeedPlugin().deepspeed_config["zero_optimization"]  # the launcher left it in the environment
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; finetune makes the batches
        "zero_optimization": {name: value for name, value in asked.items() if value != "auto"},
    }
    zero = DeepSpeedConfig(config).zero_config
    with _without(model, kept):
        _DividedBase(
            model,
            timers=None,
            ds_config=config,
            overlap_comm=zero.overlap_comm,
            prefetch_bucket_size=zero.prefetch_bucket_size,
            max_reuse_distance=zero.max_reuse_distance,
            max_live_parameters=zero.max_live_parameters,
            param_persistence_threshold=zero.param_persistence_threshold,
            model_persistence_threshold=zero.model_persistence_threshold,
        )
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


@contextmanager
def _without(model: nn.Module, kept: Sequence[nn.Module]) -> Iterator[None]:
    """Take modules out of a model for the length of a `with` block."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if any(child is module for module in kept)
    ]
    for parent, name, _ in places:
        parent._modules[name] = None
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
