"""Patch EuroBERT: an encoder with the layers of Llama, rotary positions and grouped heads."""

from hf_sparse.patches.base import Family, register_family

EUROBERT = register_family(
    Family(model_types=("eurobert",), attention="transformers.models.eurobert.modeling_eurobert:EuroBertAttention")
)
