"""Patch ELECTRA: BERT, in some sizes with narrower embeddings; an encoder, or a decoder with `is_decoder=True`.

Cross-attention modules have a class of their own and stay dense.
"""

from hf_sparse.patches.base import Family, register_family

ELECTRA = register_family(
    Family(
        model_types=("electra",),
        attention="transformers.models.electra.modeling_electra:ElectraSelfAttention",
        hidden_size=lambda module: module.query.in_features,
        num_key_value_heads=lambda module: module.num_attention_heads,
    )
)
