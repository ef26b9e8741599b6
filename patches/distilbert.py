"""Patch DistilBERT: half of BERT's layers; its attention module holds the output projection too."""

from hf_sparse.patches.base import Family, register_family

DISTILBERT = register_family(
    Family(
        model_types=("distilbert",),
        attention="transformers.models.distilbert.modeling_distilbert:DistilBertSelfAttention",
        hidden_size=lambda module: module.q_lin.in_features,
        num_key_value_heads=lambda module: module.n_heads,
        num_attention_heads=lambda module: module.n_heads,
    )
)
