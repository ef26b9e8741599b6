"""Walk over jobs of similar length, a bounded number of logits at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse.ops.entmax.layout import Layout
from hf_sparse.ops.tiles.tiles import Tiles

# Logits held at once. Small buffers stay in the caches of a CPU; a GPU wants few launches.
BUFFER = {"cpu": 1 << 19, "cuda": 1 << 26}

# Queries of a job below which copying its keys takes more than their logits do.
_FEW = 32

# The shortest list of a block is at least this share of the longest: padding costs time and gives no result.
_SIMILAR = 0.75

# Padded logits of a block that cost less than the launches of one more block would.
_SPARE = {"cuda": 1 << 24}


@dataclass(frozen=True)
class JobBlock:
    """Hold `n` jobs with the `S = c * size` keys that they list."""

    jobs: Tensor  # [n] int64
    tiles: Tensor  # [n, c] int64, index into [B * Hkv * nk] tiles of keys
    seen: Tensor  # [n, share or 1, rows, S] bool


@dataclass(frozen=True)
class Plan:
    """Hold which keys each query attends to: in all tiles or listed ones, before padding and, if causal, the future."""

    layout: Layout
    causal: bool
    valid: Tensor | None = None  # [B, Tk] bool
    tiles: Tiles | None = None  # all of them by default
    edges: Tensor | None = None  # [B, Hq, Tq, Tk] bool, only with all tiles

    def _lists(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Count the tiles of each job, `[jobs]`, and return their lists, `[jobs, m]`, or None for all in order."""
        layout = self.layout
        if self.tiles is not None:
            index = self.tiles.index.flatten(0, 2)
            return (index >= 0).sum(-1), index
        if not self.causal:
            return torch.full((layout.jobs,), layout.key_tiles, device=device), None
        last = layout.positions(torch.arange(layout.jobs, device=device))[:, -1].clamp(max=layout.keys - 1)
        return last // layout.size + 1, None

    def blocks(self, device: torch.device) -> Iterator[JobBlock]:
        """Yield all jobs whose list is not empty, those with the longest lists first."""
        layout = self.layout
        if not layout.jobs:
            return
        valid = None if self.valid is None else F.pad(self.valid, (0, layout.key_tiles * layout.size - layout.keys))
        counts, index = self._lists(device)
        order = counts.argsort(descending=True)
        lengths = counts[order].cpu()
        # Numbers that a tile of a job takes: its logits, or the copy of its keys.
        held = layout.size * max(_FEW, layout.share * layout.rows)
        low, end = 0, int((lengths > 0).sum())
        while low < end:
            width = int(lengths[low])
            at_once = max(1, BUFFER.get(device.type, 1 << 24) // (width * held))
            others = lengths[low + 1 : min(end, low + at_once)]
            padded = (width - others).cumsum(0) * held
            stop = (padded > _SPARE.get(device.type, 0)) & (others < _SIMILAR * width)
            high = low + 1 + (int(stop.byte().argmax()) if bool(stop.any()) else len(others))
            jobs = order[low:high]
            first = torch.arange(width, device=device).expand(len(jobs), -1)
            yield self._block(jobs, first if index is None else index[jobs, :width], valid)
            low = high

    def _block(self, jobs: Tensor, listed: Tensor, valid: Tensor | None) -> JobBlock:
        layout = self.layout
        tile = listed.clamp(min=0)
        position = layout.positions(jobs)  # [n, rows]
        key = (tile[..., None] * layout.size + torch.arange(layout.size, device=jobs.device)).flatten(1)  # [n, S]
        key_exists = (key < layout.keys) & (listed >= 0).repeat_interleave(layout.size, dim=-1)
        number = position - layout.first_of(jobs)  # index of the query
        query_exists = (number >= 0) & (position < layout.keys)
        if valid is not None:
            batch = layout.batch_of(jobs)[:, None]
            key_exists &= valid[batch, key]
            query_exists &= valid[batch, position.clamp(max=layout.keys - 1)]
        seen = query_exists[..., None] & key_exists[:, None]
        if self.causal:
            seen &= key[:, None] <= position[..., None]
        seen = seen[:, None]
        if self.edges is not None:  # all tiles in order, so the first keys
            edges = self.edges[
                layout.batch_of(jobs)[:, None, None],
                (layout.list_of(jobs)[:, None] * layout.share + torch.arange(layout.share, device=jobs.device))[
                    ..., None
                ],
                number.clamp(0, layout.queries - 1)[:, None],
                : key.shape[1],
            ]
            seen = seen & F.pad(edges, (0, key.shape[1] - edges.shape[-1]))
        return JobBlock(jobs, layout.kv_of(jobs)[:, None] * layout.key_tiles + tile, seen)
