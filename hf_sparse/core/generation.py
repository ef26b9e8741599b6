"""Tell the sparse attention of a prompt what `generate` is about to do, so that it can prepare for all of it at once.

A layer knows its own kernels when it is reached, and those of decoding steps when the first step is there. Compiled one
after another they take many times as long as side by side.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_sparse.core.layer import SparseAttentionLayer


@dataclass(frozen=True)
class Generation:
    """Hold what is known of a call of `generate` before its prompt is read.

    Attributes:
        layers: the sparse attention layers of the model.
        has_steps: whether steps of one token follow the prompt.
        is_masked: whether these come with a padding mask.
    """

    layers: Sequence["SparseAttentionLayer[Any]"]
    has_steps: bool
    is_masked: bool


_announced: ContextVar[Generation | None] = ContextVar("announced", default=None)


@contextmanager
def announced(generation: Generation | None) -> Iterator[None]:
    """Let the first of its layers that asks in this thread know of a call of `generate`, within a `with` block."""
    token = _announced.set(generation)
    try:
        yield
    finally:
        _announced.reset(token)


def is_announced() -> bool:
    """Tell whether a call of `generate` was announced in this thread, and no layer has taken it yet."""
    return _announced.get() is not None


def take_announcement(layer: object) -> Generation | None:
    """Return what was announced, once; `None` if nothing was, or to other layers, or another layer has taken it."""
    generation = _announced.get()
    if generation is None or layer not in generation.layers:
        return None
    _announced.set(None)
    return generation
