"""Define the settings at which graphs are compared: the adapter's own, and given sparsities."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from hf_sparse.core.overrides import override
from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention
from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.predictors.budgets import mean_tiles
from hf_sparse.ops.tiles.tiles import own_tiles, tile_counts
from hf_sparse.patches import sparse_layers_in_use

# Settings that do not change how the trained adapter attends.
_NOT_ATTENDED_BY = {f.name for f in fields(PeftConfig)} | {
    *("initial_scale", "target_modules", "base_shape", "modules_to_save", "saves_embeddings")
}


@dataclass(frozen=True)
class Point:
    """Choose a number of tiles per query tile.

    Attributes:
        sparsity: the share of the allowed pairs of tiles that is left out; `None` for that of the settings.
        own: whether these are the adapter's own settings.
    """

    sparsity: float | None
    own: bool = False


def predicting_layers(model: nn.Module) -> list[SparsefinderAttention]:
    """Return the Sparsefinder layers of the active adapter, at least one.

    Raises:
        ValueError: a model without Sparsefinder attention.
    """
    layers = sparse_layers_in_use(model, SparsefinderAttention)
    if not layers:
        raise ValueError(
            f"expected a model with Sparsefinder attention, got a {type(model).__name__} without; "
            "use hf_sparse.patch, peft.get_peft_model or hf_sparse.from_pretrained first"
        )
    return layers


def adapter_settings(config: SparsefinderConfig) -> dict[str, Any]:
    """Return the settings that an adapter attends by, which a measurement belongs to."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _NOT_ATTENDED_BY}


def counted(config: SparsefinderConfig) -> bool:
    """Tell whether the settings fix the number of predicted tiles; otherwise the predictor decides on it."""
    return config.tile is not None and config.predictor not in ("bound", "full", "pooled")


def tiles_per_query(config: SparsefinderConfig, queries: int, keys: int, causal: bool) -> int | Tensor:
    """Count the key tiles of each query tile: a number, or `[nq]` int64. A graph of tokens has tiles of one token."""
    listed, total = tile_counts(queries, keys, config.tile or 1, config.rows)
    return mean_tiles(config, own_tiles(listed, keys, config.tile or 1, config.rows), total, causal=causal)


def listed_tiles(config: SparsefinderConfig, length: int, causal: bool) -> tuple[int, int]:
    """Count the pairs of tiles that are listed for a text, and those that are allowed."""
    listed, total = tile_counts(length, length, config.tile or 1, config.rows)
    count = tiles_per_query(config, length, length, causal)
    own_tile = own_tiles(listed, length, config.tile or 1, config.rows).tolist()
    reach = [tile + 1 if causal else total for tile in own_tile]
    counts = [count] * listed if isinstance(count, int) else count.tolist()
    return sum(map(min, reach, counts)), sum(reach)


def points_of(
    layers: Sequence[SparsefinderAttention], sparsities: Sequence[float], length: int, causal: bool
) -> list[Point]:
    """Return the points to measure: the sparsities, and the adapter's own settings if none of them is the same."""
    config = layers[0].config
    own_pairs = listed_tiles(config, length, causal) if counted(config) else None
    points = []
    for sparsity in sorted(set(sparsities)):
        with at_point(layers, Point(sparsity), length):
            same = own_pairs is not None and listed_tiles(config, length, causal) == own_pairs
        points.append(Point(sparsity, own=same))
        own_pairs = None if same else own_pairs
    if not any(point.own for point in points) and config.predictor != "full":
        points.insert(0, Point(None, own=True))
    return points


def at_point(layers: Sequence[SparsefinderAttention], point: Point, length: int) -> AbstractContextManager[None]:
    """Let the predictors list as many tiles as a point says, for texts of `length` tokens, within a `with` block."""
    if point.sparsity is None:
        return nullcontext()
    configs = [layer.config for layer in layers]
    return override(configs, sparsity=point.sparsity, length=length, tiles_per_query=None)
