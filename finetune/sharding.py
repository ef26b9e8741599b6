"""Divide the frozen base model among processes, with FSDP2 or ZeRO-3; what is trained stays whole in each.

accelerate itself divides models on accelerators only; on a CPU it would leave the model whole without a word.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.finetune.launch import is_zero3
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.heads import modules_saved, parameters_saved


def shard_base(accelerator: Accelerator, model: nn.Module, layers: Sequence[SparseAttentionLayer]) -> nn.Module:
    """Divide all parameters of a model but those of the adapter, in place.

    Args:
        accelerator: of this process.
        model: patched, on any device; the divided parameters move to that of the process.
        layers: its sparse attention layers.

    Returns:
        The model. FSDP2 makes its parameters `DTensor`s; ZeRO-3 leaves them empty while they are not needed.
    """
    if accelerator.device.type == "cpu" and torch.accelerator.is_available():
        raise ValueError("a model cannot be divided on the CPU of a machine with an accelerator: hide it, or use it")
    whole = [*sparse_layers(model), *modules_saved(model)]
    for module in whole:  # also where an earlier run has divided the rest
        module.to(accelerator.device)
    if is_zero3():
        if not any(is_in_zero3(parameter) for parameter in model.parameters()):
            from hf_sparse.finetune.zero3 import divide  # needs DeepSpeed

            divide(model, whole, accelerator.device)
        return model
    tied = _tied(model)
    for parameter in tied:  # FSDP moves only what it divides
        parameter.data = parameter.data.to(accelerator.device)
    plugin = FullyShardedDataParallelPlugin()  # reads the configuration that the launcher left in the environment
    plugin.ignored_modules = [nn.ParameterList([*_of_adapter(model, layers), *tied])]
    if not plugin.transformer_cls_names_to_wrap:
        # What transformers names by default may hold the embeddings, which accelerate divides with a tied head.
        kinds = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
        plugin.transformer_cls_names_to_wrap = sorted(kinds)
    # What is computed in which dtype is left to autocast, as in a model that is not divided.
    plugin.mixed_precision_policy = None
    accelerator.state.fsdp_plugin = plugin
    return fsdp2_prepare_model(accelerator, model)


def reshard(model: nn.Module) -> None:
    """Give up what a process holds of the other processes' parts since the last forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters: list[Any] = [parameter for parameter in model.parameters() if is_in_zero3(parameter)]
    for parameter in parameters:
        if parameter.numel():
            parameter.ds_active_sub_modules.clear()  # an error may have ended a forward or backward that needed it
            parameter.partition()


def share_of_base(model: nn.Module, layers: Sequence[SparseAttentionLayer]) -> float:
    """Return the share of the base model's parameters that this process holds."""
    of_adapter = {id(parameter) for parameter in _of_adapter(model, layers)}
    base = [parameter for parameter in model.parameters() if id(parameter) not in of_adapter]
    return sum(_local(parameter).numel() for parameter in base) / sum(map(size, base))


def size(tensor: Any) -> int:
    """Return how many numbers a tensor has, those of the other processes included."""
    return int(tensor.ds_numel if is_in_zero3(tensor) else tensor.numel())


def full(tensor: Any) -> Tensor:
    """Return a tensor with what the other processes hold of it, if it is divided; all of them must ask for it."""
    if is_in_zero3(tensor):
        _gather([tensor])
        whole: Tensor = tensor.data
        tensor.partition()  # which gives it other memory
        return whole
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_in_zero3(tensor: Tensor) -> bool:
    """Tell whether ZeRO-3 has divided a tensor. It is empty then, unless it is gathered."""
    return hasattr(tensor, "ds_tensor")


@contextmanager
def gathered(module: nn.Module) -> Iterator[Any]:
    """Give the forward of a module that is called by itself, outside the model's, with its parameters gathered.

    Hooks of FSDP would take such a call for the beginning of another forward of the model, and those of ZeRO-3 would
    gather again for every call.
    """
    if isinstance(module, FSDPModule):
        module.unshard()
        yield module.forward
    elif divided := [parameter for parameter in module.parameters() if is_in_zero3(parameter)]:
        _gather(divided)  # until the next forward of the model has used them
        yield module.forward
    else:
        yield module


def _gather(parameters: Sequence[Any]) -> None:
    """Gather those parameters of ZeRO-3 that are not."""
    if divided := [parameter for parameter in parameters if not parameter.numel()]:
        divided[0].all_gather(divided)


def _of_adapter(model: nn.Module, layers: Sequence[SparseAttentionLayer]) -> list[nn.Parameter]:
    return [*(parameter for layer in layers for parameter in layer.parameters()), *parameters_saved(model)]


def _tied(model: Any) -> list[nn.Parameter]:
    """List the parameters that several modules share, but for embeddings; FSDP divides each of them once only."""
    shared = {id(p): p for _, p in model.named_parameters()}
    counts = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    embeddings = id(model.get_input_embeddings().weight)
    return [p for key, p in shared.items() if counts[key] > 1 and key != embeddings]


def _local(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor while it is not gathered."""
    if is_in_zero3(tensor):
        return tensor.ds_tensor
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
