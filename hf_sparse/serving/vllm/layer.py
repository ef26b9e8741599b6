"""Attend in vLLM with states of a fixed size, which it holds and schedules as those of a Mamba model.

A page of vLLM's memory is the state of one request in one layer. All layers have pages of the same size, that of the
layer with the most to keep; it is bytes to vLLM.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.core.new_tokens import PackedTokens
from hf_sparse.core.prompt_chunks import Chunk
from hf_sparse.core.request_state import StateTensor
from hf_sparse.serving.pool import Batch, attend_packed, begin_rows, state_of_request

_ALIGNMENT = 256  # bytes of which a page, and the place of a tensor in it, is a multiple: kernels load 16 at a time


def page_bytes(states: list[tuple[StateTensor, ...]]) -> int:
    """Count the bytes of a page that holds the state of any of the layers."""
    return max(_places(state)[-1] for state in states)


def _places(state: tuple[StateTensor, ...]) -> list[int]:
    """Return the byte of a page at which each tensor of a state begins, and the one behind the last."""
    places = [0]
    for part in state:
        places.append(places[-1] + -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return places


@dataclass
class RowsMetadata(BaseMambaAttentionMetadata):
    """Hold whose the tokens of a forward are, beside what vLLM itself wants to know.

    Attributes:
        batch: for `attend_packed`.
    """

    batch: Batch | None = None


class RowsBuilder(BaseMambaAttentionMetadataBuilder[RowsMetadata]):
    """Find out for each forward which pages its tokens belong to."""

    metadata_cls = RowsMetadata
    needs_causal_conv1d_metadata = False
    supports_update_block_table = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **options: Any
    ) -> RowsMetadata:
        """Build the metadata of a forward; vLLM calls this."""
        firsts = self._first_tokens(common_attn_metadata)
        if firsts is not None:
            # vLLM replays the graph of decoding for a batch of single tokens, also where a text begins with one of
            # them. So those are steps too, from rows that hold nothing yet.
            none = torch.zeros_like(common_attn_metadata.is_prefilling)
            common_attn_metadata = common_attn_metadata.replace(is_prefilling=none)
        metadata = super().build(common_prefix_len, common_attn_metadata, *args, **options)
        if firsts is not None:
            layers = self.vllm_config.compilation_config.static_forward_context
            new = metadata.state_indices_tensor_d[firsts.to(self.device), 0]
            for name in self.layer_names:
                begin_rows(layers[name].state, layers[name].states, new)
        parts, steps, chunks = [], 0, []
        if metadata.num_decodes:
            rows = metadata.state_indices_tensor_d[:, 0]  # padded where a graph is replayed
            parts.append(rows)
            steps = len(rows)
        if metadata.num_prefills:
            assert metadata.state_indices_tensor_p is not None
            parts.append(metadata.state_indices_tensor_p)
            first, last = metadata.num_decodes, metadata.num_decodes + metadata.num_prefills
            places = common_attn_metadata.query_start_loc_cpu[first : last + 1].tolist()
            lengths = common_attn_metadata.seq_lens_cpu_upper_bound[first:last].tolist()
            for begin, end, length in zip(places, places[1:], lengths, strict=False):
                chunks.append(Chunk(begin, end, before=length - (end - begin)))
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        batch = Batch(rows, steps, tuple(chunks), self._sources(common_attn_metadata, rows))
        return replace(metadata, batch=batch)

    @staticmethod
    def _first_tokens(common: CommonAttentionMetadata) -> Tensor | None:
        """Return the numbers of the requests whose text begins, in a batch of one token each; `None` if none does."""
        if common.max_query_len != 1 or common.is_prefilling is None:
            return None
        lengths = common.seq_lens_cpu_upper_bound[: common.num_reqs]
        firsts = (common.is_prefilling[: common.num_reqs] & (lengths == 1)).nonzero()[:, 0]
        return firsts if len(firsts) else None

    def _sources(self, common: CommonAttentionMetadata, rows: Tensor) -> Tensor | None:
        """Return the pages that states are read from, on the CPU with prefix caching.

        There the page of a request changes at the end of each block, and the old one stays in the cache. On a GPU vLLM
        copies the state to the new page before the forward; it has no such kernel for the CPU.
        """
        if not current_platform.is_cpu() or self.vllm_config.cache_config.mamba_cache_mode != "align":
            return None
        count = len(rows)
        starts = common.query_start_loc[: count + 1]
        before = common.seq_lens[:count] - (starts[1:] - starts[:-1])
        column = ((before - 1).clamp(min=0) // self.kv_cache_spec.block_size).long()
        return common.block_table_tensor[:count].gather(1, column[:, None])[:, 0]


class RowsBackend(AttentionBackend):
    """Tell vLLM how metadata of these layers is built; it computes nothing itself."""

    @staticmethod
    def get_name() -> str:
        """Return the name of the backend in vLLM's messages."""
        return "HF_SPARSE_ROWS"

    @staticmethod
    def get_impl_cls() -> Any:
        """Refuse to name an implementation: the layer itself attends.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[RowsBuilder]:
        """Return the class that builds the metadata."""
        return RowsBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """Tell vLLM that the state is not one of keys in pages."""
        return True


class RowAttention(MambaBase, nn.Module):
    """Attend sparsely in one layer, in place of vLLM's `Attention`.

    Attributes:
        num_heads, num_kv_heads: query heads and KV heads of this process.
        head_dim: size of a query, key or value of one head.
        scaling: multiplies the logits.
        page: bytes of the state of a request.
        prefix: the name of the layer in vLLM.
        state: describes the state of a request.
        pages: the memory of all states, `[pages, page]` bytes, as vLLM gave it; empty before that.
        states: views of the pages, a tensor `[pages, ...]` for each part of the state.
    """

    def __init__(
        self,
        attention: SparseAttentionLayer,
        config: VllmConfig,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scaling: float,
        page: int,
        prefix: str,
    ) -> None:
        super().__init__()
        self._attention = (attention,)  # no submodule: vLLM would look for its weights in the base's files
        self.num_heads, self.num_kv_heads, self.head_dim, self.scaling = num_heads, num_kv_heads, head_dim, scaling
        self.page, self.prefix = page, prefix
        self.state = state_of_request(attention, head_dim, config.model_config.dtype)
        self.states: list[Tensor] = []
        self.pages: tuple[Tensor, ...] = ()
        config.compilation_config.static_forward_context[prefix] = self

    @property
    def attention(self) -> SparseAttentionLayer:
        """Return the sparse attention."""
        return self._attention[0]

    @property
    def kv_cache(self) -> tuple[Tensor, ...]:
        """Return what vLLM copies where the page of a request changes: nothing on the CPU, see `RowsBuilder`."""
        return () if current_platform.is_cpu() else self.pages

    @kv_cache.setter
    def kv_cache(self, pages: Any) -> None:
        """Take the memory that vLLM gives the layer: a tensor of bytes `[pages, page]`, in a list; none at its end."""
        self.pages = tuple(pages) if isinstance(pages, list | tuple) else ()
        self.states = []
        for part, place in zip(self.state, _places(self.state), strict=False) if self.pages else ():
            view = self.pages[0][:, place : place + part.nbytes].view(part.dtype)
            self.states.append(view.view(len(view), *part.shape))

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the memory that vLLM gives the layer, `[pages, 1, 1, page]`."""
        self.kv_cache = (kv_cache[:, 0, 0, : self.page],)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Return the shape of the state of a request: bytes."""
        return ((self.page,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Return the dtype of the state of a request: bytes."""
        return (torch.int8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Return the kind of state among those that vLLM knows: none of its own."""
        return MambaAttentionBackendEnum.CUSTOM

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return what builds the metadata."""
        return RowsBackend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend with packed tokens: `[N, Hq * D]`, `[N, Hkv * D]` twice, `[N, C]` -> `[N, Hq * D]`."""
        output = torch.empty_like(query)
        torch.ops.hf_sparse.attend_rows(query, key, value, hidden_states, output, self.prefix)
        return output

    def attend(self, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor, output: Tensor) -> None:
        """Write the attention of packed tokens to `output`, see `forward`."""
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata.get(self.prefix)
        if not isinstance(metadata, RowsMetadata) or metadata.batch is None or not self.states:
            output.zero_()  # vLLM measures its memory
            return
        q, k, v = (
            tensor.view(len(tensor), heads, self.head_dim)
            for tensor, heads in ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
        )
        result = output.view(len(output), self.num_heads, self.head_dim)
        packed = PackedTokens(q, k, v, hidden_states, self.scaling)
        attend_packed(self.attention, self.states, metadata.batch, packed, result)


@torch.library.custom_op("hf_sparse::attend_rows", mutates_args=("output",))
def _attend_rows(query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor, output: Tensor, layer: str) -> None:
    """Attend in the layer of this name; it also writes the states of the requests."""
    get_forward_context().no_compile_layers[layer].attend(query, key, value, hidden_states, output)


@_attend_rows.register_fake
def _(*tensors: Any) -> None:
    return None
