"""Give the backbone of a patched model a class whose forward may play a recorded prompt in place of the model's own."""

import functools
import inspect
from typing import Any

import torch
from torch import nn

from hf_sparse.core.backbone_call import backbone_call
from hf_sparse.patches.derived_class import derived_class


@functools.cache
def backbone_class(kind: Any) -> Any:
    """Return the subclass of a class of backbones; an instance has a `model_switch`, whose `read` its forward calls."""
    names = [*inspect.signature(kind.forward).parameters][1:]

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return kind.forward(self, *args, **kwargs)
        ids = args[0] if args else kwargs.get("input_ids")
        switch: Any = vars(self).get("model_switch")
        if switch is None or ids is None or ids.shape[-1] < 2:  # decoding steps, which cannot wait
            return kind.forward(self, *args, **kwargs)
        return switch.read(self, dict(zip(names, args, strict=False)) | kwargs)

    return derived_class(kind, forward, backbone_class)


def run(backbone: nn.Module, inputs: dict[str, Any]) -> Any:
    """Return what the forward of the model itself returns, as it is called within that of `backbone_class`."""
    kind: Any = backbone.model_class
    with backbone_call():
        return kind.forward(backbone, **inputs)
