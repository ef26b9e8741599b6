"""How tiles are divided among heads."""

from itertools import product

import pytest
import torch

from hf_sparse.methods.sparsefinder.fit import divided
from hf_sparse.methods.sparsefinder.parameters import MEANS


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("concave", [False, True])
def test_tiles_are_divided_by_what_they_gain(concave, causal):
    """Of all ways to divide them: never worse than equal numbers, never dearer, and the best where gains shrink."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand((3, 5), generator=generator, dtype=torch.float64)
    if concave:
        steps = steps.sort(dim=-1, descending=True).values
    gain = steps.cumsum(-1)
    cost = torch.arange(1.0, 6, dtype=torch.float64)
    if causal:  # pairs of tiles of five rows, of which the first reach fewer
        cost = torch.tensor([sum(min(row, m) for row in range(1, 6)) for m in range(1, 6)], dtype=torch.float64)
    table = divided(gain, cost)
    assert table.shape == (3, MEANS) and (table[:, 4:] == torch.arange(5.0, MEANS + 1)).all()
    for mean in range(1, 5):

        def worth(some):
            return sum(float(gain[head, count]) for head, count in enumerate(some))

        fits = [some for some in product(range(5), repeat=3) if cost[list(some)].sum() <= 3 * cost[mean - 1] + 1e-9]
        found = (table[:, mean - 1] - 1).long().tolist()
        assert tuple(found) in fits and worth(found) >= worth([mean - 1] * 3) - 1e-9
        if concave and not causal:
            assert worth(found) == pytest.approx(max(map(worth, fits)))
