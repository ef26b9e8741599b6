"""Measure how well a predicted graph covers the gold graph of entmax: the pairs with a probability above 0.

A query row whose gold edges are all predicted has exactly the entmax output that it has with all keys. Where mass is
missed, the output is off by at most twice that mass times the largest value vector, so mass recall says more about the
error than edge recall does. Precision says only what the graph costs.

Treviso et al. 2022 (arXiv 2109.12188) and their code for sparsity, recall, precision and exact rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_sparse.ops.tiles.allowed import allowed_edges, allowed_tiles
from hf_sparse.ops.tiles.tiles import Tiles, own_tiles


def graph_metrics(
    edges: Tensor,
    probabilities: Tensor,
    *,
    causal: bool,
    position: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compare a graph with the gold one, over the allowed pairs of its query rows.

    Args:
        edges: `[B, H, R, Tk]` bool, the predicted graph; `B` and `H` may be 1, and `H` the number of KV heads.
        probabilities: `[B, Hq, R, Tk]`, entmax over all allowed keys.
        causal: as in `allowed_edges`.
        position: `[R]` int64, positions of the rows among the keys where they are a sample; the last `R` by default.

    Returns:
        Ratios of each text and head, `[B, Hq]` float64 each, NaN where there is nothing to count:

        - `sparsity`: share of the allowed pairs that are not predicted.
        - `gold_sparsity`: share of them that have probability 0.
        - `recall`: share of the gold edges that are predicted.
        - `mass_recall`: share of the probability that lies on predicted edges.
        - `exact_rows`: share of the rows all of whose gold edges are predicted.
        - `precision`: share of the predicted edges that are gold.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, heads, rows, keys = probabilities.shape
    if edges.ndim != 4 or edges.shape[2:] != (rows, keys) or heads % edges.shape[1] or edges.dtype != torch.bool:
        raise ValueError(
            f"expected edges [B, H, {rows}, {keys}] bool with H a divisor of {heads}, "
            f"got {tuple(edges.shape)} {edges.dtype}"
        )
    if position is None:
        position = torch.arange(keys - rows, keys, device=edges.device)
    if position.shape != (rows,):
        raise ValueError(f"expected positions of {rows} rows, got {tuple(position.shape)}")
    allowed = allowed_edges(position, keys, causal=causal)
    predicted = edges.repeat_interleave(heads // edges.shape[1], 1) & allowed
    gold = (probabilities > 0) & allowed
    hits = predicted & gold
    mass = probabilities.double().masked_fill(~allowed, 0.0)
    counted = gold.any(-1)
    exact = counted & (hits == gold).all(-1)

    def total(pairs: Tensor) -> Tensor:
        return pairs.expand(batch, heads, *pairs.shape[2:]).flatten(2).sum(-1, dtype=torch.float64)

    return {
        "sparsity": 1 - total(predicted) / total(allowed),
        "gold_sparsity": 1 - total(gold) / total(allowed),
        "recall": total(hits) / total(gold),
        "mass_recall": total(mass.masked_fill(~predicted, 0.0)) / total(mass),
        "exact_rows": total(exact) / total(counted),
        "precision": total(hits) / total(predicted),
    }


def tile_sparsity(tiles: Tiles, keys: int, *, causal: bool) -> Tensor:
    """Compute the share of the allowed pairs of tiles that a graph does not list, `[B, H]` float64.

    Args:
        tiles: the graph.
        keys: `Tk`.
        causal: as in `allowed_edges`.
    """
    total = -(-keys // tiles.size)
    own_tile = own_tiles(tiles.index.shape[2], keys, tiles.size, tiles.rows, device=tiles.index.device)
    allowed = allowed_tiles(own_tile, total, causal=causal)
    listed = tiles.mask(total) & allowed
    return 1 - listed.sum((2, 3)).double() / allowed.sum((2, 3)).double()


@dataclass
class MetricMeans:
    """Average the ratios of each head over texts, as the paper does: every text weighs the same.

    Attributes:
        sums, counts: sum and number of the ratios of each metric, `[H]`; a ratio that is NaN is left out.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take in ratios `[B, H]` of more texts."""
        for name, ratio in metrics.items():
            exists = ~ratio.isnan()
            self.sums[name] = self.sums.get(name, 0) + ratio.nan_to_num(0.0).sum(0)
            self.counts[name] = self.counts.get(name, 0) + exists.sum(0)

    def per_head(self) -> dict[str, Tensor]:
        """Return the means over texts, `[H]` for each metric; NaN for a head without a text to average."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}

    def mean(self) -> dict[str, float]:
        """Return the mean over heads of the means over texts, the number that reports lead with."""
        return {name: float(ratio.nanmean()) for name, ratio in self.per_head().items()}
