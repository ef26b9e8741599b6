"""Patch Cohere (Command R): no biases, attention beside the MLP; the local layers of Cohere 2 stay as they are.

Rotary positions turn pairs of neighbouring channels, and in Cohere 2 the full layers have no positions at all; both
happens before the attention function.
"""

from hf_sparse.patches.base import Family, register_family

COHERE = register_family(
    Family(model_types=("cohere",), attention="transformers.models.cohere.modeling_cohere:CohereAttention")
)
COHERE2 = register_family(
    Family(model_types=("cohere2",), attention="transformers.models.cohere2.modeling_cohere2:Cohere2Attention")
)
