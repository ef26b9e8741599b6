"""Hold what the attention layers of one forward of a backbone, which reads several tokens, share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class BackboneCall:
    """Hold what the attention layers of one forward of a backbone share where they keep no keys.

    Python runs faster over all layers at once than where each is reached. So the patch checks all at the first layer,
    and asks the method what each of them needs; of long texts at the second layer, while the GPU works on the first.
    Layers that keep keys share a `ModelCall`.

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
