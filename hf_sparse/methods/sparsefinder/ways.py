"""Decide by which way a forward of Sparsefinder attends: the only place that weighs mode, settings and what came."""

from enum import Enum, auto
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.ops.entmax.step import is_step

if TYPE_CHECKING:
    from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention


class Way(Enum):
    """Name the ways to attend. In a cache, the first two leave no codes; what goes on with a graph needs those."""

    FEW_OVER_ALL_KEYS = auto()  # a few causal queries and no gradient: `attend_few`, or the kernels of `step.py`
    ALL_KEYS = auto()  # any queries: `entmax_attention`
    LISTED_TILES = auto()  # one causal query per text and no gradient, over tiles listed on the device: as the first
    GRAPH = auto()  # over the graph that a predictor or a pattern gives, which an observer may look at


def is_learning(attention: "SparsefinderAttention", cache: object) -> bool:
    """Tell whether attention is over all keys because scales are learned; also where `finetune` observes texts."""
    return attention.is_learning(cache) or (attention.training and attention.observer is not None)


def is_unfitted(attention: "SparsefinderAttention") -> bool:
    """Tell whether a checkpoint that was trained with entmax attends to all keys, for no graph is fitted yet."""
    return attention.config.entmax_native is not None and not attention.parameters_in_use.is_fitted


def way_of(attention: "SparsefinderAttention", new: NewTokens, cache: object, place: Tensor | None) -> Way:
    """Decide how new tokens attend; `LISTED_TILES` and `GRAPH` hold for rows without padding, or packed.

    Args:
        new: the tokens.
        cache: the cache layer, which has taken them in, or `None`.
        place: `[1]` int64, where the only query of each text stands in keys that are all there is room for; `None`
            where queries are the last ones.
    """
    if attention.is_observed:
        return Way.GRAPH
    config, predictor, certify = attention.config, attention.parameters_in_use.predictor, attention.certify
    queries, keys, has_gradient = new.query.shape[2], new.key.shape[2], torch.is_grad_enabled()
    learning = is_learning(attention, cache)
    sees_all = is_unfitted(attention) or (config.complete and not certify)
    is_few = attention.causal and not (has_gradient or learning or certify) and is_step(new.query, new.key)
    if is_few and (sees_all or predictor.sees_all_keys(queries, keys)):
        return Way.FEW_OVER_ALL_KEYS
    if learning or sees_all or predictor.sees_all:
        return Way.ALL_KEYS
    may_list = predictor.learns_graph and config.tile is not None and not certify
    if may_list and attention.causal and queries == 1 and (not has_gradient or place is not None):
        return Way.LISTED_TILES
    return Way.GRAPH
