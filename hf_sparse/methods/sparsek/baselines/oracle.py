"""Score keys by the attention of later queries: a reference that no cache can reach."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.methods.sparsek.baselines.baseline import Arrivals, Baseline
from hf_sparse.ops.selection.attention_mass import far_attention_mass


@dataclass(frozen=True)
class Oracle(Baseline):
    """Keep keys that will receive the most attention: the mean dense attention of the queries that are far from a key.

    What the objective `attention` teaches a scorer, computed from the queries of the whole text. Time is quadratic in
    the length. One score per key all the same, so that a selection which changes with the query could be better.

    Raises:
        ValueError: a cache is given, for what comes later is unknown then.
    """

    def __call__(self, new: Arrivals) -> Tensor:
        if new.cache is not None:
            raise ValueError(
                "the oracle selects by the attention of queries to come: it needs whole texts without a cache "
                "(use_cache=False) and cannot generate"
            )
        if new.valid is None:
            return far_attention_mass(new.query, new.key, window=new.window, scaling=new.scaling)
        scores = torch.zeros(new.key.shape[:3], dtype=torch.float32, device=new.key.device)
        for row, real in enumerate(new.valid):
            query, key = new.query[row, None, :, real], new.key[row, None, :, real]
            scores[row, :, real] = far_attention_mass(query, key, window=new.window, scaling=new.scaling)[0]
        return scores
