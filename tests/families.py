"""Tiny random models of every family: one entry each, the same weights for the same arguments.

The weights are larger than a fresh model's: with those every key has about the same weight, and no test would notice
which keys are attended. `tests/patches/test_families.py` and `tests/conformance/` go through this list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 64
CONTEXT = 256

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}


@dataclass(frozen=True)
class TinyFamily:
    """A family and a model of it with 2 to 4 layers, float32, on the CPU, in eval mode.

    Attributes:
        causal: a decoder; the others are encoders.
        local: layers with a sliding window of their own, which a patch leaves alone.
    """

    name: str
    config: str
    model: str
    settings: dict[str, Any]
    causal: bool = True
    local: tuple[int, ...] = ()

    def make(self, **overrides: Any) -> PreTrainedModel:
        """A new model; `overrides` go to its config. `model=` names another class of the family, such as a head."""
        kind: Callable[..., PreTrainedModel] = getattr(transformers, overrides.pop("model", self.model))
        config = getattr(transformers, self.config)(**{**self.settings, **overrides})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return kind(config).eval()


_ENTRIES = (
    TinyFamily("llama", "LlamaConfig", "LlamaForCausalLM", GROUPED),
    TinyFamily(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_positions": CONTEXT,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    TinyFamily("mistral", "MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": None}),
    TinyFamily("qwen2", "Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    # A head size that is not hidden_size / num_attention_heads, as in the published ones.
    TinyFamily("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    TinyFamily("gemma", "GemmaConfig", "GemmaForCausalLM", {**GROUPED, "num_key_value_heads": 1, "head_dim": 16}),
    TinyFamily(
        "gemma2",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": None,  # with a cap it is refused
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        local=(0, 2),
    ),
    TinyFamily(
        "gemma3_text",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        local=(0, 2),
    ),
    TinyFamily("phi3", "Phi3Config", "Phi3ForCausalLM", GROUPED),
    TinyFamily(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "word_embed_proj_dim": 32,
            "init_std": 0.2,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    TinyFamily("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", COMMON),
    TinyFamily("bert", "BertConfig", "BertForMaskedLM", COMMON, causal=False),
    # RoBERTa counts positions from pad_token_id + 1.
    TinyFamily(
        "roberta",
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**COMMON, "max_position_embeddings": CONTEXT + 1},
        causal=False,
    ),
    TinyFamily(
        "modernbert",
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            **COMMON,
            "num_hidden_layers": 4,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "local_attention": 12,
            "initializer_cutoff_factor": 3.0,
        },
        causal=False,
        local=(1, 3),
    ),
)

FAMILIES: dict[str, TinyFamily] = {entry.name: entry for entry in _ENTRIES}
