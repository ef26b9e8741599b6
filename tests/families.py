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
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HALF_LOCAL = {
    "num_hidden_layers": 4,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@dataclass(frozen=True)
class TinyFamily:
    """A family and a model of it with 2 to 4 layers, float32, on the CPU, in eval mode.

    Attributes:
        causal: a decoder; the others are encoders.
        local: layers with a sliding window of their own, which a patch leaves alone.
        kin: relative of another family, which without `--full` takes only what its file in `patches/` can break.
    """

    name: str
    config: str
    model: str
    settings: dict[str, Any]
    causal: bool = True
    local: tuple[int, ...] = ()
    kin: bool = False

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
    TinyFamily("bert", "BertConfig", "BertForMaskedLM", COMMON, causal=False),
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
    # The families above differ in kind: grouped heads, learned positions, local layers, fused projections, encoders.
    # Without `--full` their kin below takes the behaviours that are marked `every_family`.
    TinyFamily("mistral", "MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": None}, kin=True),
    TinyFamily("qwen2", "Qwen2Config", "Qwen2ForCausalLM", GROUPED, kin=True),
    # A head size that is not hidden_size / num_attention_heads, as in the published ones.
    TinyFamily("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}, kin=True),
    TinyFamily(
        "gemma", "GemmaConfig", "GemmaForCausalLM", {**GROUPED, "num_key_value_heads": 1, "head_dim": 16}, kin=True
    ),
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
        kin=True,
    ),
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
        kin=True,
    ),
    TinyFamily("gpt_neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", COMMON, kin=True),
    # RoBERTa counts positions from pad_token_id + 1.
    TinyFamily(
        "roberta",
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**COMMON, "max_position_embeddings": CONTEXT + 1},
        causal=False,
        kin=True,
    ),
    # Every second layer has no rotary positions.
    TinyFamily("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM", {**GROUPED, "no_rope_layers": [1, 0]}, kin=True),
    TinyFamily("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "head_dim": 16}, kin=True),
    TinyFamily(
        "mixtral", "MixtralConfig", "MixtralForCausalLM", {**GROUPED, **EXPERTS, "sliding_window": None}, kin=True
    ),
    TinyFamily(
        "granite",
        "GraniteConfig",
        "GraniteForCausalLM",
        {**GROUPED, "attention_multiplier": 0.2, "logits_scaling": 2.0},
        kin=True,
    ),
    TinyFamily("apertus", "ApertusConfig", "ApertusForCausalLM", GROUPED, kin=True),
    TinyFamily("olmo2", "Olmo2Config", "Olmo2ForCausalLM", GROUPED, kin=True),
    TinyFamily("olmo3", "Olmo3Config", "Olmo3ForCausalLM", {**GROUPED, **HALF_LOCAL}, local=(0, 2), kin=True),
    TinyFamily(
        "cohere", "CohereConfig", "CohereForCausalLM", {**GROUPED, "use_qk_norm": True, "logit_scale": 0.5}, kin=True
    ),
    TinyFamily(
        "cohere2",
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {**GROUPED, **HALF_LOCAL, "logit_scale": 0.5},
        local=(0, 2),
        kin=True,
    ),
    # Its full layers have no rotary positions.
    TinyFamily("exaone4", "Exaone4Config", "Exaone4ForCausalLM", {**GROUPED, **HALF_LOCAL}, local=(0, 2), kin=True),
    TinyFamily("glm", "GlmConfig", "GlmForCausalLM", {**GROUPED, "head_dim": 16}, kin=True),
    TinyFamily("glm4", "Glm4Config", "Glm4ForCausalLM", {**GROUPED, "head_dim": 16}, kin=True),
    TinyFamily("phi", "PhiConfig", "PhiForCausalLM", {**COMMON, "qk_layernorm": True}, kin=True),
    TinyFamily("stablelm", "StableLmConfig", "StableLmForCausalLM", {**GROUPED, "qk_layernorm": True}, kin=True),
    TinyFamily(
        "starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", {**GROUPED, "sliding_window": None}, kin=True
    ),
    TinyFamily(
        "gptj",
        "GPTJConfig",
        "GPTJForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_positions": CONTEXT,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 4,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        kin=True,
    ),
    TinyFamily(
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 32},
        kin=True,
    ),
    TinyFamily("olmo", "OlmoConfig", "OlmoForCausalLM", {**GROUPED, "clip_qkv": 2.0}, kin=True),
    TinyFamily("olmoe", "OlmoeConfig", "OlmoeForCausalLM", {**GROUPED, **EXPERTS}, kin=True),
    TinyFamily("seed_oss", "SeedOssConfig", "SeedOssForCausalLM", {**GROUPED, "head_dim": 16}, kin=True),
    TinyFamily("ernie4_5", "Ernie4_5Config", "Ernie4_5ForCausalLM", {**GROUPED, "head_dim": 16}, kin=True),
    # Queries are scaled by their position, in steps of `original_max_position_embeddings`.
    TinyFamily(
        "ministral3",
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.1,
            },
        },
        kin=True,
    ),
    TinyFamily(
        "granitemoe",
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {**GROUPED, **EXPERTS, "attention_multiplier": 0.2, "logits_scaling": 2.0},
        kin=True,
    ),
    # A dense layer, and one with experts beside a shared one.
    TinyFamily(
        "glm4_moe",
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {**GROUPED, **EXPERTS, "head_dim": 16, "use_qk_norm": True},
        kin=True,
    ),
    # Its norms multiply by 1 + weight, and a new weight is 1: with the weights of the others all after a norm is twice
    # as large, and so is its rounding.
    TinyFamily("nemotron", "NemotronConfig", "NemotronForCausalLM", {**GROUPED, "initializer_range": 0.1}, kin=True),
    TinyFamily("arcee", "ArceeConfig", "ArceeForCausalLM", GROUPED, kin=True),
    TinyFamily(
        "distilbert",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT,
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "initializer_range": 0.2,
            "pad_token_id": 0,
        },
        causal=False,
        kin=True,
    ),
    TinyFamily(
        "xlm-roberta",
        "XLMRobertaConfig",
        "XLMRobertaForMaskedLM",
        {**COMMON, "max_position_embeddings": CONTEXT + 1},
        causal=False,
        kin=True,
    ),
    TinyFamily(
        "llava",
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": {
                **COMMON,
                "model_type": "clip_vision_model",
                "image_size": 24,
                "patch_size": 4,
                "projection_dim": 32,
            },
            "image_token_index": VOCABULARY - 1,
        },
        kin=True,
    ),
    # Embeddings narrower than the layers, as in the small one.
    TinyFamily(
        "electra", "ElectraConfig", "ElectraForMaskedLM", {**COMMON, "embedding_size": 16}, causal=False, kin=True
    ),
    # The one encoder with grouped heads.
    TinyFamily(
        "eurobert",
        "EuroBertConfig",
        "EuroBertForMaskedLM",
        {**GROUPED, "mask_token_id": 3},
        causal=False,
        kin=True,
    ),
)

# GPT-J of older versions of transformers computes attention by itself.
NOT_HERE = () if transformers.GPTJForCausalLM._supports_attention_backend else ("gptj",)
FAMILIES: dict[str, TinyFamily] = {entry.name: entry for entry in _ENTRIES if entry.name not in NOT_HERE}
