"""Define the method and register it: its configuration, what it learns, its attention, training and measuring."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse._compat import extend_peft_type
from hf_sparse.adapters.method_report import MethodReport
from hf_sparse.core.config import SparseConfig
from hf_sparse.core.layer import AttentionShape, SparseAttentionLayer
from hf_sparse.core.registry import Method
from hf_sparse.evaluation import Evaluation
from hf_sparse.finetune.stages import Stage, Training
from hf_sparse.tuner import SparseModel, register_method

from .settings import SETTINGS, WindowSettings, WindowTrainingSettings

SOFTNESS = 2.0  # tokens over which the edge of a window is blurred in training, so that its width has a gradient


@dataclass
class WindowConfig(WindowSettings, SparseConfig):
    """Configure an adapter: its settings, and what PEFT needs to know."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type(SETTINGS.peft_type)


class Widths(nn.Module):
    """Hold what is learned: the logarithm of the width of the window of each query head, `[Hq]`."""

    def __init__(self, heads: int, first_width: int) -> None:
        super().__init__()
        self.log_width = nn.Parameter(torch.full((heads,), math.log(first_width)))


class WindowAttention(SparseAttentionLayer[WindowConfig]):
    """Attend within the windows, in one attention module: with soft edges in training, with hard ones otherwise."""

    label = SETTINGS.label
    shape_fields = ("num_attention_heads",)
    adapter_layer_names = ("window_widths", "window_lora")

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.heads, self.layer, self.causal = shape.num_attention_heads, shape.layer, shape.causal
        self.window_widths, self.window_lora = nn.ModuleDict(), nn.ModuleDict()

    @classmethod
    def for_shape(cls, shape: AttentionShape) -> "WindowAttention":
        return cls(shape)

    def make_parameters(self, config: WindowConfig) -> Widths:
        return Widths(self.heads, config.first_width)

    @property
    def widths(self) -> Tensor:
        """Return the widths of the adapter in use, `[Hq]` float32; every token is in its own window."""
        return self.window_widths[self.active].log_width.float().exp().clamp(min=1)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden_states: Tensor,
        valid: Tensor | None,
        cache: Any,
        scaling: float,
    ) -> Tensor:
        new, keys = query.shape[2], key.shape[2]
        places = torch.arange(keys, device=query.device)
        distance = places[-new:, None] - places  # [T, Tk], negative for later keys
        inside = self.widths[:, None, None] - distance.abs()  # [Hq, T, Tk], above 0 within the window
        lowest = torch.finfo(query.dtype).min / 2  # finite: a query of padding may see no key at all
        hidden = (distance < 0) if self.causal else torch.zeros_like(distance, dtype=torch.bool)
        if self.is_learning(cache):
            mask = F.logsigmoid(inside / SOFTNESS).masked_fill(hidden, lowest)
        else:
            mask = torch.zeros_like(inside).masked_fill(hidden | (inside <= 0), lowest)
        mask = mask.to(query.dtype)[None]  # [1, Hq, T, Tk]
        if valid is not None:
            mask = mask.masked_fill(~valid[:, None, None], lowest)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


class WindowModel(SparseModel):
    """Attach the method to a model for `peft.get_peft_model`."""

    prefix = "window_"


class WindowTraining(Training):
    """Train the widths on the loss of the objective and the price of wide windows."""

    learned = "widths"
    settings_type = WindowTrainingSettings
    settings: WindowTrainingSettings

    def loss(self, stage: Stage, model: nn.Module, *batch: Tensor) -> Tensor:
        shares = torch.stack([layer.widths / batch[0].shape[1] for layer in self.layers])
        return super().loss(stage, model, *batch) + self.settings.width_price * shares.mean()


class WindowEvaluation(Evaluation):
    """Compare dense attention with the learned windows."""

    name = SETTINGS.name


class WindowReport(MethodReport):
    """Show that on the card and the report that all methods have unless they bring their own."""

    name = SETTINGS.name


register_method(
    Method(
        name=SETTINGS.name,
        peft_type=SETTINGS.peft_type,
        config=WindowConfig,
        layer=WindowAttention,
        tuner=WindowModel,
        prefix=WindowModel.prefix,
        training=lambda: WindowTraining,
        evaluation=WindowEvaluation,
        report=WindowReport,
    )
)
