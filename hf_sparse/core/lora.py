"""LoRA beside what a method learns: low-rank changes of the linear layers of an attention module.

Hu et al. 2021 (arXiv 2106.09685): a linear layer `W x` becomes `W x + scale B A x`. Here the change lasts while the
method is switched on and its adapter in use, so the dense teacher and the base model are without it. PEFT's own LoRA
layers would take the place of the base's linear layers, hold these as children and so rename or save their weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from hf_sparse.core.checks import (
    MOST_WIDTH,
    check_peft_fields,
    expected_integer,
    expected_number,
    is_finite,
    is_integer,
    shown,
)


@dataclass
class LoraSettings(PeftConfig):
    """The settings of LoRA in the configuration of every method."""

    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of a learned change of the linear layers (queries, keys, values, output) of every patched "
            "attention module; 0 is none."
        },
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The change is multiplied by lora_alpha / lora_rank. None is twice the rank."}
    )
    saves_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Filled in when saved: the file also holds the embeddings of the base model, which are not those "
            "of its checkpoint."
        },
    )

    def __post_init__(self) -> None:
        check_peft_fields(self)
        super().__post_init__()
        rank, alpha = self.lora_rank, self.lora_alpha
        if not is_integer(rank, 0, MOST_WIDTH):
            raise ValueError(self._expected("lora_rank", expected_integer(rank, 0, MOST_WIDTH)))
        if alpha is not None and not (is_finite(alpha) and alpha > 0):
            raise ValueError(self._expected("lora_alpha", expected_number(alpha, "None or a number above 0")))

    def _expected(self, name: str, what: str) -> str:
        return f"{type(self).__name__}.{name} must be {what}, got {shown(getattr(self, name))}"

    @property
    def lora_scale(self) -> float:
        """What multiplies the change, with a rank above 0."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank


class LowRank(nn.Module):
    """The changes of the linear layers of one attention module.

    Parameters lie directly on the module, not on submodules: PEFT strips the adapter's name from the next-to-last part
    of a key only.

    Attributes:
        NAME_A: `[rank, inputs]` of the linear layer NAME, drawn as PEFT draws it.
        NAME_B: `[outputs, rank]`, 0 at first: a new adapter changes nothing.
    """

    def __init__(self, linears: Mapping[str, tuple[int, int]], rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        for name, (inputs, outputs) in linears.items():
            down = nn.Parameter(torch.empty(rank, inputs))
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.register_parameter(f"{name}_A", down)
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(outputs, rank)))

    def forward(self, name: str, states: Tensor) -> Tensor:
        """What is added to the output of a linear layer.

        Args:
            name: of the linear layer.
            states: `[..., inputs]`, its input.

        Returns:
            `[..., outputs]`, in the dtype of the input, or under autocast in autocast's.
        """
        down, up = (getattr(self, f"{name}_{part}").to(states.dtype) for part in "AB")
        return F.linear(F.linear(states, down), up) * self.scale
