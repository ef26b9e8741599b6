"""Patch OPT: learned positions; queries are scaled before the attention function, which then scales by 1."""

from hf_sparse.patches.base import Family, register_family

OPT = register_family(
    Family(
        model_types=("opt",),
        attention="transformers.models.opt.modeling_opt:OPTAttention",
        hidden_size=lambda module: module.embed_dim,
        num_key_value_heads=lambda module: module.num_heads,
        backbone=lambda model: getattr(model.base_model, "decoder", model),
    )
)
