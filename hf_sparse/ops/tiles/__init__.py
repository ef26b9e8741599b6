"""Hold and select lists of key tiles for tiles of queries."""

from hf_sparse.ops.tiles.tiles import Tiles as Tiles
from hf_sparse.ops.tiles.tiles import window_and_global as window_and_global
