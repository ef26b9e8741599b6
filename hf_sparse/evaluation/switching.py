"""Let one contender attend in a model for as long as something is measured, and put the model back as it was."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.core.overrides import override
from hf_sparse.core.registry import method_of
from hf_sparse.evaluation.base import AbstractEvaluation
from hf_sparse.patches import sparse_layers_in_use


def evaluation_of(model: nn.Module) -> AbstractEvaluation:
    """Return how a patched model is measured, by the method of its active adapter.

    Raises:
        ValueError: a model without sparse attention.
    """
    evaluation: AbstractEvaluation = method_of(layers_to_measure(model)[0].config).evaluation()
    return evaluation


def layers_to_measure(model: nn.Module) -> list[SparseAttentionLayer]:
    """Return the sparse attention layers of the active adapter, at least one.

    Raises:
        ValueError: a model without sparse attention.
    """
    layers = sparse_layers_in_use(model)
    if not layers:
        raise ValueError(
            f"expected a model with sparse attention, got a {type(model).__name__} without; "
            "use hf_sparse.patch, peft.get_peft_model or hf_sparse.from_pretrained first"
        )
    return layers


def using(model: nn.Module, name: str, budget: Any = None) -> AbstractContextManager[None]:
    """Let one contender attend within a `with` block; afterwards the model is as it was, whatever happens in it.

    Args:
        model: a patched model.
        name: one of `evaluation_of(model).contenders(model)`. `"dense"` is the base model: sparse attention is switched
            off, LoRA included.
        budget: of the method, in place of that of the active adapter; a KV cache that was made outside the block does
            not fit inside.

    Raises:
        ValueError: another name, or a model without sparse attention.
    """
    return evaluation_of(model).using(model, name, budget)


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Put all modules of a model in `eval` mode within a `with` block; afterwards each is back in its own mode."""
    return override(model.modules(), training=False)


@contextmanager
def switched(layers: Iterable[SparseAttentionLayer], enabled: bool) -> Iterator[None]:
    """Switch sparse attention on or off within a `with` block; afterwards each layer is on or off as before."""
    with ExitStack() as restore:
        for layer in layers:
            restore.callback(layer.switch, not layer.disable_adapters)
            layer.switch(enabled)
        yield
