"""Apply LoRA to linear layers of an attention module by forward hooks: the module tree of the base stays as it is.

The layers are the direct children of the attention module; queries, keys and values that are one layer of the base have
one change together. BERT and RoBERTa keep the output projection outside of the attention module, so there LoRA changes
queries, keys and values only.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.core.layer import SparseAttentionLayer


def linear_layers(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the sizes (inputs, outputs) of the linear layers of an attention module, by name."""
    sizes = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            sizes[name] = (child.in_features, child.out_features)
        elif isinstance(child, Conv1D):
            sizes[name] = (child.nx, child.nf)
    return sizes


def check_lora(module: nn.Module, rank: int) -> None:
    """Raise `ValueError` if an attention module cannot have LoRA of this rank."""
    sizes = linear_layers(module)
    if not sizes:
        raise ValueError(f"lora_rank must be 0: {type(module).__name__} has no linear layers of its own, got {rank}")
    name, size = min(sizes.items(), key=lambda item: min(item[1]))
    if rank > min(size):
        raise ValueError(f"lora_rank must be at most {min(size)}, the width of {name}, got {rank}")


def enable_lora(module: nn.Module, attention: SparseAttentionLayer) -> None:
    """Let the adapters of a method change the linear layers of its attention module; does nothing the second time."""
    if attention.linears:
        return
    attention.linears = linear_layers(module)
    for name in attention.linears:
        hook = module.get_submodule(name).register_forward_hook(partial(_add, attention, name))
        attention.hooks.append(hook)


def copy_lora(module: nn.Module, attention: SparseAttentionLayer) -> None:
    """Let the linear layers of a copied attention module be changed by its copied `attention`."""
    for name in attention.linears:
        linear = module.get_submodule(name)
        hooks = linear._forward_hooks.copy()
        for number, hook in hooks.items():
            if isinstance(hook, partial) and hook.func is _add:
                hooks[number] = partial(_add, attention, name)
        vars(linear)["_forward_hooks"] = hooks


def _add(
    attention: SparseAttentionLayer, name: str, linear: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor | None:
    """Add the change to the output of a linear layer, as its forward hook."""
    change = attention.low_rank(name, args[0])
    return None if change is None else output + change
