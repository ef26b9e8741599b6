"""Evaluate SparseK one score at a time: the two-heap algorithm.

Scores are frozen on arrival, so the threshold only rises and a score that it has passed can be forgotten. The state
is the support of the gates, not the sequence: amortised O(log support) per token, at most two moves per score.

Lou et al. 2024 (arXiv 2406.16747) state that the operator can be evaluated incrementally; the algorithm is ours.
"""

import heapq
import math


class SparseKStream:
    """Track the thresholds of SparseK and of the hard top-k after every pushed score.

    Equal to `sparsek_thresholds` and `topk_thresholds` on the same scores. Scores are Python floats (float64).

    Args:
        k: sum of the gates and number of selected scores, at least 1.

    Attributes:
        count: number of scores that were pushed.
        tau: threshold of SparseK, `-inf` until more than `k` scores came. A score `z` has the gate
            `min(max(z - tau, 0), 1)`.
        kappa: the k-th best score, `-inf` until `k` scores came.

    >>> stream = SparseKStream(k=1)
    >>> [stream.push(z) for z in (0.0, 0.5, 3.0)]
    [-inf, -0.25, 2.0]
    """

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.count = 0
        self.tau = -math.inf
        self._saturated: list[float] = []  # gate 1
        self._free: list[float] = []  # gate strictly between 0 and 1
        self._free_sum = 0.0
        self._best: list[float] = []  # the k best

    @property
    def kappa(self) -> float:
        return self._best[0] if len(self._best) == self.k else -math.inf

    @property
    def support(self) -> int:
        """Count the scores with a gate above 0."""
        return len(self._saturated) + len(self._free)

    def gate(self, score: float) -> float:
        """Return the present gate of a score that was pushed earlier."""
        return min(max(score - self.tau, 0.0), 1.0)

    def push(self, score: float) -> float:
        """Take the next score and return the new threshold `tau`. NaN is refused with a ValueError."""
        if math.isnan(score):
            raise ValueError("expected a score that is a number, got NaN")
        if score == -math.inf:
            return self.tau
        self.count += 1
        if len(self._best) < self.k:
            heapq.heappush(self._best, score)
        elif score > self._best[0]:
            heapq.heapreplace(self._best, score)
        if self.count <= self.k:
            heapq.heappush(self._saturated, score)
            return self.tau
        if self.tau == -math.inf or score >= self.tau + 1:
            heapq.heappush(self._saturated, score)
        elif score > self.tau:
            heapq.heappush(self._free, score)
            self._free_sum += score
        else:
            return self.tau
        return self._raise()

    def _raise(self) -> float:
        saturated, free = self._saturated, self._free
        while True:
            to_free = saturated[0] - 1 if saturated else math.inf  # tau at which the weakest leaves gate 1
            to_gone = free[0] if free else math.inf  # tau at which the weakest leaves the support
            # With k saturated scores the free ones have gate 0 and leave: of all thresholds that give the same gates
            # this finds the largest, as `sparsek_thresholds` does.
            if free and len(saturated) < self.k:
                tau = (self._free_sum + len(saturated) - self.k) / len(free)
                if tau <= to_free and tau < to_gone:
                    self.tau = max(tau, self.tau)  # guards against rounding only
                    return self.tau
            if to_free <= to_gone:
                score = heapq.heappop(saturated)
                heapq.heappush(free, score)
                self._free_sum += score
            else:
                self._free_sum -= heapq.heappop(free)
