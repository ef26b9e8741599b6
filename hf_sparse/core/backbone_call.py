"""Hold what the attention layers of one forward of a backbone, which reads several tokens, share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class BackboneCall:
    """Hold what the attention layers of one forward of a backbone share where they keep no keys.

    Python runs faster over all layers at once than where each is reached. So at the first one (with long
    texts, which the GPU could begin with, at the second one) the patch checks all, and asks the method what each of
    them needs. Layers that keep keys share a `ModelCall`.

    Attributes:
        ready: by sparse attention layer, what `prepare` of it returned: what it needs in this call, computed ahead.
        shared: what the method lets its layers share; `None` before that.
    """

    ready: dict[Any, Any] = field(default_factory=dict)
    shared: Any = None


class _OfThread(threading.local):
    call: BackboneCall | None = None


_of_thread = _OfThread()


def current_call() -> BackboneCall | None:
    """Return the forward of a backbone that this thread is in; `None` outside of one."""
    return _of_thread.call


@contextmanager
def backbone_call() -> Iterator[None]:
    """Note that a forward of a backbone goes on, for the length of a `with` block."""
    before, _of_thread.call = _of_thread.call, BackboneCall()
    try:
        yield
    finally:
        _of_thread.call = before
