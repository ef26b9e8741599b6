"""Patch Apertus: Llama whose queries and keys are normalised within each head before they get rotary positions."""

from hf_sparse.patches.base import Family, register_family

APERTUS = register_family(
    Family(model_types=("apertus",), attention="transformers.models.apertus.modeling_apertus:ApertusAttention")
)
