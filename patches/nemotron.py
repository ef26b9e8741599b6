"""Patch Nemotron (Minitron): rotary positions on a part of each head, squared ReLU, no gate in the MLP."""

from hf_sparse.patches.base import Family, register_family

NEMOTRON = register_family(
    Family(model_types=("nemotron",), attention="transformers.models.nemotron.modeling_nemotron:NemotronAttention")
)
