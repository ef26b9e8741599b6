"""Define the options of measuring that only SparseK has. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_sparse.core.checks import shown


@dataclass(frozen=True)
class SparseKEvaluationSettings:
    """Hold the options of measuring a SparseK model.

    Raises:
        ValueError: `slots` are no list of integers.
    """

    slots: Sequence[int] = field(
        default=(), metadata={"help": "Measure the text at these budgets too.", "metavar": "N,N,..."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.slots, Sequence) or not all(isinstance(slots, int) for slots in self.slots):
            raise ValueError(f"slots must be a list of integers, such as [128, 256], got {shown(self.slots)}")
