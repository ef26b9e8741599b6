"""Fit to text what predictors have besides projections: clusters or bins, the distance profile, budgets of heads."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hf_sparse.methods.sparsefinder.attention import AttentionInputs, SparsefinderAttention
from hf_sparse.methods.sparsefinder.observing import all_keys, observed
from hf_sparse.methods.sparsefinder.predictors import ProjectedPredictor
from hf_sparse.methods.sparsefinder.predictors.budgets import MEANS
from hf_sparse.methods.sparsefinder.predictors.projected import Span, always_joined
from hf_sparse.ops.entmax import support
from hf_sparse.ops.predictors.clustering import training_points
from hf_sparse.ops.predictors.profile import fit_profile, profile_mass
from hf_sparse.ops.predictors.projections import by_group
from hf_sparse.ops.tiles.allowed import allowed_edges, allowed_tiles, positions_of
from hf_sparse.ops.tiles.tiles import own_tiles, tile_counts

# Queries per text that profiles and budgets are fitted to.
_ROWS = 256

# Budgets minimise the sum over lists of the share of attention that is missed, to this power: errors of many heads add
# up as squares do, and with a power of 1 broad heads are left with next to nothing.
_POWER = 2.0

# Numbers that are held at once while tiles are divided among heads.
_HELD = 1 << 22


@torch.no_grad()
def fit_predictors(
    layers: Sequence[SparsefinderAttention],
    read: Callable[[], Any],
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Fit the predictors of the active adapter; meanwhile attention is entmax over all keys.

    All projected queries and keys are held at once: `rank` numbers per token, head and module.

    Args:
        layers: of one model, see `hf_sparse.patches.sparse_layers_in_use`; tiles are divided among the heads of all.
        read: runs the model on training text, once or several times, without a cache; it is called twice.
        generator: for the seeds of k-means.

    Raises:
        ValueError: more clusters or bins than projected queries and keys, or no text.
    """
    layers = [layer for layer in layers if layer.parameters_in_use.predictor.learns_graph]
    points: dict[int, list[Tensor]] = {}
    profiles = _Profiles()

    def collect(layer: SparsefinderAttention, text: AttentionInputs) -> None:
        profiles.add(layer, text)
        learned = layer.parameters_in_use
        keys = learned.project_keys(text.key)
        if _projected(layer).fits_keys_only:
            fitted_points = keys.transpose(0, 1).flatten(1, 2)
        else:
            fitted_points = training_points(learned.project_queries(text.query), keys)
        points.setdefault(id(layer), []).append(fitted_points)

    with _watched(layers, collect):
        read()
    for layer in layers:
        if id(layer) not in points:
            raise ValueError("expected `read` to run the model on text to fit the predictors to, got no text")
        learned = layer.parameters_in_use
        learned.predictor.fit(learned, torch.cat(points[id(layer)], 1), generator)
        profiles.fit(layer)
    layers = [layer for layer in layers if hasattr(layer.parameters_in_use, "budgets")]
    if layers:
        for layer, table in zip(layers, fit_budgets(layers, read, _predicted), strict=True):
            layer.parameters_in_use.budgets.copy_(table)


@torch.no_grad()
def fit_profiles(layers: Sequence[SparsefinderAttention], read: Callable[[], Any]) -> None:
    """Fit the distance profiles of the active adapter alone; arguments and errors as of `fit_predictors`."""
    profiles = _Profiles()
    with _watched(layers, profiles.add):
        read()
    for layer in layers:
        profiles.fit(layer)


