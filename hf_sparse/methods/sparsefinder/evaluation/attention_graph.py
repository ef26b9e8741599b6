"""Return what a Sparsefinder model attends to in given texts: the graph and the weights of attention layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse.core.overrides import override
from hf_sparse.evaluation.switching import evaluating, switched
from hf_sparse.methods.sparsefinder.attention import AttentionInputs, SparsefinderAttention
from hf_sparse.methods.sparsefinder.evaluation.operating_points import predicting_layers
from hf_sparse.methods.sparsefinder.observing import all_keys
from hf_sparse.model_kinds import transformers_model
from hf_sparse.ops.entmax import Certificate
from hf_sparse.ops.entmax.weights import entmax_weights
from hf_sparse.ops.tiles import Tiles


@dataclass(frozen=True)
class AttentionGraph:
    """Hold what one attention layer attends to in a batch of texts `[B, T]`, padding included.

    Attributes:
        layer: number of the attention layer.
        causal: whether queries see earlier keys only.
        weights: `[B, Hq, T, T]` float32, sparse (COO), the entmax weights that are not 0, by text, query head, query
            and key, both counted in columns of the batch. The weights of a query sum to 1.
        tiles: the graph, outside of which nothing has weight; None if each query attends to all keys. Tiles are counted
            from the first token of each text that is no padding, in tokens that are none.
        valid: `[B, T]` bool, False for padding.
    """

    layer: int
    causal: bool
    weights: Tensor
    tiles: Tiles | None
    valid: Tensor

    def pairs(self) -> Tensor:
        """Return the pairs that the graph joins, with a weight or without, `[B, Hq, T, T]` bool, sparse (COO).

        Memory is that of the pairs; for a graph of all keys that is the square of the length.
        """
        indices = []
        for number, real in enumerate(self.valid):
            column = real.nonzero()[:, 0]
            head, query, key = self._pairs_of(number, len(column))
            indices.append(torch.stack([torch.full_like(head, number), head, column[query], column[key]]))
        index = torch.cat(indices, 1)
        values = torch.ones(index.shape[1], dtype=torch.bool, device=index.device)
        return torch.sparse_coo_tensor(index, values, self.weights.shape, check_invariants=True).coalesce()

    def _pairs_of(self, number: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return heads, queries and keys of the pairs of one text of `length` tokens."""
        heads, device = self.weights.shape[1], self.valid.device
        if self.tiles is None:
            token = torch.arange(length, device=device)
            allowed = token <= token[:, None] if self.causal else torch.ones_like(token <= token[:, None])
            head, query, key = allowed.expand(heads, -1, -1).nonzero(as_tuple=True)
            return head, query, key
        lists = self.tiles.index[number].repeat_interleave(heads // self.tiles.index.shape[1], 0)  # [Hq, nq, m]
        head, row, place = (lists >= 0).nonzero(as_tuple=True)
        within = torch.arange(self.tiles.rows, device=device)
        query = row[:, None, None] * self.tiles.rows + within[:, None]
        key = (lists[head, row, place] * self.tiles.size)[:, None, None] + torch.arange(self.tiles.size, device=device)
        joined = (query < length) & (key < length)
        if self.causal:
            joined &= key <= query
        listed, inner, outer = joined.nonzero(as_tuple=True)
        return head[listed], query[listed, inner, 0], key[listed, 0, outer]


@torch.no_grad()
def attention_graphs(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    layers: Sequence[int] | None = None,
    *,
    full: bool = False,
) -> dict[int, AttentionGraph]:
    """Return what the attention layers of a Sparsefinder model attend to in a batch of texts.

    The model reads the texts in `eval` mode, without a cache, and is left as it was. Each layer gets what the layers
    before it made of their graphs, as in use. Memory is linear in the weights and in the lists of tiles.

    Args:
        model: with Sparsefinder attention, its predictors fitted.
        inputs: token ids `[B, T]`, or what a tokenizer returns, with `input_ids` and, where texts are padded,
            `attention_mask`.
        layers: numbers of attention layers; by default all that have Sparsefinder attention.
        full: let all layers attend by entmax over all keys in place of the predicted graph, which approximates it.

    Returns:
        The graph of each layer by its number.

    Raises:
        ValueError: a model without Sparsefinder attention, predictors that were not fitted, layers that have other
            attention, or inputs of another shape.
    """
    attention_layers = {layer.layer: layer for layer in predicting_layers(model)}
    numbers = sorted(attention_layers) if layers is None else list(layers)
    if unknown := [number for number in numbers if number not in attention_layers]:
        raise ValueError(
            f"expected layers with Sparsefinder attention, {', '.join(map(str, sorted(attention_layers)))}, "
            f"got {', '.join(map(str, unknown))}"
        )
    tensors = _tensors(inputs, next(model.parameters()).device)
    valid = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"])).bool()
    observed: dict[int, list[tuple[Tensor, Tiles | None]]] = {number: [] for number in numbers}

    def collect(text: AttentionInputs, graph: Tiles | Tensor | None, certificate: Certificate | None) -> None:
        if text.layer not in observed:
            return
        tiles = _as_tiles(graph if certificate is None else certificate.tiles, text)
        observed[text.layer].append((entmax_weights(text.query, text.key, tiles=tiles, **text.settings), tiles))

    in_use = list(attention_layers.values())
    backbone = transformers_model(model).base_model
    caching = {"use_cache": False} if in_use[0].causal else {}
    pattern = all_keys if full else None
    with evaluating(model), switched(in_use, True), override(in_use, observer=collect, pattern=pattern):
        backbone(**tensors, **caching)
    return {number: _joined(attention_layers[number], observed[number], valid) for number in numbers}


def _tensors(inputs: Tensor | Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of the model, on its device; `ValueError` for others than `attention_graphs` takes."""
    tensors = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"expected token ids [B, T], as a tokenizer returns with return_tensors='pt', got {got}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        mask_shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"expected an attention_mask {list(ids.shape)} like the token ids, got {mask_shape}")
    return {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}


def _as_tiles(graph: Tiles | Tensor | None, text: AttentionInputs) -> Tiles | None:
    """Return a graph as tiles; one of single tokens has tiles of one token, and that of all keys is None."""
    if graph is None or isinstance(graph, Tiles):
        return graph
    return Tiles.of_mask(graph.expand(*text.query.shape[:3], text.key.shape[2]), 1)


def _joined(
    layer: SparsefinderAttention, observed: Sequence[tuple[Tensor, Tiles | None]], valid: Tensor
) -> AttentionGraph:
    """Join the observations of one layer: one of the whole batch, or one of each text, where there is padding.

    Args:
        layer: the attention layer.
        observed: weights `[b, Hq, t, t]` and tiles of texts without their padding, in the order of the batch.
        valid: `[B, T]` bool.
    """
    (batch, length), heads = valid.shape, observed[0][0].shape[1]
    texts = valid.any(1).nonzero()[:, 0]  # a row of padding alone is not observed
    indices, values, lists = [], [], []
    first = 0
    for weights, tiles in observed:
        rows = texts[first : first + len(weights)]
        first += len(rows)
        # Several texts come together where none is padded, so that the columns of the first are those of all.
        column = valid[rows[0]].nonzero()[:, 0]
        text, head, query, key = weights.indices()
        indices.append(torch.stack([rows[text], head, column[query], column[key]]))
        values.append(weights.values())
        if tiles is not None:
            lists.append((rows, tiles))
    index, size = torch.cat(indices, 1), (batch, heads, length, length)
    joined = torch.sparse_coo_tensor(index, torch.cat(values), size, check_invariants=True).coalesce()
    return AttentionGraph(layer.layer, layer.causal, joined, _joined_tiles(lists, batch), valid)


def _joined_tiles(lists: Sequence[tuple[Tensor, Tiles]], batch: int) -> Tiles | None:
    """Join the tiles of texts, each with its rows of the batch; shorter lists, and fewer of them, end with -1."""
    if not lists:
        return None
    depth, width = (max(tiles.index.shape[axis] for _, tiles in lists) for axis in (2, 3))
    example = lists[0][1]
    index = example.index.new_full((batch, example.index.shape[1], depth, width), -1)
    for rows, tiles in lists:
        missing = (0, width - tiles.index.shape[3], 0, depth - tiles.index.shape[2])
        index[rows] = F.pad(tiles.index, missing, value=-1).expand(len(rows), -1, -1, -1)
    return Tiles(index, example.size, example.rows)
