"""Everything that eval.json holds of a Sparsefinder model, in one call.

Treviso et al. 2022 (arXiv 2109.12188) for the metrics and their averages; patterns as masks on the same trained model.
Graphs compound: each layer gets what the layers before it make of their own graphs, as it is in use, and gold is that
of the queries and keys that arise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hf_sparse import environment
from hf_sparse.data import IGNORED, check_chunks, fingerprint, first_token, tensors
from hf_sparse.errors import DataError
from hf_sparse.methods.sparsefinder import SparsefinderAttention, SparsefinderConfig
from hf_sparse.methods.sparsefinder.evaluation.operating_points import (
    Point,
    adapter_settings,
    at_point,
    counted,
    listed_tiles,
    points_of,
    predicting_layers,
    tiles_per_query,
)
from hf_sparse.methods.sparsefinder.evaluation.patterns import PATTERNS, Patterns, fit_routing, fit_windows
from hf_sparse.methods.sparsefinder.evaluation.quality import Sums, compared, output_of
from hf_sparse.methods.sparsefinder.evaluation.record import GraphRecord
from hf_sparse.methods.sparsek.evaluation.contenders import check_selections, evaluating
from hf_sparse.metrics import METRIC_KEYS
from hf_sparse.model_kinds import Kind, kind_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FORMAT = 1

#: Shares of the allowed pairs of tiles that are left out, unless others are asked for.
SPARSITIES = (0.5, 0.7, 0.8, 0.9)

_FITTED_TEXTS = 2  # that centroids of routing and widths of windows are fitted to

# What there is only between tiles.
_OF_TILES = {"bound": "page bound is", "windows": "windows of each head are"}

Run = tuple[Point, str]
_DENSE, _FULL = (Point(None), "dense"), (Point(None), "full")


def analyse(
    model: "PeftModel | PreTrainedModel",
    chunks: Any,
    *,
    patterns: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
    batch_size: int = 1,
    rows: int = 256,
    seed: int = 0,
    progress: bool = True,
    text_name: str = "",
) -> dict[str, Any]:
    """Measure a Sparsefinder model on text against full entmax, dense softmax, and other patterns of as many tiles.

    The model comes back as it was. The same seed gives the same result.

    Args:
        model: a `PeftModel` or a model patched by `hf_sparse.patch`, its predictors fitted.
        chunks: `[N, T]` int64 tokens, `T` longer than a tile; for a masked language model what
            `hf_sparse.data.mask_tokens` returns.
        patterns: what to measure, of `PATTERNS`; all by default.
        sparsities: shares of the allowed pairs of tiles that are left out, at least 0 and below 1; `SPARSITIES` by
            default. The adapter's own number of tiles is measured too, at one of these if it comes to the same.
        batch_size: chunks at a time.
        rows: queries of each chunk whose rows are compared with the gold graph, drawn by the seed; at least 1.
        seed: of random tiles, hashes, centroids and rows.
        progress: show a progress bar on stderr.
        text_name: what the text is called in the result.

    Returns:
        What `eval.json` holds. `dense` and `full` (entmax over all keys), and for each of `points` the `results` of
        each pattern: the model's metric, for language models also `divergence` (mean KL from full entmax, nats per
        prediction) and for masked ones `accuracy`; and of the graphs `sparsity`, `gold_sparsity`, `recall`,
        `mass_recall`, `exact_rows`, `precision` (`hf_sparse.ops.predictors.metrics`), and for tiles `tile_sparsity`,
        `certified_rows` (rows that the page bound proves exact) and `added_tiles` (per query tile, by `complete=True`).
        `heads` of a point has the predicted graph's per layer and query head, `gold_heads` the gold sparsity of full
        entmax, of the attention modules `layers`.

    Raises:
        DataError: chunks that cannot be measured.
        ValueError: a model without Sparsefinder attention or with a predictor that was not fitted, or options out of
            range.
    """
    methods = predicting_layers(model)
    tokens, labels = tensors(model, chunks)
    config, causal = methods[0].config, methods[0].causal
    sparsities = SPARSITIES if sparsities is None else sparsities
    names = [name for name in PATTERNS if name in _wanted(config, patterns)]
    _check(model, config, tokens, labels, names, sparsities, batch_size, rows)
    for method in methods:
        method.parameters_in_use.check_fitted()
    kind, length = kind_of(model), tokens.shape[1]
    points = points_of(methods, sparsities, length, causal)
    # The first run is what the others are compared with.
    runs: list[Run] = [_DENSE, _FULL] if kind == "features" else [_FULL, _DENSE]
    runs += [(point, name) for point in points for name in names if _has(config, point, name)]
    with evaluating(model), observing(methods):
        sums, records = _measure(model, methods, kind, tokens, labels, runs, batch_size, rows, seed, progress)
        entries = [_entry(methods, point, length, causal) for point in points]

    def result(run: Run) -> dict[str, float]:
        return {**sums[run].means(kind), **(records[run].mean() if run in records else {})}

    for point, entry in zip(points, entries, strict=True):
        entry["results"] = {name: result((point, name)) for name in names if (point, name) in sums}
        if (point, "predicted") in records:
            entry["heads"] = _rounded(records[point, "predicted"].per_head())
    text: dict[str, Any] = {
        "name": text_name,
        "sha256": fingerprint(tokens, labels),
        "chunks": len(tokens),
        "length": length,
    }
    text["first_token"] = first_token(model, tokens)
    if kind != "features":
        text["predicted_tokens"] = len(tokens) * (length - 1) if labels is None else int((labels != IGNORED).sum())
    return {
        "format": FORMAT,
        "method": "sparsefinder",
        "base_model": config.base_model_name_or_path or model.config.name_or_path,
        "adapter": adapter_settings(config),
        "causal": causal,
        "text": text,
        "metric": METRIC_KEYS[kind],
        "graphs": "compounded",
        "rows": min(rows, length),
        "seed": seed,
        "dense": result(_DENSE),
        "full": result(_FULL),
        "layers": sorted(records[_FULL].layers),
        "gold_heads": _rounded(records[_FULL].per_head())["gold_sparsity"],
        "points": entries,
        **environment.describe(),
    }


def _wanted(config: SparsefinderConfig, patterns: Sequence[str] | None) -> Sequence[str]:
    if patterns is None:
        left_out = set(_OF_TILES) if config.tile is None else set()
        left_out |= {"predicted"} if config.predictor == "full" else set()
        return [name for name in PATTERNS if name not in left_out]
    check_selections(patterns, PATTERNS)
    for name in _OF_TILES:
        if config.tile is None and name in patterns:
            raise ValueError(f"the {_OF_TILES[name]} of tiles of keys: not measured for an adapter with tile=None")
    if config.predictor == "full" and "predicted" in patterns:
        raise ValueError("the predictor 'full' attends to all keys: there is no predicted graph to measure")
    return patterns


def _has(config: SparsefinderConfig, point: Point, name: str) -> bool:
    """Whether a pattern is measured at a point: one that decides on its own number of tiles only once."""
    if counted(config):
        return True
    return (name == "predicted") == (point.sparsity is None)


def _measure(
    model: Any,
    methods: Sequence[SparsefinderAttention],
    kind: Kind,
    tokens: Tensor,
    labels: Tensor | None,
    runs: Sequence[Run],
    batch_size: int,
    rows: int,
    seed: int,
    progress: bool,
) -> tuple[dict[Run, Sums], dict[Run, GraphRecord]]:
    """For each run what the model makes of the text, and of its graphs."""
    device, length = next(model.parameters()).device, tokens.shape[1]
    generator = torch.Generator().manual_seed(seed)
    sampled = torch.randperm(length, generator=generator)[:rows].sort().values
    patterns = [Patterns(method, seed) for method in methods]
    first = [_on(device, *texts) for texts in _batches(tokens, labels, 1)[:_FITTED_TEXTS]]

    def read() -> None:
        for texts in first:
            output_of(model, kind, *texts)

    if any(name == "routing" for _, name in runs):
        fit_routing(patterns, read, seed)
    if any(name == "windows" for _, name in runs):
        fit_windows(patterns, read)
    graphs = {run: [of.pattern(run[1]) for of in patterns] for run in runs if run != _DENSE}
    sums = {run: Sums() for run in runs}
    records = {run: GraphRecord(sampled) for run in graphs}
    steps: Any = list(product(_batches(tokens, labels, batch_size), runs))
    if progress:
        steps = track(steps, "graphs", console=Console(stderr=True), transient=True)
    reference = torch.empty(0)
    for texts, run in steps:
        some, answers = _on(device, *texts)
        for number, method in enumerate(methods):
            method.switch(run != _DENSE)
            method.pattern = graphs[run][number] if run in graphs else None
            method.observer = records.get(run)
        with at_point(methods, run[0], length):
            found = output_of(model, kind, some, answers)
        if run == runs[0]:
            reference = found
        sums[run].add(compared(kind, found, reference, some, answers))
    return sums, records


def _batches(tokens: Tensor, labels: Tensor | None, size: int) -> list[tuple[Tensor, Tensor | None]]:
    parts = tokens.split(size)
    return list(zip(parts, labels.split(size) if labels is not None else [None] * len(parts), strict=True))


def _on(device: torch.device, tokens: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return tokens.to(device), None if labels is None else labels.to(device)


@contextmanager
def observing(methods: Sequence[SparsefinderAttention]) -> Iterator[None]:
    """Attend sparsely and certify within a `with` block; afterwards the methods attend and are observed as before."""
    before = [(method, method.pattern, method.observer, method.certify, method.disable_adapters) for method in methods]
    try:
        for method in methods:
            method.pattern, method.observer, method.certify = None, None, True
            method.switch(True)
        yield
    finally:
        for method, pattern, observer, certify, disabled in before:
            method.pattern, method.observer, method.certify = pattern, observer, certify
            method.switch(not disabled)


def _entry(methods: Sequence[SparsefinderAttention], point: Point, length: int, causal: bool) -> dict[str, Any]:
    config = methods[0].config
    if point.sparsity is None and not counted(config):
        return {"sparsity": None, "tiles_per_query": None, "own": True}
    with at_point(methods, point, length):
        listed, allowed = listed_tiles(config, length, causal)
        count = tiles_per_query(config, length, length, causal)
    mean = float(count) if isinstance(count, int) else count.double().mean().item()
    sparsity = round(1 - listed / allowed, 4) if point.sparsity is None else point.sparsity
    return {"sparsity": sparsity, "tiles_per_query": mean, "own": point.own}


def _rounded(heads: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    return {name: [[round(value, 6) for value in layer] for layer in layers] for name, layers in heads.items()}


def _check(
    model: Any,
    config: SparsefinderConfig,
    tokens: Tensor,
    labels: Tensor | None,
    names: Sequence[str],
    sparsities: Sequence[float],
    batch_size: int,
    rows: int,
) -> None:
    check_chunks(model, tokens, labels)
    if not all(isinstance(value, int | float) and 0 <= value < 1 for value in sparsities):
        raise ValueError(f"sparsities must be at least 0 and below 1, got {list(sparsities)}")
    if tokens.shape[1] <= (config.tile or 1):
        raise DataError(
            f"nothing is left out: a text of {tokens.shape[1]} tokens is one tile of {config.tile}; use longer chunks"
        )
    for name, value in (("batch_size", batch_size), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not names:
        raise ValueError(f"patterns must be among {', '.join(PATTERNS)}, got none")
