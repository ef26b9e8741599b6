"""Patch BERT: learned positions, one KV head per query head; an encoder, or a causal decoder with `is_decoder=True`.

Cross-attention modules have a class of their own and stay dense.
"""

from hf_sparse.patches.base import Family, register_family

BERT = register_family(
    Family(
        model_types=("bert",),
        attention="transformers.models.bert.modeling_bert:BertSelfAttention",
        hidden_size=lambda module: module.query.in_features,
        num_key_value_heads=lambda module: module.num_attention_heads,
    )
)
