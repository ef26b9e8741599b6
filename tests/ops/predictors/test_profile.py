"""Distance profiles against loops."""

import math

import pytest
import torch

from hf_sparse.ops.predictors.profile import BINS, distance_bins, fit_profile, profile_mass


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def loop_bin(distance: int) -> int:
    if distance < 4:
        return distance
    octave = int(math.log2(distance / 4))
    return min(BINS - 1, 4 + 4 * octave + (distance - 4 * 2**octave) // 2**octave)


def test_bins():
    distance = torch.arange(10_000)
    found = distance_bins(distance)
    assert found.tolist() == [loop_bin(d) for d in range(10_000)]
    assert torch.equal(found, distance_bins(-distance))
    assert found.max() == BINS - 1 and (found.diff() >= 0).all() and (found.diff() <= 1).all()


def test_profile_is_the_mean_of_a_pair_at_a_distance():
    size, keys, position = 2, 23, torch.tensor([22, 4, 13])
    allowed = (torch.arange(keys) <= position[:, None]).expand(2, 3, 3, keys).float()
    mass = torch.rand(2, 3, 3, keys) * allowed
    found = fit_profile(profile_mass(mass, position, size), profile_mass(allowed, position, size))
    for h in range(3):
        overall = mass[:, h].sum() / allowed[:, h].sum()
        pairs: dict[int, list[torch.Tensor]] = {}
        for row, i in enumerate(position.tolist()):
            for j in range(i + 1):
                pairs.setdefault(loop_bin(i // size - j // size), []).append(mass[:, h, row, j].mean())
        for b in range(BINS):
            expected = torch.stack(pairs[max(c for c in pairs if c <= b)]).mean() / overall
            torch.testing.assert_close(found[h, b], expected)


def test_bad_input():
    with pytest.raises(ValueError, match="with pairs at distance 0"):
        fit_profile(torch.zeros(4, BINS), torch.zeros(4, BINS))
