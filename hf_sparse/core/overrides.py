"""Change settings of live objects that refuse it, for the length of a `with` block or for good."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def override(objects: Iterable[object], **values: Any) -> Iterator[None]:
    """Set attributes of objects and restore them in the end, whatever happens in between.

    It may set the fields of a configuration that is read-only because it was attached to a model, and of a frozen
    dataclass; their checks do not run.

    Args:
        objects: configurations, layers or others. An object that comes twice is changed once.
        values: the attributes by name, the same for all objects.

    Raises:
        AttributeError: an object lacks an attribute; none is changed then.

    >>> from types import SimpleNamespace
    >>> layer = SimpleNamespace(k=188, window=64)
    >>> with override([layer], k=16):
    ...     print(layer.k, layer.window)
    16 64
    >>> layer.k
    188
    """
    distinct = list({id(item): item for item in objects}.values())
    previous = [(item, name, getattr(item, name)) for item in distinct for name in values]
    with ExitStack() as restore:
        for item, name, value in previous:
            restore.callback(_set, item, name, value)
            _set(item, name, values[name])
        yield


def overwrite(objects: Iterable[object], **values: Any) -> None:
    """Set attributes of objects for good, past their own refusal, as `override` does it for a block."""
    for item in objects:
        for name, value in values.items():
            _set(item, name, value)


def _set(item: object, name: str, value: Any) -> None:
    """Set an attribute past an object's own refusal; a module of torch has to hear of its submodules and parameters."""
    if isinstance(item, nn.Module):
        setattr(item, name, value)
    else:
        object.__setattr__(item, name, value)
