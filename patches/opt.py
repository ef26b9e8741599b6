"""OPT: learned positions; queries are scaled before the attention function, which then scales by 1."""

from torch import nn

from hf_sparse.patches.base import Family, register_family


def _attention() -> type[nn.Module]:
    from transformers.models.opt.modeling_opt import OPTAttention

    return OPTAttention


OPT = register_family(
    Family(
        model_types=("opt",),
        attention=_attention,
        hidden_size=lambda module: module.embed_dim,
        num_key_value_heads=lambda module: module.num_heads,
    )
)
