"""The same scorers with more or fewer slots."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from hf_sparse.evaluation.selections import patched_methods


@dataclass(frozen=True)
class Budget:
    """KV pairs per layer and KV head.

    >>> Budget.of(256, sinks=4)
    Budget(k=124, window=128, sinks=4)
    """

    k: int
    window: int
    sinks: int

    @property
    def slots(self) -> int:
        return self.k + self.window + self.sinks

    @classmethod
    def of(cls, slots: int, sinks: int) -> "Budget":
        """Half of the slots are window; the rest, less the sinks, is selected.

        Raises:
            ValueError: too few for a window and a selected key.
        """
        least = max(2, 2 * sinks + 1)
        if slots < least:
            raise ValueError(f"with {sinks} sinks, slots must be at least {least}, got {slots}")
        window = slots // 2
        return cls(slots - window - sinks, window, sinks)

    @classmethod
    def of_model(cls, model: nn.Module) -> "Budget":
        """That of the active adapter."""
        config = patched_methods(model)[0].config
        return cls(config.k, config.window, config.sinks)


@contextmanager
def at_budget(model: nn.Module, budget: Budget) -> Iterator[None]:
    """Give the active adapter another budget within a `with` block; caches made outside it do not fit inside."""
    configs = list({id(method.config): method.config for method in patched_methods(model)}.values())
    before = [(config, config.k, config.window, config.sinks) for config in configs]
    try:
        for config in configs:
            config.k, config.window, config.sinks = budget.k, budget.window, budget.sinks
        yield
    finally:
        for config, k, window, sinks in before:
            config.k, config.window, config.sinks = k, window, sinks
