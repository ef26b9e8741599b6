"""The same scorers with more or fewer slots."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_sparse.core.overrides import override
from hf_sparse.methods.sparsek import Budget
from hf_sparse.methods.sparsek.evaluation.contenders import patched_layers


def budget_of(model: nn.Module) -> Budget:
    """The budget of the active adapter; its mean over layers, where `layer_shares` differ."""
    config = patched_layers(model)[0].config
    return Budget(config.k, config.window, config.sinks)


@contextmanager
def at_budget(model: nn.Module, budget: Budget) -> Iterator[None]:
    """Give the active adapter another budget within a `with` block; caches made outside it do not fit inside."""
    configs = [method.config for method in patched_layers(model)]
    with override(configs, k=budget.k, window=budget.window, sinks=budget.sinks):
        yield