class _Profiles:
    """Sum attention by distance, for each layer that has a profile."""

    def __init__(self) -> None:
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, layer: SparsefinderAttention, text: AttentionInputs) -> None:
        """Add the attention of a sample of the queries of a text."""
        length, size = text.key.shape[2], layer.config.tile
        if size is None or not hasattr(layer.parameters_in_use, "profile"):
            return
        rows = torch.linspace(0, length - 1, min(length, _ROWS), device=text.key.device).round().long()
        _, probabilities = support(text.query, text.key, rows=rows, **text.settings)
        allowed = allowed_edges(positions_of(length, length, rows), length, causal=text.causal)
        gained = profile_mass(probabilities, rows, size)
        pairs = profile_mass(allowed.expand_as(probabilities), rows, size)
        mass, count = self.sums.get(id(layer), (0, 0))
        self.sums[id(layer)] = (mass + gained, count + pairs)

    def fit(self, layer: SparsefinderAttention) -> None:
        """Set the profile of a layer that has one to the mean of what was added."""
        if hasattr(layer.parameters_in_use, "profile"):
            layer.parameters_in_use.profile.copy_(fit_profile(*self.sums[id(layer)]))


@torch.no_grad()
def fit_budgets(
    layers: Sequence[SparsefinderAttention],
    read: Callable[[], Any],
    rank: Callable[[SparsefinderAttention, AttentionInputs], Tensor],
) -> list[Tensor]:
    """Divide tiles among the heads of all layers by the attention that they miss without more of them, on text.

    Args:
        layers, read: see `fit_predictors`; graphs of tiles, and texts of equal lengths.
        rank: scores of the tiles of a text, `[B, H, nq, nk]`; the best are listed first, as `best_tiles` does it. `H`
            is `Hq`, or `Hkv` with `per_group`.

    Returns:
        For each layer `[H, MEANS]`, see `divided`.
    """
    gains: dict[int, Tensor] = {}
    costs: list[Tensor] = []

    def collect(layer: SparsefinderAttention, text: AttentionInputs) -> None:
        length, size, of_queries = text.key.shape[2], layer.config.tile, layer.config.rows
        assert size is not None and of_queries is not None
        listed, tiles = tile_counts(length, length, size, of_queries)
        sampled = min(listed, max(1, _ROWS // of_queries))
        chosen = torch.linspace(0, listed - 1, sampled, device=text.key.device).round().long()
        rows = (chosen[:, None] * of_queries + torch.arange(of_queries, device=chosen.device)).flatten()
        rows = rows[rows < length]
        _, probabilities = support(text.query, text.key, rows=rows, **text.settings)
        mass = _tile_mass(probabilities, torch.searchsorted(chosen, rows // of_queries), sampled, size)
        scores = rank(layer, text)
        mass = by_group(mass, scores.shape[1]).sum(2)
        own_tile = own_tiles(listed, length, size, of_queries, device=chosen.device)
        reached = allowed_tiles(own_tile, tiles, causal=text.causal)
        always = always_joined(layer.config, Span(length, length, text.causal), chosen.device).mask(tiles)
        first = always.byte() + 2 * (torch.arange(tiles, device=chosen.device) == own_tile[:, None]).byte()
        # As `best_tiles` ranks them: the diagonal, then the window and global tokens, then the others by score.
        level = first.float().masked_fill(~reached, -1).expand_as(scores)[:, :, chosen]
        order = scores[:, :, chosen].argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, level.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
        gained = mass.gather(-1, order).sum((0, 2)).double().cumsum(-1)
        gains[id(layer)] = gains[id(layer)] + gained if id(layer) in gains else gained
        if not costs:  # texts are equally long
            reach = reached[0, 0, chosen].sum(-1, keepdim=True)
            number = torch.arange(1, tiles + 1, device=chosen.device)
            costs.append(torch.minimum(reach, number).sum(0).double())

    with _watched(layers, collect):
        read()
    device = costs[0].device
    gain = torch.cat([gains[id(layer)].to(device) for layer in layers])
    missed = 1 - gain / gain[:, -1:]
    table = divided(1 - missed.clamp(min=0) ** _POWER, costs[0])
    return list(table.split([len(gains[id(layer)]) for layer in layers]))


def _predicted(layer: SparsefinderAttention, text: AttentionInputs) -> Tensor:
    learned, predictor, length = layer.parameters_in_use, _projected(layer), text.key.shape[2]
    codes = predictor.query_codes(learned, text.query), predictor.key_codes(learned, text.key)
    return predictor.tile_scores(learned, *codes, Span(length, length, text.causal))


def _projected(layer: SparsefinderAttention) -> ProjectedPredictor:
    predictor = layer.parameters_in_use.predictor
    assert isinstance(predictor, ProjectedPredictor)
    return predictor


def divided(gain: Tensor, cost: Tensor) -> Tensor:
    """Divide tiles among lists so that the total gain is the greatest, for each mean number of tiles. Ours.

    Args:
        gain: `[L, n]`, of the best 1 to `n` tiles of each list.
        cost: `[n]`, pairs of tiles that 1 to `n` tiles per query tile are; early causal tiles have fewer.

    Returns:
        `[L, MEANS]`, numbers from 1; column `m - 1` costs on average no more than `m` tiles for each list do. From
        column `n - 1` on, where every list has all its tiles, all get the same.
    """
    device, gain, cost = gain.device, gain.cpu(), cost.cpu()  # small, and one number after the other
    sizes = torch.arange(1, MEANS + 1, dtype=gain.dtype)
    table = sizes.expand(len(gain), -1).clone()
    limits = cost[: min(MEANS, gain.shape[1] - 1)] * len(gain)
    # Bounds of a price per pair, for each mean: the higher the price, the fewer tiles.
    low, high = torch.zeros_like(limits), torch.full_like(limits, float(gain.max()) + 1.0)
    for _ in range(60):
        price = (low + high) / 2
        over = cost[_best(gain, cost, price)].sum(-1) > limits
        low, high = torch.where(over, price, low), torch.where(over, high, price)
    for column, affordable in enumerate(_best(gain, cost, high)):
        count = _filled(gain, cost, affordable, float(limits[column]))
        equal = torch.full_like(count, column)
        table[:, column] = 1.0 + max(count, equal, key=lambda counts: float(_at(gain, counts).sum()))
    return table.to(device)


def _best(gain: Tensor, cost: Tensor, price: Tensor) -> Tensor:
    """Return the column `[p, L]` that each list would buy at each price `[p]`."""
    prices = price.split(max(1, _HELD // gain.numel()))
    return torch.cat([(gain - part[:, None, None] * cost).argmax(-1) for part in prices])


def _filled(gain: Tensor, cost: Tensor, count: Tensor, limit: float) -> Tensor:
    """Spend what a price leaves over on single tiles, the best gain per cost first.

    Where several more tiles of a list only pay together, a price buys all of them or none."""
    count, spent = count.clone(), float(cost[count].sum())
    step_gain = torch.nn.functional.pad(gain.diff(dim=-1), (0, 1))
    step_cost = torch.nn.functional.pad(cost.diff(), (0, 1), value=torch.inf)
    while True:
        more = step_cost[count]
        worth = (_at(step_gain, count) / more).masked_fill(spent + more > limit, 0.0)
        best = int(worth.argmax())
        if worth[best] <= 0:
            return count
        spent += float(more[best])
        count[best] += 1


def _at(table: Tensor, column: Tensor) -> Tensor:
    return table.gather(-1, column[:, None])[:, 0]


def _tile_mass(probabilities: Tensor, place: Tensor, count: int, size: int) -> Tensor:
    """Sum the attention of the queries of some tiles to the keys of each tile, `[B, Hq, count, nk]`.

    Args:
        probabilities: `[B, Hq, R, Tk]`.
        place: `[R]` int64, which of `count` query tiles each row is in.
        count, size: tiles of queries, and keys per tile.
    """
    by_key = torch.nn.functional.pad(probabilities, (0, -probabilities.shape[3] % size)).unflatten(3, (-1, size)).sum(4)
    mass = by_key.new_zeros((*by_key.shape[:2], count, by_key.shape[3]))
    return mass.index_add_(2, place, by_key)


def _watched(
    layers: Sequence[SparsefinderAttention], watch: Callable[[SparsefinderAttention, AttentionInputs], None]
) -> AbstractContextManager[None]:
    """Attend by entmax over all keys within a `with` block, and show `watch` every text."""
    return observed(layers, lambda layer: lambda text, *_: watch(layer, text), pattern=all_keys)
