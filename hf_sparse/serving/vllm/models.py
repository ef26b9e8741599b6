"""Serve Llama, Qwen2, Qwen3 and Mistral with sparse attention: vLLM's models with another attention in every layer."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from hf_sparse.adapters.load import fetch_adapter
from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.serving.adapter import ServedAdapter, open_adapter
from hf_sparse.serving.export import KEY
from hf_sparse.serving.pool import state_of_request
from hf_sparse.serving.vllm.layer import RowAttention, page_bytes


def adapter_of(config: VllmConfig) -> ServedAdapter:
    """Open the adapter that the configuration of a model names.

    The name is an id on the Hub or a folder; beginning with `./`, a folder within that of the model.

    Raises:
        ValueError: it names none.
        HubError, AdapterMismatchError, UnsupportedModelError: see `open_adapter`.
    """
    model = config.model_config
    name = getattr(model.hf_config, KEY, None)
    if not isinstance(name, str):
        raise ValueError(
            f"the configuration of {model.model} names no adapter: make a folder with `hf-sparse export`, or pass "
            f'--hf-overrides \'{{"architectures": [...], "{KEY}": "user/adapter"}}\''
        )
    folder = name
    if name.startswith("./"):
        whole = Path(model.model)
        if not whole.is_dir():
            part = name.removeprefix("./")
            whole = Path(snapshot_download(model.model, revision=model.revision, allow_patterns=f"{part}/*"))
        folder = str(whole / name)
    return open_adapter(fetch_adapter(folder), model.hf_config, name)


class SparseAttention(nn.Module):
    """Attend with the projections of a dense attention module of vLLM, whose names of weights stay."""

    qkv_proj: Any
    q_norm: Any
    k_norm: Any
    rotary_emb: Any
    o_proj: Any

    def __init__(self, dense: Any, rows: RowAttention) -> None:
        super().__init__()
        for name, child in dense.named_children():
            if name != "attn":
                self.add_module(name, child)
        self.sizes = [dense.q_size, dense.kv_size, dense.kv_size]
        self.head_dim = dense.head_dim
        self.has_norms = hasattr(dense, "q_norm")
        self.attn = rows

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend with packed tokens, as the dense module: `[N]`, `[N, C]` -> `[N, C]`."""
        query, key, value = self.qkv_proj(hidden_states)[0].split(self.sizes, dim=-1)
        if self.has_norms:
            query = self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            key = self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        query, key = self.rotary_emb(positions, query, key)
        return self.o_proj(self.attn(query, key, value.contiguous(), hidden_states))[0]


class SparseModel:
    """Give a causal language model of vLLM sparse attention in every layer."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.adapter = adapter_of(vllm_config)
        shard = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        attentions = [layer.shard(*shard) for layer in self.adapter.layers]
        page = _page_bytes(attentions, self.adapter, vllm_config)
        context = vllm_config.compilation_config.static_forward_context
        device = torch.get_default_device()
        for number, layer in enumerate(self.model.layers):
            dense = getattr(layer, "self_attn", None)
            if dense is None:
                continue  # of another stage of a pipeline
            _check_dense(dense)
            name = next(name for name, module in context.items() if module is dense.attn)
            del context[name]
            rows = RowAttention(
                attentions[number].to(device),
                vllm_config,
                num_heads=dense.num_heads,
                num_kv_heads=dense.num_kv_heads,
                head_dim=self.adapter.head_dim,
                scaling=dense.scaling,
                page=page,
                prefix=name,
            )
            layer.self_attn = SparseAttention(dense, rows)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of the base model, with what LoRA of the adapter adds to them."""
        return super().load_weights(self._changed(weights))  # type: ignore[misc]

    def _changed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights, and check that each change was of one of them."""
        changes = dict(self.adapter.changes)
        for name, weight in weights:
            change = changes.pop(name, None)
            if change is not None:
                weight = (weight.float() + change.to(weight.device)).to(weight.dtype)
            yield name, weight
        if changes:
            raise UnsupportedModelError(f"LoRA of the adapter changes {next(iter(changes))}, which the model lacks")

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Return the shape of a page."""
        adapter = adapter_of(vllm_config)
        attentions = [layer.shard(0, vllm_config.parallel_config.tensor_parallel_size) for layer in adapter.layers]
        return ((_page_bytes(attentions, adapter, vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Return the dtype of a page."""
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """Return how vLLM copies a page on a GPU."""
        return (get_temporal_copy_spec,)


def _page_bytes(attentions: Sequence[SparseAttentionLayer], adapter: ServedAdapter, config: VllmConfig) -> int:
    """Count the bytes of a page for the attention of all layers, as one process has it."""
    return page_bytes([state_of_request(layer, adapter.head_dim, config.model_config.dtype) for layer in attentions])


def _check_dense(dense: Any) -> None:
    """Refuse attention that does something else than queries, keys, positions and a softmax.

    Raises:
        UnsupportedModelError: it does.
    """
    reasons = {
        "do_llama_4_scaling": "queries that are scaled by their position",
        "dual_chunk_attention_config": "attention in two chunks",
        "sliding_window": "a sliding window",
    }
    for name, what in reasons.items():
        if getattr(dense, name, None):
            raise UnsupportedModelError(
                f"{type(dense).__name__} has {what}, which cannot be served with sparse attention"
            )


class HfSparseLlamaForCausalLM(
    SparseModel, LlamaForCausalLM, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching
):
    """Serve Llama with sparse attention."""


class HfSparseMistralForCausalLM(
    SparseModel, MistralForCausalLM, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching
):
    """Serve Mistral with sparse attention."""


class HfSparseQwen2ForCausalLM(
    SparseModel, Qwen2ForCausalLM, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching
):
    """Serve Qwen2 with sparse attention."""


class HfSparseQwen3ForCausalLM(
    SparseModel, Qwen3ForCausalLM, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching
):
    """Serve Qwen3 with sparse attention."""
