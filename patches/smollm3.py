"""Patch SmolLM3: Llama without rotary positions in every fourth layer, whose keys carry no position at all."""

from hf_sparse.patches.base import Family, register_family

SMOLLM3 = register_family(
    Family(model_types=("smollm3",), attention="transformers.models.smollm3.modeling_smollm3:SmolLM3Attention")
)
