"""Define the options of measuring that only SparseK has. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SparseKEvaluationSettings:
    """Hold the options of measuring a SparseK model."""

    slots: Sequence[int] = field(
        default=(), metadata={"help": "Measure the text at these budgets too.", "metavar": "N,N,..."}
    )
