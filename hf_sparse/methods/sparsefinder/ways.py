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
    """Name the ways to attend.

    The first two leave no codes in the cache, which graphs are predicted from: a text that began so cannot go on with a
    predicted graph.
    """

    FEW_OVER_ALL_KEYS = auto()  # a few causal queries, no gradient: the kernels of `step.py`, or `attend_few`
    ALL_KEYS = auto()  # any number of queries, with a gradient if asked: `entmax_attention`
    LISTED_TILES = auto()  # one causal query per text over predicted tiles, no gradient: as the first
    GRAPH = auto()  # any number of queries over a graph, predicted or that of `pattern`, which may be observed


def is_learning(attention: "SparsefinderAttention", cache: object) -> bool:
    """Tell whether attention is over all keys because scales are learned; also where `finetune` observes texts."""
    return attention.is_learning(cache) or (attention.training and attention.observer is not None)


def is_unfitted(attention: "SparsefinderAttention") -> bool:
    """Tell whether a checkpoint that was trained with entmax attends to all keys, for no graph is fitted yet."""
    return attention.config.entmax_native is not None and not attention.parameters_in_use.is_fitted


def way_of(attention: "SparsefinderAttention", new: NewTokens, cache: object, place: Tensor | None) -> Way:
    """Decide how new tokens attend. Padding decides nothing: where tiles depend on it, texts are packed first.

    Args:
        new: the tokens.
        cache: the cache layer, which has taken them in, or `None`.
        place: `[1]` int64, position of the only query of each text where `new.key` has all the room that there is, in a
            static cache or while a step is recorded; `None` where the queries stand at the last keys.
    """
    if attention.is_observed:
        return Way.GRAPH
    config, predictor, certify = attention.config, attention.parameters_in_use.predictor, attention.certify
    queries, keys, has_gradient = new.query.shape[2], new.key.shape[2], torch.is_grad_enabled()
    learning = is_learning(attention, cache)
    sees_all = is_unfitted(attention) or (config.complete and not certify) or predictor.sees_all(queries, keys)
    is_few = attention.causal and not (has_gradient or learning or certify) and is_step(new.query, new.key)
    if is_few and (sees_all or predictor.finds_support):
        return Way.FEW_OVER_ALL_KEYS
    if learning or sees_all:
        return Way.ALL_KEYS
    may_list = predictor.learns_graph and config.tile is not None and not certify
    if may_list and attention.causal and queries == 1 and (not has_gradient or place is not None):
        return Way.LISTED_TILES
    return Way.GRAPH
