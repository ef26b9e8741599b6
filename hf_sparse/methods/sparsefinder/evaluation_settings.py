"""Define the options of measuring that only Sparsefinder has. Nothing here imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_sparse.core.checks import is_finite, shown
from hf_sparse.core.settings import check_integer


@dataclass(frozen=True)
class SparsefinderEvaluationSettings:
    """Hold the options of measuring a Sparsefinder model.

    Raises:
        ValueError: an option out of range.
    """

    sparsities: Sequence[float] = field(
        default=(0.5, 0.7, 0.8, 0.9),
        metadata={
            "help": "Measure at these shares of the pairs of tiles left out; 0.5,0.7,0.8,0.9 by default.",
            "option": "--sparsity",
            "metavar": "S,S,...",
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of random patterns and of the rows that are compared; 0 by default."}
    )
    rows: int = field(
        default=256,
        metadata={"help": "Queries of each chunk whose rows are compared with the gold graph.", "cli": False},
    )

    def __post_init__(self) -> None:
        shares = self.sparsities
        if not isinstance(shares, Sequence) or not all(is_finite(share) and 0 <= share < 1 for share in shares):
            raise ValueError(f"sparsities must be a list of numbers, at least 0 and below 1, got {shown(shares)}")
        check_integer("rows", self.rows, least=1)
