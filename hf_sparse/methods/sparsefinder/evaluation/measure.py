"""Measure predicted graphs, beside full entmax, dense softmax and other patterns of the same number of tiles.

Treviso et al. 2022 (arXiv 2109.12188) for the metrics and their averages; patterns as masks on the same trained model.
Graphs compound: each layer gets what the layers before it make of their own graphs, as it is in use, and the
gold graph is that of the queries and keys of that forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hf_sparse.core.overrides import override
from hf_sparse.evaluation.base import Request
from hf_sparse.evaluation.quality import compare_outputs, outputs
from hf_sparse.evaluation.switching import switched
from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention
from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.evaluation.operating_points import (
    Point,
    at_point,
    counted,
    listed_tiles,
    points_of,
    predicting_layers,
    tiles_per_query,
)
from hf_sparse.methods.sparsefinder.evaluation.patterns import (
    CONTENDERS,
    Patterns,
    attending,
    fit_routing,
    fit_windows,
)
from hf_sparse.methods.sparsefinder.evaluation.record import GraphRecord
from hf_sparse.methods.sparsefinder.evaluation.totals import Totals
from hf_sparse.progress import tracked

_FITTED_TEXTS = 2  # that centroids of routing and widths of windows are fitted to

Run = tuple[Point, str]
_DENSE, _FULL = (Point(None), "dense"), (Point(None), "full")


def measure_graphs(model: Any, request: Request) -> dict[str, Any]:
    """Measure the contenders at the adapter's own number of tiles and at the sparsities of the settings.

    The same seed gives the same result.

    Args:
        model: a patched model in `eval` mode, its predictors fitted; it comes back as it was.
        request: its settings are `SparsefinderEvaluationSettings`.

    Returns:
        `dense` (not of a checkpoint that was trained with entmax, which is no model with softmax) and `full` (entmax
        over all keys), and for each of `points` the `results` of each contender: the model's
        metric, for language models also `divergence` (mean KL from full entmax, nats per prediction) and for masked
        ones `accuracy`; and of the graphs `sparsity`, `gold_sparsity`, `recall`, `mass_recall`, `exact_rows`,
        `precision` (`hf_sparse.ops.predictors.metrics`), and for tiles `tile_sparsity`, `certified_rows` (rows that the
        page bound proves exact) and `added_tiles` (per query tile, by `complete=True`). `heads` of a point has the
        predicted graph's per layer and query head, `gold_heads` the gold sparsity of full entmax, of the attention
        modules `layers`. `rows` is how many queries of each chunk were compared with the gold graph.
    """
    layers, length, settings = predicting_layers(model), request.tokens.shape[1], request.settings
    config, causal = layers[0].config, layers[0].causal
    names = [name for name in CONTENDERS if name in request.contenders]
    points = points_of(layers, settings.sparsities, length, causal)
    # The first run is what the others are compared with.
    runs: list[Run] = [_DENSE, _FULL] if request.kind == "features" else [_FULL, _DENSE]
    if config.entmax_native is not None:
        runs.remove(_DENSE)
    runs += [(point, name) for point in points for name in names if _has(config, point, name)]
    with certifying(layers):
        totals, records = _measure(model, layers, request, runs)
        entries = [_entry(layers, point, length, causal) for point in points]

    def result(run: Run) -> dict[str, float]:
        return {**totals[run].means(request.kind), **(records[run].mean() if run in records else {})}

    for point, entry in zip(points, entries, strict=True):
        entry["results"] = {name: result((point, name)) for name in names if (point, name) in totals}
        if (point, "predicted") in records:
            entry["heads"] = _rounded(records[point, "predicted"].per_head())
    return {
        "graphs": "compounded",
        "rows": min(settings.rows, length),
        "seed": settings.seed,
        **({"dense": result(_DENSE)} if _DENSE in runs else {}),
        "full": result(_FULL),
        "layers": sorted(records[_FULL].layers),
        "gold_heads": _rounded(records[_FULL].per_head())["gold_sparsity"],
        "points": entries,
    }


@contextmanager
def certifying(layers: Sequence[SparsefinderAttention]) -> Iterator[None]:
    """Attend by the predicted graphs, certified and unobserved, within a `with` block; then all is as it was."""
    with override(layers, pattern=None, observer=None, certify=True), switched(layers, True):
        yield


def _has(config: SparsefinderConfig, point: Point, name: str) -> bool:
    """Tell whether a contender is measured at a point: one that decides on its own number of tiles only once."""
    if counted(config):
        return True
    return (name == "predicted") == (point.sparsity is None)


def _measure(
    model: Any, layers: Sequence[SparsefinderAttention], request: Request, runs: Sequence[Run]
) -> tuple[dict[Run, Totals], dict[Run, GraphRecord]]:
    """Return for each run what the model makes of the text, and of its graphs."""
    kind, tokens, labels, seed = request.kind, request.tokens, request.labels, request.settings.seed
    device, length = next(model.parameters()).device, tokens.shape[1]
    generator = torch.Generator().manual_seed(seed)
    sampled = torch.randperm(length, generator=generator)[: request.settings.rows].sort().values
    patterns = [Patterns(layer, seed) for layer in layers]
    first = [_on(device, *texts) for texts in _batches(tokens, labels, 1)[:_FITTED_TEXTS]]

    def read() -> None:
        for texts in first:
            outputs(model, kind, *texts)

    if any(name == "routing" for _, name in runs):
        fit_routing(patterns, read, seed)
    if any(name == "windows" for _, name in runs):
        fit_windows(patterns, read)
    graphs = {run: [layer_patterns.pattern(run[1]) for layer_patterns in patterns] for run in runs if run != _DENSE}
    totals = {run: Totals() for run in runs}
    records = {run: GraphRecord(sampled) for run in graphs}
    steps: Any = list(product(_batches(tokens, labels, request.batch_size), runs))
    if request.progress:
        steps = tracked(steps, "graphs")
    reference = torch.empty(0)
    for texts, run in steps:
        inputs, targets = _on(device, *texts)
        with ExitStack() as stack:
            stack.enter_context(at_point(layers, run[0], length))
            if run == _DENSE:
                stack.enter_context(switched(layers, False))
            else:
                stack.enter_context(attending(layers, graphs[run]))
                stack.enter_context(override(layers, observer=records[run]))
            values = outputs(model, kind, inputs, targets)
        if run == runs[0]:
            reference = values
        totals[run].add(compare_outputs(kind, values, reference, inputs, targets))
    return totals, records


def _batches(tokens: Tensor, labels: Tensor | None, size: int) -> list[tuple[Tensor, Tensor | None]]:
    batches = tokens.split(size)
    return list(zip(batches, labels.split(size) if labels is not None else [None] * len(batches), strict=True))


def _on(device: torch.device, tokens: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return tokens.to(device), None if labels is None else labels.to(device)


def _entry(layers: Sequence[SparsefinderAttention], point: Point, length: int, causal: bool) -> dict[str, Any]:
    """Return the first entries of a point in eval.json: its number of tiles."""
    config = layers[0].config
    if point.sparsity is None and not counted(config):
        return {"sparsity": None, "tiles_per_query": None, "own": True}
    with at_point(layers, point, length):
        listed, allowed = listed_tiles(config, length, causal)
        count = tiles_per_query(config, length, length, causal)
    mean = float(count) if isinstance(count, int) else count.double().mean().item()
    sparsity = round(1 - listed / allowed, 4) if point.sparsity is None else point.sparsity
    return {"sparsity": sparsity, "tiles_per_query": mean, "own": point.own}


def _rounded(heads: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    return {name: [[round(value, 6) for value in layer] for layer in layers] for name, layers in heads.items()}
