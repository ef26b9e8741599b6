"""Patch RoBERTa: BERT with positions from `pad_token_id + 1`; an encoder, or a decoder with `is_decoder=True`.

Cross-attention modules have a class of their own and stay dense.
"""

from hf_sparse.patches.base import Family, register_family

ROBERTA = register_family(
    Family(
        model_types=("roberta",),
        attention="transformers.models.roberta.modeling_roberta:RobertaSelfAttention",
        hidden_size=lambda module: module.query.in_features,
        num_key_value_heads=lambda module: module.num_attention_heads,
    )
)
