"""Patch Phi-1, Phi-1.5 and Phi-2: rotary positions on a part of each head, attention and MLP side by side."""

from hf_sparse.patches.base import Family, register_family

PHI = register_family(Family(model_types=("phi",), attention="transformers.models.phi.modeling_phi:PhiAttention"))
