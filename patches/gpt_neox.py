"""GPT-NeoX and Pythia: one projection for queries, keys and values, rotary positions on a part of each head."""

from torch import nn

from hf_sparse.patches.base import Family, register_family


def _attention() -> type[nn.Module]:
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

    return GPTNeoXAttention


GPT_NEOX = register_family(
    Family(
        model_types=("gpt_neox",),
        attention=_attention,
        hidden_size=lambda module: module.query_key_value.in_features,
        num_key_value_heads=lambda module: module.config.num_attention_heads,
    )
)
