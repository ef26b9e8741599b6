"""Patch XLM-RoBERTa: RoBERTa of many languages; an encoder, or a decoder with `is_decoder=True`.

Cross-attention modules have a class of their own and stay dense.
"""

from hf_sparse.patches.base import Family, register_family

XLM_ROBERTA = register_family(
    Family(
        model_types=("xlm-roberta",),
        attention="transformers.models.xlm_roberta.modeling_xlm_roberta:XLMRobertaSelfAttention",
        hidden_size=lambda module: module.query.in_features,
        num_key_value_heads=lambda module: module.num_attention_heads,
    )
)
