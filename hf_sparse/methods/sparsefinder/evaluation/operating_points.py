"""The settings at which graphs are compared: the adapter's own, and wanted sparsities."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn

from hf_sparse.core.overrides import override
from hf_sparse.methods.sparsefinder import SparsefinderAttention, SparsefinderConfig
from hf_sparse.ops.tiles.select import tiles_for_sparsity
from hf_sparse.ops.tiles.tiles import own_tiles, tile_counts
from hf_sparse.patches import sparse_layers_in_use

# What says nothing about how the trained adapter attends.
_ASIDE = {f.name for f in fields(PeftConfig)} | {
    *("initial_scale", "target_modules", "base_shape", "modules_to_save", "saves_embeddings")
}


@dataclass(frozen=True)
class Point:
    """A number of tiles per query tile.

    Attributes:
        sparsity: the wanted share of the allowed pairs of tiles that is left out; `None` for that of the settings.
        own: whether these are the adapter's own settings.
    """

    sparsity: float | None
    own: bool = False


def predicting_layers(model: nn.Module) -> list[SparsefinderAttention]:
    """The attached Sparsefinders in use, of which there must be some.

    Raises:
        ValueError: a model without.
    """
    methods = sparse_layers_in_use(model, SparsefinderAttention)
    if not methods:
        raise ValueError(
            f"expected a model with Sparsefinder attention, got a {type(model).__name__} without; "
            "use hf_sparse.patch, peft.get_peft_model or hf_sparse.from_pretrained first"
        )
    return methods


def adapter_settings(config: SparsefinderConfig) -> dict[str, Any]:
    """What an adapter attends by: the settings that a measurement belongs to."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _ASIDE}


def counted(config: SparsefinderConfig) -> bool:
    """Whether the settings fix the number of predicted tiles; otherwise the predictor decides on it."""
    return config.tile is not None and config.predictor not in ("bound", "full")


def tiles_per_query(config: SparsefinderConfig, queries: int, keys: int, causal: bool) -> int | Tensor:
    """Key tiles of each query tile: a number, or `[nq]` int64. A graph of tokens has tiles of one token."""
    listed, total = tile_counts(queries, keys, config.tile or 1, config.rows)
    if config.tile is not None and config.tiles_per_query is not None:
        return config.tiles_per_query
    if config.tile is not None and causal:
        return config.causal_tiles
    own = own_tiles(listed, keys, config.tile or 1, config.rows)
    return tiles_for_sparsity(config.sparsity, listed, total, own=own, causal=causal)


def listed_tiles(config: SparsefinderConfig, length: int, causal: bool) -> tuple[int, int]:
    """Pairs of tiles that are listed for a text, and those that are allowed."""
    listed, total = tile_counts(length, length, config.tile or 1, config.rows)
    count = tiles_per_query(config, length, length, causal)
    own = own_tiles(listed, length, config.tile or 1, config.rows).tolist()
    reach = [tile + 1 if causal else total for tile in own]
    wanted = [count] * listed if isinstance(count, int) else count.tolist()
    return sum(map(min, reach, wanted)), sum(reach)


def points_of(
    methods: Sequence[SparsefinderAttention], sparsities: Sequence[float], length: int, causal: bool
) -> list[Point]:
    """The points to measure: the sparsities, and the adapter's own settings where none of them comes to the same."""
    config = methods[0].config
    own = listed_tiles(config, length, causal) if counted(config) else None
    points = []
    for sparsity in sorted(set(sparsities)):
        with at_point(methods, Point(sparsity), length):
            same = own is not None and listed_tiles(config, length, causal) == own
        points.append(Point(sparsity, own=same))
        own = None if same else own
    if not any(point.own for point in points) and config.predictor != "full":
        points.insert(0, Point(None, own=True))
    return points


@contextmanager
def at_point(methods: Sequence[SparsefinderAttention], point: Point, length: int) -> Iterator[None]:
    """Let the predictors list as many tiles as a point says, for texts of `length` tokens, within a `with` block."""
    if point.sparsity is None:
        yield
        return
    configs = [method.config for method in methods]
    with override(configs, sparsity=point.sparsity, length=length, tiles_per_query=None):
        yield
