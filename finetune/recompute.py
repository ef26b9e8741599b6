"""Recompute the layers of a frozen model in `eval` mode in the backward (gradient checkpointing).

transformers' own works in `train` mode only, where a base model would also drop out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Keep each layer's input only, in forwards within a `with` block; the backward runs the layers again.

    Raises:
        ValueError: the model has no layers that could be run again.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing needs layers that can be run again, got a {type(model).__name__} without any"
        )
    # A layer may have a `forward` of its own already, such as that of accelerate's offloading.
    wrapped = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            # Nothing in a layer is random: dropout is off.
            again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            layer.forward = again
        yield
    finally:
        for layer, forward in zip(layers, wrapped, strict=True):
            if forward is not None:
                layer.forward = forward
            else:
                layer.__dict__.pop("forward", None)
