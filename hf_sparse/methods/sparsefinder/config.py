"""Configure Sparsefinder."""

import math
from dataclasses import dataclass

from hf_sparse._compat import extend_peft_type
from hf_sparse.core.config import SparseConfig
from hf_sparse.methods.sparsefinder.settings import PEFT_TYPE, SparsefinderSettings


@dataclass
class SparsefinderConfig(SparsefinderSettings, SparseConfig):
    """Configure Sparsefinder: alpha-entmax attention over a predicted graph of queries and keys.

    Treviso et al. 2022 (arXiv 2109.12188). Ours are the learned logit scale per head, which a softmax checkpoint needs,
    and the causal graph of tiles, which generation needs.

    >>> SparsefinderConfig(clusters=8, top_clusters=2, tile=32, sparsity=0.7).predictor
    'clustering'
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type(PEFT_TYPE)

    @property
    def causal_tiles(self) -> int:
        """Return the key tiles per query tile of a causal model, `m`.

        Of `n` tiles, `m n - m (m - 1) / 2` pairs are listed (with smaller tiles of queries, as many more, of as many
        more).

        >>> SparsefinderConfig(tile=16, sparsity=0.8, length=1024).causal_tiles  # 427 of 2,080 pairs
        7
        """
        if self.tiles_per_query is not None:
            return self.tiles_per_query
        if self.tile is None:
            raise ValueError("a graph of tokens has no tiles: SparsefinderConfig.tile is None")
        tiles = -(-self.length // self.tile)
        pairs = (1 - self.sparsity) * tiles * (tiles + 1) / 2
        return max(1, round(tiles + 0.5 - math.sqrt((tiles + 0.5) ** 2 - 2 * pairs)))

    @property
    def rows(self) -> int | None:
        """Return the queries per tile; `None` for a graph of tokens."""
        return self.tile if self.query_tile is None else self.query_tile
