"""Train low-rank changes (LoRA) of the linear layers of an attention module beside what a method learns.

Hu et al. 2021 (arXiv 2106.09685): a linear layer `W x` becomes `W x + scale B A x`. Here the change lasts while the
method is switched on and its adapter in use, so the dense teacher and the base model are without it. PEFT's own LoRA
layers would take the place of the base's linear layers, hold these as children and so rename or save their weights.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """Hold the changes of the linear layers of one attention module.

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
        """Return what is added to the output of a linear layer.

        Args:
            name: of the linear layer.
            states: `[..., inputs]`, its input.

        Returns:
            `[..., outputs]`, in the dtype of the input, or under autocast in autocast's.
        """
        down, up = (getattr(self, f"{name}_{part}").to(states.dtype) for part in "AB")
        return F.linear(F.linear(states, down), up) * self.scale
