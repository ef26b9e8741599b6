"""Give an attention module a class whose forward tells the attention function of sparse attention.

Its forward adds one keyword, `sparse_call`, which transformers carries to the attention function, and calls the model's
own forward, which stays as it is. A forward pre-hook does the same, but torch calls a module that has hooks by a longer
way, which takes several per cent of the time that a layer needs for a short text. It is for modules whose class cannot
be another.
"""

import functools
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.patches.derived_class import derived_class, set_derived_class
from hf_sparse.patches.interface import before_attention, sparse_call


@functools.cache
def sparse_class(kind: Any) -> Any:
    """Return the subclass of a class of attention modules that attends sparsely where a method is attached."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = sparse_call(self, args, kwargs)
        if call is None:
            return kind.forward(self, *args, **kwargs)
        kwargs["sparse_call"] = call
        return kind.forward(self, *args, **kwargs)

    return derived_class(kind, forward, sparse_class)


def set_sparse_class(module: nn.Module) -> RemovableHandle | None:
    """Let an attention module attend sparsely where a method is attached to it.

    Returns:
        The handle of a hook where its class cannot be another, see `set_derived_class`; elsewhere `None`.
    """
    if set_derived_class(module, sparse_class):
        return None
    return module.register_forward_pre_hook(before_attention, with_kwargs=True)
