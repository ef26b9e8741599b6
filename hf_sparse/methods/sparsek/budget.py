"""Say how many keys are attended to."""

from functools import lru_cache
from typing import NamedTuple

#: A number of keys for all KV heads of a layer, or one for each of them.
Counts = int | tuple[int, ...]

#: By so much the mean of shares may differ from 1, for they are written with few digits.
ROUNDING = 1e-3

_UNITS = 1 << 20  # of a share; whole numbers add up the same in any order


class Budget(NamedTuple):
    """Count the KV pairs per KV head of a layer: `k` selected keys, the last `window` ones, and the first `sinks`.

    `k` is a tuple, with a number for each KV head, where the heads of the layer differ.
    """

    k: Counts
    window: int
    sinks: int

    @property
    def slots(self) -> int:
        """Count all of them, of the head that has the most."""
        return (self.k if isinstance(self.k, int) else max(self.k)) + self.window + self.sinks

    @property
    def fewest_slots(self) -> int:
        """Count all of them, of the head that has the fewest."""
        return (self.k if isinstance(self.k, int) else min(self.k)) + self.window + self.sinks

    @property
    def sizes(self) -> dict[str, int]:
        """Return what JSON files hold of a budget that is the same for all heads."""
        assert isinstance(self.k, int)
        return {"k": self.k, "window": self.window, "sinks": self.sinks, "slots": self.slots}

    def per_head(self, heads: int) -> tuple[int, ...]:
        """Return the selected keys of each of so many KV heads."""
        return (self.k,) * heads if isinstance(self.k, int) else self.k

    def of_head(self, head: int) -> "Budget":
        """Return the budget of one KV head."""
        return self if isinstance(self.k, int) else self._replace(k=self.k[head])

    def resized(self, slots: int) -> "Budget":
        """Return another number of slots with as many sinks, and the window's share of the slots.

        Raises:
            ValueError: too few for the sinks, a window and a selected key.

        >>> Budget(k=124, window=128, sinks=4).resized(512)
        Budget(k=252, window=256, sinks=4)
        """
        if slots < self.sinks + 2:
            raise ValueError(f"with {self.sinks} sinks, slots must be at least {self.sinks + 2}, got {slots}")
        window = min(max(1, round(slots * self.window / self.slots)), slots - self.sinks - 1)
        return Budget(slots - window - self.sinks, window, self.sinks)


@lru_cache(maxsize=256)
def divided(shares: tuple[tuple[float, ...], ...], k: int) -> tuple[tuple[int, ...], ...]:
    """Divide `k` keys for each KV head of a model among all of its heads.

    Args:
        shares: for each layer, the share of each of its heads.
        k: mean number of keys, so large that every head's share is at least one.

    Returns:
        The keys of each head. Of shares with a mean of 1, give or take their rounding, the sum is exactly `k` times the
        number of heads. A share of less than one key, which an adapter may have that is measured at another budget, is
        one key all the same.

    >>> divided(((1.5, 0.7), (0.3, 1.5)), 10)
    ((15, 7), (3, 15))
    """
    units = [[round(share * _UNITS) for share in row] for row in shares]
    total, equal = sum(map(sum, units)), _UNITS * sum(map(len, units))
    whole = total if abs(total - equal) <= ROUNDING * equal else equal
    keys = k * sum(map(len, units))
    counts, before, taken = [], 0, 0
    for row in units:
        of_layer = []
        for share in row:
            before += share
            end = (2 * keys * before + whole) // (2 * whole)  # rounded
            of_layer.append(max(1, end - taken))
            taken = end
        counts.append(tuple(of_layer))
    return tuple(counts)
