"""Measure how long prompts take that run, before one of their length is recorded."""

from dataclasses import dataclass, field

import torch

_TIMED = 2  # prompts of a bucket after its first one, if each has a length of its own: either may compile kernels


class Timing:
    """Measure how long a GPU takes for a prompt, waiting for the host included, without waiting for it."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()

    def stop(self) -> None:
        """Note the end."""
        self._end.record()

    def ms(self) -> float | None:
        """Return the milliseconds up to the end; `None` if the GPU has not come there."""
        return self._begin.elapsed_time(self._end) if self._end.query() else None


@dataclass
class Trial:
    """Note the prompts of a bucket that ran: lengths, and lengths and times of those after the first.

    Attributes:
        is_over: whether one is timed that compiled nothing.
    """

    lengths: set[int] = field(default_factory=set)
    timings: list[tuple[int, Timing]] = field(default_factory=list)
    is_over: bool = False

    def note(self, tokens: int, timing: Timing | None) -> None:
        """Note a prompt that ran, of so many tokens."""
        if timing is not None:
            timing.stop()
            self.timings.append((tokens, timing))
            self.is_over = tokens in self.lengths or len(self.timings) >= _TIMED
        self.lengths.add(tokens)

    def ms_per_token(self) -> float | None:
        """Return the milliseconds for a token of the fastest prompt; `None` before all that is known."""
        times = [ms / tokens for tokens, timing in self.timings if (ms := timing.ms()) is not None]
        return min(times) if self.is_over and len(times) == len(self.timings) else None
