"""Patch Seed-OSS: Llama with biased projections and a head size of its own."""

from hf_sparse.patches.base import Family, register_family

SEED_OSS = register_family(
    Family(model_types=("seed_oss",), attention="transformers.models.seed_oss.modeling_seed_oss:SeedOssAttention")
)
