"""Take a decoding step eager on a GPU in two launches, with what does not change between steps decided once.

The kernels also write the newest key and value, and its codes, where the cache keeps them. What a step compares is what
could change without notice: settings, tensors that were replaced, the layout of the new token.
"""

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsefinder.cache import SparsefinderCacheLayer
from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters
from hf_sparse.methods.sparsefinder.predictors.clustering import Clustering
from hf_sparse.methods.sparsefinder.ways import Way
from hf_sparse.ops.entmax.step import MOST_ROWS, Scales
from hf_sparse.ops.entmax.triton import WIDEST
from hf_sparse.ops.triton import DTYPES, installed, is_on_gpu

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention
    from hf_sparse.ops.entmax.triton.step import StepPlan
    from hf_sparse.ops.predictors.triton.cluster_step import ClusterStep, Projections

# Settings that the kernels of a predicted step depend on.
_SETTINGS = (
    "tile", "query_tile", "window", "global_tokens", "per_group", "profile", "tiles_per_query", "sparsity", "length",
    "cluster_parts", "head_budgets", "shared_projection",
)  # fmt: skip


def take_step(
    attention: "SparsefinderAttention", way: Way, new: NewTokens, cache: SparsefinderCacheLayer
) -> Tensor | None:
    """Attend with one causal query per text, and write the newest token where the cache keeps it.

    Args:
        way: see `way_of`.
        new: one token of each text.
        cache: has taken them in.

    Returns:
        `[B, Hq, 1, D]`, contiguous; `None`, with nothing changed, if the step has to take another path: it goes another
        way, is being compiled or differentiated, or no kernels take what came.
    """
    query, key, value, _, _, scaling = new
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    learned = attention.parameters_in_use
    is_listed = way is Way.LISTED_TILES and type(learned.predictor) is Clustering and cache.newest is not None
    if way is not Way.FEW_OVER_ALL_KEYS and not is_listed:
        return None
    layout = (query.shape, query.stride(), query.dtype, query.device)
    if cache.checked != layout or cache.newest is None:
        if not _has_kernels(query, key, value, cache.newest):
            return None
        cache.checked = layout  # what `update` lets pass is as the token before was
    elif not _launches_on(query):
        return None
    scales = learned.step_scales(query, scaling)
    return _over_clusters(attention, new, cache, scales) if is_listed else _over_all_keys(new, cache, scales)


def _has_kernels(query: Tensor, key: Tensor, value: Tensor, newest: tuple[Tensor, Tensor] | None) -> bool:
    """Tell whether the kernels take these tensors as they are."""
    if not _launches_on(query) or not query.dtype == key.dtype == value.dtype or query.shape[3] > WIDEST:
        return False
    if query.shape[1] // key.shape[1] > MOST_ROWS or query.dtype not in DTYPES:
        return False
    rows = (query, key, value) if newest is None else (query, key, value, *newest)
    return all([tensor.stride(3) == 1 for tensor in rows])


def _launches_on(query: Tensor) -> bool:
    """Tell whether Triton launches on the device of a tensor now, and nothing casts what is computed."""
    return is_on_gpu(query) and query.numel() > 0 and not torch.is_autocast_enabled("cuda") and installed()


@dataclass
class ExactPlan:
    """Hold the kernels of a layer's steps over all keys, and what they were made for.

    Attributes:
        rooms: what the keys and values of the cache lie in.
        layout: shapes, dtypes and kinds of what a step computes with.
    """

    kernels: "StepPlan"
    rooms: Any
    layout: tuple[Any, ...]


def _over_all_keys(new: NewTokens, cache: SparsefinderCacheLayer, scales: Scales) -> Tensor:
    """Take the step over all keys, see `take_step`."""
    from hf_sparse.ops.entmax.triton.step import StepPlan, step  # Triton is there only beside a CUDA device

    query, key, value, _, valid, _ = new
    newest, plan = cache.newest, cache.plan
    if newest is None:  # after a change of rows, say
        numbers = (scales.scale, scales.exponent, scales.kind, scales.factor, scales.is_log)
        return step(query, key, value, *numbers, True, valid, None, None, 1)
    layout = (
        query.shape, query.dtype, None if valid is None else valid.dtype, scales.kind, scales.is_log,
        scales.scale.dtype, None if scales.exponent is None else scales.exponent.dtype, cache.place is None,
    )  # fmt: skip
    if not isinstance(plan, ExactPlan) or plan.rooms is not cache.rooms or plan.layout != layout:
        kernels = StepPlan(query, key, value, key.shape[1], kind=scales.kind, is_log=scales.is_log, causal=True)
        plan = cache.plan = ExactPlan(kernels, cache.rooms, layout)
    output = plan.kernels.run(
        query, key, value, scales.scale, scales.exponent, scales.factor, valid, cache.place, None, 1, newest
    )
    cache.newest = None
    return output


