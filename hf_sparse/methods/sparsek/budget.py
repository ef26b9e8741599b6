"""Say how many keys are attended to."""

from typing import NamedTuple


class Budget(NamedTuple):
    """Count the KV pairs per KV head of a layer: `k` selected keys, the last `window` ones, and the first `sinks`."""

    k: int
    window: int
    sinks: int

    @property
    def slots(self) -> int:
        """Count all of them."""
        return self.k + self.window + self.sinks

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
