"""RoBERTa: BERT with positions counted from `pad_token_id + 1`; an encoder, or a causal decoder with `is_decoder=True`.

Cross-attention modules have a class of their own and stay dense.
"""

from torch import nn

from hf_sparse.patches.base import Family, register_family


def _attention() -> type[nn.Module]:
    from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

    return RobertaSelfAttention


ROBERTA = register_family(
    Family(
        model_types=("roberta",),
        attention=_attention,
        hidden_size=lambda module: module.query.in_features,
        num_key_value_heads=lambda module: module.num_attention_heads,
    )
)
