"""Patch GPT-2: learned positions, one projection for queries, keys and values.

Logit scales (`scale_attn_weights`, `scale_attn_by_inverse_layer_idx`) reach the attention function as `scaling`.
`reorder_and_upcast_attn` acts in transformers' eager attention only: it forces float32 logits, which sparse attention
has of its own (and PyTorch's SDPA, which takes the decoding steps and the layers that are not patched). Cross-attention
stays dense.
"""

from hf_sparse.patches.base import Family, register_family

GPT2 = register_family(
    Family(
        model_types=("gpt2",),
        attention="transformers.models.gpt2.modeling_gpt2:GPT2Attention",
        hidden_size=lambda module: module.embed_dim,
        num_key_value_heads=lambda module: module.num_heads,
    )
)
