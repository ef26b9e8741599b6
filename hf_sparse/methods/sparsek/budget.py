"""Say how many keys are attended to."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

#: A number of keys for all KV heads of a layer, or one for each of them.
Counts = int | tuple[int, ...]

#: By so much the mean of shares may differ from 1, for they are written with few digits.
ROUNDING = 1e-3

_UNITS = 1 << 20  # of a share


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

    def pinned(self, tokens: int) -> "Budget":
        """Return a budget with so many sinks, in places of selected keys.

        Raises:
            ValueError: no selected key is left.

        >>> Budget(k=(10, 30), window=8, sinks=4).pinned(9)
        Budget(k=(5, 25), window=8, sinks=9)
        """
        more = tokens - self.sinks
        if self.fewest_slots - self.window - self.sinks <= more:
            fewest = self.fewest_slots - self.window
            raise ValueError(
                f"pin_prompt is {tokens}, and a KV head has {fewest} slots for sinks and selected keys: at least one "
                f"selected key must be left, so pin at most {fewest - 1}, or give a larger budget"
            )
        k = self.k - more if isinstance(self.k, int) else tuple(count - more for count in self.k)
        return Budget(k, self.window, tokens)

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


class HeadShares:
    """Divide `k` keys for each KV head of a model among all of its heads, by shares.

    What does not depend on `k` is added up once, so that the keys of a layer take few operations, also where a compiler
    traces them.

    Attributes:
        shares: for each layer, the share of each of its heads.

    >>> divided = HeadShares([[1.5, 0.7], [0.3, 1.5]])
    >>> divided.of_layer(0, k=10), divided.of_layer(1, k=10)
    ((15, 7), (3, 15))
    """

    def __init__(self, shares: Sequence[Sequence[float]]) -> None:
        self.shares = shares
        units = [round(share * _UNITS) for row in shares for share in row]
        self._ends = list(accumulate(units, initial=0))  # whole numbers add up the same in any order
        self._first = list(accumulate(map(len, shares), initial=0))  # head of each layer
        equal = _UNITS * len(units)
        self._whole = self._ends[-1] if abs(self._ends[-1] - equal) <= ROUNDING * equal else equal

    def of_layer(self, layer: int, k: int) -> tuple[int, ...]:
        """Return the keys of each head of a layer.

        Of shares with a mean of 1, give or take their rounding, the sum over all layers is exactly `k` times the number
        of heads. A share of less than one key, which an adapter may have that is measured at another budget, is one key
        all the same.
        """
        first, end, keys = self._first[layer], self._first[layer + 1], k * self._first[-1]
        ends = [(2 * keys * units + self._whole) // (2 * self._whole) for units in self._ends[first : end + 1]]
        return tuple([max(1, after - before) for before, after in pairwise(ends)])
