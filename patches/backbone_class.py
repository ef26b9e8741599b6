"""Give the backbone of a patched model a class whose forward may play a recorded prompt in place of the model's own."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.backbone_call import backbone_call
from hf_sparse.patches.derived_class import derived_class


@functools.cache
def backbone_class(kind: Any) -> Any:
    """Return the subclass of a class of backbones; an instance has a `model_switch`, whose `read` its forward calls."""
    parameters = [*inspect.signature(kind.forward).parameters.values()][1:]
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return kind.forward(self, *args, **kwargs)
        given = names[: len(args)]
        ids = args[given.index("input_ids")] if "input_ids" in given else kwargs.get("input_ids")
        switch: Any = vars(self).get("model_switch")
        if switch is None or not isinstance(ids, Tensor) or ids.shape[-1] < 2:  # decoding steps, which cannot wait
            return kind.forward(self, *args, **kwargs)
        if len(args) > len(names) or not kwargs.keys().isdisjoint(given):  # raises an error
            return kind.forward(self, *args, **kwargs)
        return switch.read(self, dict(zip(given, args, strict=True)) | kwargs)

    return derived_class(kind, forward, backbone_class)


def own_forward(backbone: nn.Module, inputs: dict[str, Any]) -> Any:
    """Call the forward of the model's own class, eagerly, from within that of `backbone_class`."""
    kind: Any = backbone.unpatched_class
    with backbone_call():
        return kind.forward(backbone, **inputs)
