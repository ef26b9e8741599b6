"""Multiply with the frozen weights of a base model in fp8, by the recipe of torchao that accelerate offers.

accelerate would exchange the linear layers of a model for modules of torchao. Here they stay where they are, with their
weights, names and hooks, and have torchao's forward for the length of a run. What is saved knows nothing of it, LoRA
and FSDP2 go on to find their layers, and afterwards the base model is what it was.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AORecipeKwargs
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_sparse.finetune.launch import is_zero3
from hf_sparse.model_kinds import transformers_model
from hf_sparse.patches.heads import parameters_saved

#: If this variable is 1, products are computed in float32 from numbers rounded to fp8, on any device, for tests.
EMULATE = "HF_SPARSE_EMULATE_FP8"

_FIRST_CAPABILITY = (8, 9)  # of NVIDIA GPUs that multiply in fp8: Ada, Hopper and newer
_MULTIPLE = 16  # the sizes that the products take
_RECOMPILE_LIMIT = 64  # the forward is compiled for every size, with gradients and without


def check_float8(*, cpu: bool) -> None:
    """Check that this machine can train in fp8.

    Args:
        cpu: whether the run stays on the CPU.

    Raises:
        ValueError: torchao is not installed, there is no GPU that multiplies in fp8, or a launcher asks for fp8 of
            another library or for DeepSpeed.
    """
    backend = os.environ.get("ACCELERATE_FP8_BACKEND", "AO").upper()
    if backend != "AO":
        raise ValueError(f"finetune has fp8 of torchao (fp8_backend AO), and the launcher was asked for {backend}")
    if is_zero3():
        raise ValueError("mixed_precision 'fp8' does not go with DeepSpeed: divide the base with FSDP2, or use 'bf16'")
    if find_spec("torchao") is None:
        raise ValueError("mixed_precision 'fp8' needs torchao: pip install 'hf-sparse[fp8]'")
    if _is_emulated():
        return
    if cpu or not torch.cuda.is_available():
        raise ValueError(f"mixed_precision 'fp8' needs a GPU; {EMULATE}=1 computes on a CPU as if in fp8, for tests")
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda and capability < _FIRST_CAPABILITY:
        expected, got = (".".join(map(str, version)) for version in (_FIRST_CAPABILITY, capability))
        raise ValueError(
            f"mixed_precision 'fp8' needs a GPU of compute capability {expected} or newer, got "
            f"{torch.cuda.get_device_name()} of {got}"
        )


def float8_recipe() -> AORecipeKwargs:
    """Return the recipe for an `Accelerator` with `mixed_precision="fp8"`."""
    # Weights that FSDP gathers in fp8 are tensors of torchao, and those of the base stay what they are.
    recipe = AORecipeKwargs(enable_fsdp_float8_all_gather=False)
    if _is_emulated():
        recipe.config = replace(recipe.config, emulate=True)
    return recipe


@contextmanager
def products_in_float8(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Let the linear layers of a base model multiply in fp8 within a `with` block, if the accelerator is to use fp8.

    Those are the layers whose sizes are multiples of 16, but for the head, whose logits the loss compares, and for all
    that belongs to adapters.

    Raises:
        ValueError: there are none.
    """
    if accelerator.mixed_precision != "fp8":
        yield
        return
    from torchao.float8 import convert_to_float8_training

    config = accelerator.ao_recipe_handler.config
    linears = _linears(model)
    if not linears:
        raise ValueError(
            f"mixed_precision 'fp8' needs a base with torch.nn.Linear layers whose sizes are multiples of {_MULTIPLE}, "
            f"got a {type(model).__name__} without any"
        )
    # What torchao makes of a linear layer, for its forward and what that reads.
    example: Any = convert_to_float8_training(nn.Linear(_MULTIPLE, _MULTIPLE, device="meta"), config=config)
    before = [vars(linear).get("forward") for linear in linears]  # of `device_map`, say
    try:
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
            for linear in linears:
                linear.config, linear.linear_mm_config = config, example.linear_mm_config
                forward = MethodType(type(example).forward, linear)
                # As it is, torchao reads every number many times, and multiplies for the gradient of frozen weights.
                linear.forward = forward if config.emulate else torch.compile(forward, dynamic=False)
            yield
    finally:
        for linear, forward in zip(linears, before, strict=True):
            for name in ("config", "linear_mm_config", "forward"):
                vars(linear).pop(name, None)
            if forward is not None:
                linear.forward = forward


def _linears(model: nn.Module) -> list[Any]:
    """List the linear layers of a model that multiply in fp8."""
    base = transformers_model(model)
    ignored = {id(base.get_output_embeddings())}
    ignored |= {id(module) for layer in model.modules() for module in _of_adapters(layer)}
    saved = {id(parameter) for parameter in parameters_saved(model)}
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear  # a subclass has another product
        and id(module) not in ignored
        and id(module.weight) not in saved
        and not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)
    ]


def _of_adapters(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that hold adapters in a layer of PEFT or hf-sparse."""
    if isinstance(layer, BaseTunerLayer):
        for name in layer.adapter_layer_names:
            container = getattr(layer, name, None)
            if isinstance(container, nn.Module):
                yield from container.modules()


def _is_emulated() -> bool:
    return os.environ.get(EMULATE) == "1"
