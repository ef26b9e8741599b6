"""Observe the attention of all layers of a model for the length of a `with` block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from hf_sparse.core.overrides import override
from hf_sparse.methods.sparsefinder.attention import Observer, SparsefinderAttention
from hf_sparse.methods.sparsefinder.predictors import AttentionInputs


def all_keys(text: AttentionInputs) -> None:
    """Give no graph, as a `Pattern`: attention is entmax over all keys."""


@contextmanager
def observed(
    layers: Sequence[SparsefinderAttention], observer_of: Callable[[SparsefinderAttention], Observer], **others: Any
) -> Iterator[None]:
    """Give each layer an observer within a `with` block.

    Args:
        layers: of one model.
        observer_of: makes the observer of a layer.
        others: further attributes that all layers have meanwhile, such as `pattern=all_keys`.
    """
    with ExitStack() as overrides:
        for layer in layers:
            overrides.enter_context(override([layer], observer=observer_of(layer), **others))
        yield
