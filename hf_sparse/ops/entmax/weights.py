"""List the weights of entmax attention that are not 0: what an attention matrix holds, without the zeros."""

import torch
from torch import Tensor

from hf_sparse.ops.entmax.inputs import prepare
from hf_sparse.ops.entmax.threshold import distribution
from hf_sparse.ops.tiles.allowed import allowed_edges
from hf_sparse.ops.tiles.tiles import Tiles, tile_counts

_LOGITS = 1 << 22  # held at once, unless a single query has more


@torch.no_grad()
def entmax_weights(
    query: Tensor,
    key: Tensor,
    *,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    tiles: Tiles | None = None,
) -> Tensor:
    """List the weights above 0 of entmax over all allowed keys, or over those in listed tiles.

    Work is that of all pairs of a query and a key; memory is that of the weights, and of the logits of some queries.

    Args:
        query, key, alpha, scaling, causal, tiles: as in `entmax_attention`.

    Returns:
        A coalesced sparse tensor `[B, Hq, Tq, Tk]` in COO layout, float32 (float64 for float64).

    Raises:
        ValueError: as `entmax_attention`, or a graph of another number of query tiles.
    """
    inputs = prepare(query, key, alpha, scaling, causal)
    batch, heads, queries, _ = query.shape
    keys, offset = key.shape[2], key.shape[2] - queries
    if tiles is not None and tiles.index.shape[2] != tile_counts(queries, keys, tiles.size, tiles.rows)[0]:
        raise ValueError(
            f"{queries} queries of {keys} keys are {tile_counts(queries, keys, tiles.size, tiles.rows)[0]} tiles of "
            f"{tiles.rows}, got a graph of {tiles.index.shape[2]} query tiles"
        )
    exponent = inputs.exponent
    if isinstance(exponent, Tensor):
        exponent = exponent[:, None, None]
    rows = max(1, _LOGITS // max(1, batch * heads * keys))
    indices, values = [], []
    for begin in range(0, queries, rows):
        position = torch.arange(begin, min(begin + rows, queries), device=query.device) + offset
        seen = allowed_edges(position, keys, causal=causal)
        if tiles is not None:
            seen = seen & _in_tiles(tiles, position, offset, keys).repeat_interleave(heads // tiles.index.shape[1], 1)
        grouped = inputs.query[:, :, begin : begin + rows].unflatten(1, (key.shape[1], -1))
        with torch.autocast(query.device.type, enabled=False):
            z = (grouped @ inputs.key[:, :, None].transpose(-1, -2)).flatten(1, 2)
        weight = distribution(z.masked_fill_(~seen, -torch.inf), exponent)
        places = weight.nonzero(as_tuple=True)
        values.append(weight[places])
        indices.append(torch.stack([*places[:2], places[2] + begin, places[3]]))
    index = torch.cat(indices, 1) if indices else torch.empty(4, 0, dtype=torch.int64, device=query.device)
    value = torch.cat(values) if values else inputs.query.new_empty(0)
    size = (batch, heads, queries, keys)
    return torch.sparse_coo_tensor(index, value, size, check_invariants=True).coalesce()


def _in_tiles(tiles: Tiles, position: Tensor, offset: int, keys: int) -> Tensor:
    """Mark the keys in the listed tiles of consecutive queries, `[B, H, R, Tk]` bool, without those of other queries.

    Args:
        tiles: of all queries.
        position: `[R]` int64, of the queries among the keys.
        offset: position of the first of all queries.
        keys: `Tk`.
    """
    number = position // tiles.rows
    first = int(number[0]) - offset // tiles.rows
    lists = tiles.index[:, :, first : first + int(number[-1] - number[0]) + 1]
    listed = Tiles(lists, tiles.size, tiles.rows).mask(-(-keys // tiles.size))
    column = torch.arange(keys, device=position.device) // tiles.size
    return listed[:, :, number - number[0]][..., column]
