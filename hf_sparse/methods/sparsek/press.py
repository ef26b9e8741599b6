"""Give trained scorers to kvpress, which drops keys of the KV cache once a prompt was read.

kvpress 0.5.5 asks for a transformers that is older than those whose models hf-sparse patches. So nothing is patched
here: the scorers alone are loaded from the files of the adapter, and kvpress calls them.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from kvpress import ScorerPress
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_sparse.methods.sparsek.scorer import Scorer, make_scorer
from hf_sparse.methods.sparsek.settings import PEFT_TYPE, SparseKSettings


@dataclass
class SparseKPress(ScorerPress):
    """Keep the sinks, the window and the best-scored other keys of a prompt, all by a trained SparseK adapter.

    With a `compression_ratio` that leaves the adapter's slots, those are the keys that its own cache holds then.
    `layer_shares` and `head_shares` are not followed: kvpress keeps as many keys in every layer and head. Nor is
    `pin_prompt`, with which that cache holds the whole prompt.

    Attributes:
        compression_ratio: share of the prompt's keys that are dropped.
        adapter: folder of a SparseK adapter for the model.
        scorers: of the attention layers, once a model is known.
    """

    adapter: str | Path = ""
    scorers: list[Scorer] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        content = json.loads((Path(self.adapter) / "adapter_config.json").read_text("utf-8"))
        if content.get("peft_type") != PEFT_TYPE:
            raise ValueError(f"expected an adapter of type {PEFT_TYPE}, got {content.get('peft_type')!r}")
        self.settings = SparseKSettings(
            **{f.name: content[f.name] for f in fields(SparseKSettings) if f.name in content}
        )
        if self.settings.lora_rank:
            raise ValueError(
                f"expected an adapter without LoRA, got lora_rank={self.settings.lora_rank}: its scorers know the "
                "states of a model with LoRA, and kvpress has the base model"
            )
        if self.settings.layers is not None:
            raise ValueError(f"expected an adapter for all layers, got one for the layers {self.settings.layers}")

    def post_init_from_model(self, model: Any) -> None:
        """Load the scorers for a model.

        Raises:
            ValueError: the adapter is for a model of another size.
        """
        weights = load_file(Path(self.adapter) / "adapter_model.safetensors")
        config, layers = model.config.get_text_config(), model.get_decoder().layers
        expected = {
            "hidden_size": config.hidden_size,
            "num_key_value_heads": config.num_key_value_heads,
            "num_attention_layers": len(layers),
        }
        made_for = {name: (self.settings.base_shape or {}).get(name) for name in expected}
        if made_for != expected:
            raise ValueError(f"the adapter was made for a model of {made_for}, expected {expected}")
        self.scorers = []
        for index, layer in enumerate(layers):
            scorer = make_scorer(self.settings, config.hidden_size, config.num_key_value_heads, causal=True)
            prefix = f"layers.{index}.self_attn.sparse_attention.sparsek_scorer."
            named = {key.partition(prefix)[2]: tensor for key, tensor in weights.items() if prefix in key}
            scorer.load_state_dict(named)
            self.scorers.append(scorer.to(next(layer.parameters()).device).requires_grad_(False))

    def score(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        """Return the scores `[B, Hkv, T]` float32 of the keys of a prompt, infinite for those that are always kept.

        Args:
            module: the attention module.
            hidden_states: `[B, T, C]`, its input.
            keys: `[B, Hkv, T, D]`.
            values, attentions, kwargs: not needed.

        Raises:
            ValueError: fewer states than keys, as in kvpress' `DecodingPress`, or a ratio that leaves fewer keys than
                sinks and window have.
        """
        batch, length = hidden_states.shape[:2]
        if length != keys.shape[2]:
            raise ValueError(f"expected the states of all {keys.shape[2]} keys, got {length}: scores are of a prompt")
        sinks, window = self.settings.sinks, self.settings.window
        kept = int(length * (1 - self.compression_ratio))
        if min(length, sinks + window) > kept:
            raise ValueError(
                f"compression_ratio={self.compression_ratio} leaves {kept} of {length} keys, expected at least the "
                f"{sinks} sinks and the {window} of the window"
            )
        index = torch.arange(length, device=hidden_states.device).expand(batch, length)
        scores = self.scorers[int(module.layer_idx)](hidden_states, index)  # type: ignore[arg-type]
        scores[..., :sinks] = scores[..., length - window :] = torch.inf
        return scores
