"""Measure how attention falls off with distance, per head, which the scores of content do not show.

Numbers of matching pairs alone can rank tiles worse than "the nearest first" does, because most heads of a language
model attend near by. Multiplied by the profile of the head they no longer have to find that out. Ours.

Distances between tiles are binned: 0 to 3 each by itself, then four bins per doubling, so that few numbers describe
texts of any length and far bins have something to count.
"""

import torch
from torch import Tensor

BINS = 40  # the last one holds every distance from 1792 tiles on
_EXACT = 4


def distance_bins(distance: Tensor) -> Tensor:
    """Find the bins, 0 to `BINS - 1`, of distances between tiles (int64, any shape; the sign does not matter).

    >>> distance_bins(torch.tensor([0, 1, 3, 4, 5, 7, 8, 9, 10, 16, -16])).tolist()
    [0, 1, 3, 4, 5, 7, 8, 8, 9, 12, 12]
    """
    distance = distance.abs()
    # Whole numbers only: a logarithm rounds differently on different machines.
    octave = torch.zeros_like(distance)
    for power in range(1, BINS // _EXACT):
        octave += distance >= _EXACT << power
    octave_start = _EXACT << octave
    part = (distance - octave_start) >> octave
    return torch.where(distance < _EXACT, distance, _EXACT + _EXACT * octave + part).clamp(max=BINS - 1)


def profile_mass(probabilities: Tensor, position: Tensor, size: int) -> Tensor:
    """Sum the attention that queries give to keys at each distance, `[H, BINS]` float32.

    Called with the allowed pairs (as 0 and 1) in place of the probabilities it counts pairs; `fit_profile` takes both,
    each summed over the training texts.

    Args:
        probabilities: `[B, H, R, Tk]`, of a sample of query rows.
        position: `[R]` int64, of the rows among the keys.
        size: positions per tile.
    """
    tile = torch.arange(probabilities.shape[3], device=position.device) // size
    bins = distance_bins(tile - position[:, None] // size).flatten()
    by_pair = probabilities.float().sum(0).flatten(1)
    return by_pair.new_zeros((len(by_pair), BINS)).index_add_(1, bins, by_pair)


def fit_profile(mass: Tensor, pairs: Tensor) -> Tensor:
    """Average the attention of a pair at each distance, `[H, BINS]`, as a share of the mean at all distances.

    Args:
        mass, pairs: `[H, BINS]`, see `profile_mass`; a bin without pairs takes the value of the one before.

    Raises:
        ValueError: no pairs in the first bin, which every text has.
    """
    if mass.shape != pairs.shape or mass.ndim != 2 or not (pairs[:, 0] > 0).all():
        raise ValueError(
            f"expected mass and pairs [H, {BINS}] with pairs at distance 0, got {tuple(mass.shape)} and "
            f"{tuple(pairs.shape)}: sum profile_mass over training text first"
        )
    has_pairs = pairs > 0
    last = torch.where(has_pairs, torch.arange(pairs.shape[1], device=pairs.device), 0).cummax(-1).values
    mean = (mass / pairs.clamp(min=1)).gather(-1, last)
    overall = mass.sum(-1, keepdim=True) / pairs.sum(-1, keepdim=True)
    return mean / overall.clamp(min=torch.finfo(mean.dtype).tiny)