@dataclass
class ClusterPlan:
    """Hold the kernels of a layer's predicted steps, and what they were made for.

    Attributes:
        kernels: `None` if there are none for such steps.
        projections: the tensors that they read.
        learned, tensors: the parameters of the adapter, and their tensors with their dtypes.
        rooms: what the keys and values of the cache lie in.
        layout: shapes, dtypes and kinds of what a step computes with, and settings.
    """

    kernels: "ClusterStep | None"
    projections: "Projections | None"
    learned: SparsefinderParameters
    tensors: list[tuple[Tensor | None, Any]]
    rooms: Any
    layout: tuple[Any, ...]

    def is_for(
        self,
        learned: SparsefinderParameters,
        tensors: list[tuple[Tensor | None, Any]],
        rooms: Any,
        layout: tuple[Any, ...],
    ) -> bool:
        """Tell whether the kernels were made for all of this; see the attributes."""
        return (
            self.learned is learned
            and self.rooms is rooms
            and self.layout == layout
            and len(self.tensors) == len(tensors)
            and all([a[0] is b[0] and a[1] == b[1] for a, b in zip(self.tensors, tensors, strict=True)])
        )


def _over_clusters(
    attention: "SparsefinderAttention", new: NewTokens, cache: SparsefinderCacheLayer, scales: Scales
) -> Tensor | None:
    """Take the step over the tiles that clusters choose, see `take_step`."""
    query, key, value, _, valid, _ = new
    learned = attention.parameters_in_use
    config = learned.config
    layout = (query.shape, query.dtype, valid is None, scales.kind, scales.is_log, scales.scale.dtype)
    layout = (*layout, cache.place is None, *[getattr(config, name) for name in _SETTINGS])
    tensors = [(t, None if t is None else t.dtype) for t in (*learned._parameters.values(), *learned._buffers.values())]
    plan = cache.plan
    if not isinstance(plan, ClusterPlan) or not plan.is_for(learned, tensors, cache.rooms, layout):
        kernels, projections = _kernels(learned, new, scales)
        plan = cache.plan = ClusterPlan(kernels, projections, learned, tensors, cache.rooms, layout)
    newest, kernels, projections = cache.newest, plan.kernels, plan.projections
    codes = None if kernels is None else cache.codes_to_write(attention.identities[attention.active])
    if codes is None or newest is None or kernels is None or projections is None:
        return None
    place = cache.place
    order, position = (None, None) if valid is None else _order_of(valid, place)
    if position is None and place is not None:
        position = place.expand(len(query))
    output = kernels(
        query, key, value, newest, codes, projections, scales.scale, scales.exponent, scales.factor, order,
        position, place,
    )  # fmt: skip
    cache.newest = None
    return output


def _kernels(
    learned: SparsefinderParameters, new: NewTokens, scales: Scales
) -> "tuple[ClusterStep | None, Projections | None]":
    """Make the kernels of a layer's predicted steps; `None` if there are none for its settings."""
    from hf_sparse.ops.predictors.triton.cluster_step import MOST_KEYS, ClusterStep, Lists, Projections

    config = learned.config
    if config.tile is None or config.rows is None or config.cluster_parts > 1 or config.head_budgets:
        return None, None
    lists = Lists(config.tile, config.rows, config.window, config.global_tokens, config.causal_tiles, config.per_group)
    shared = config.shared_projection
    projections = Projections(
        learned.projection if shared else learned.query_projection,
        None if shared else learned.query_bias,
        learned.projection if shared else learned.key_projection,
        learned.centroids,
        learned.profile if config.profile else None,
    )
    if lists.count * lists.size > MOST_KEYS:
        return None, None
    kernels = ClusterStep(new.query, new.key, new.value, lists, projections, kind=scales.kind, is_log=scales.is_log)
    return kernels, projections


_last: tuple[Any, int, tuple[Tensor, Tensor]] | None = None  # of `_order_of`: layers of a model get the same mask


def _order_of(valid: Tensor, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find where the tokens of padded texts lie, and where their newest ones stand; nothing waits for the device.

    Args:
        valid: `[B, T]` bool, False for padding.
        place: `[1]` int64, the column of the newest tokens; the last one by default.

    Returns:
        Columns of the tokens in their order, `[B, T]` int64, padding behind them, and the place of the newest token
        in that order, `[B]` int64, -1 where it is padding.
    """
    global _last
    version = -1 if valid.is_inference() else valid._version
    last = _last  # another thread may replace it meanwhile
    if last is not None and last[0]() is valid and last[1] == version:
        return last[2]
    order = (~valid).byte().argsort(dim=-1, stable=True)
    newest = valid[:, -1] if place is None else valid.index_select(1, place)[:, 0]
    position = torch.where(newest, valid.sum(-1), 0) - 1
    _last = weakref.ref(valid), version, (order, position)
    return order, position
