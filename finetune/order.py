"""Choose the order in which a run reads the rows of its dataset."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch.utils.data import Sampler


class ShuffledRows(Sampler[int]):
    """Yield endless permutations of `range(n)`, a function of seed and position alone: any run can start anywhere."""

    def __init__(self, n: int, seed: int, start: int) -> None:
        self.n, self.seed, self.start = n, seed, start

    def __iter__(self) -> Iterator[int]:
        epoch, skip = divmod(self.start, self.n)
        while True:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            yield from torch.randperm(self.n, generator=generator)[skip:].tolist()
            epoch, skip = epoch + 1, 0


def first_rows(n: int, seed: int, count: int) -> set[int]:
    """Return which of the `n` rows of a dataset are among the first `count` that a run reads."""
    return set(range(n)) if count >= n else set(islice(ShuffledRows(n, seed, start=0), count))
