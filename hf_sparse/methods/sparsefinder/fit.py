"""Fit the clusters or bins of every attention module to text that the model reads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention, Text
from hf_sparse.ops.graphs.clustering import training_points


@torch.no_grad()
def fit_predictors(
    methods: Sequence[SparsefinderAttention],
    read: Callable[[], Any],
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Fit the predictors of the active adapter; meanwhile attention is entmax over all keys.

    All projected queries and keys are held at once: `rank` numbers per token, head and module.

    Args:
        methods: of one model, see `hf_sparse.patches.methods_in_use`.
        read: runs the model on training text, once or several times, without a cache.
        generator: for the seeds of k-means.

    Raises:
        ValueError: more clusters or bins than projected queries and keys.
    """
    methods = [method for method in methods if method.config.learns_graph]
    points: list[list[Tensor]] = [[] for _ in methods]
    patterns = [(method.pattern, method.observer) for method in methods]
    try:
        for method, into in zip(methods, points, strict=True):
            method.pattern, method.observer = _all_keys, _collector(method, into)
        read()
    finally:
        for method, (pattern, observer) in zip(methods, patterns, strict=True):
            method.pattern, method.observer = pattern, observer
    for method, found in zip(methods, points, strict=True):
        if not found:
            raise ValueError("the model read no text: nothing to fit the predictors to")
        method.parameters_in_use.fit(torch.cat(found, 1), generator)


def _all_keys(text: Text) -> None:
    return None


def _collector(method: SparsefinderAttention, into: list[Tensor]) -> Any:
    def collect(text: Text, *_: Any) -> None:
        learned = method.parameters_in_use
        into.append(training_points(learned.project_queries(text.query), learned.project_keys(text.key)))

    return collect
