"""Open an adapter to be served: check it against the base model's configuration, and load what it learned.

No weight of the base model is read here. An engine has its own modules for those, and gets the sparse attention of each
layer, and what LoRA adds to weights.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_sparse.adapters.files import WEIGHTS
from hf_sparse.adapters.fit import check_fit
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.base_model import Base
from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.core.registry import method_of
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.patches.base import family_of
from hf_sparse.weights import opened

#: Types of models that can be served, and the class of transformers that each is.
SERVED = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_NAME = "default"  # of the adapter in the layers


@dataclass(frozen=True)
class ServedAdapter:
    """Hold an adapter that fits a base model.

    Attributes:
        layers: the sparse attention of every attention layer, on the CPU, frozen and in `eval` mode.
        head_dim: size of a key or value of one head.
        changes: what LoRA adds to weights of the base model, float32 by the name of the weight.
    """

    layers: tuple[SparseAttentionLayer, ...]
    head_dim: int
    changes: dict[str, Tensor]


def open_adapter(folder: str | Path, config: PreTrainedConfig, source: str | None = None) -> ServedAdapter:
    """Open the adapter in a folder for a base model of this configuration.

    Args:
        folder: holds the adapter.
        config: of the base model.
        source: the name of the adapter in messages; by default the folder.

    Raises:
        HubError: the adapter is not complete, or damaged.
        AdapterMismatchError: it was made for another base model.
        UnsupportedModelError: the model or the adapter is of a kind that cannot be served.
    """
    adapter = AdapterFolder(folder, source)
    check_method(adapter)
    _check_kind(adapter, config)
    config = copy.deepcopy(config)
    config.architectures = [SERVED[config.model_type]]
    config._attn_implementation = None  # that of a copy of a patched model's, or one that would be fetched
    skeleton = Base(adapter.source, config, {}).skeleton(SERVED[config.model_type])
    heads = family_of(skeleton)
    modules = list(heads.modules(skeleton))
    head_dim = heads.head_dim(modules[0][1])
    check_fit(adapter, skeleton, f"of type {config.model_type}")  # attaches the adapter, without memory
    attached = [(name, module) for name, module in skeleton.named_modules() if isinstance(module, SparseAttentionLayer)]
    if len(attached) != len(modules):
        raise UnsupportedModelError(
            f"{adapter.source} leaves {len(modules) - len(attached)} of {len(modules)} attention layers dense, and a "
            "mixture of dense and sparse layers cannot be served yet: patch all layers"
        )
    with opened(adapter.path / WEIGHTS) as (_, read):
        for name, layer in attached:
            keys = {key: f"base_model.model.{name}.{key.replace(f'.{_NAME}.', '.')}" for key in layer.state_dict()}
            layer.load_state_dict({key: read(saved) for key, saved in keys.items()}, assign=True)
    changes = {}
    for name, layer in attached:
        layer.requires_grad_(False).eval()
        layer.model_switch, layer.is_managed, layer.hooks = None, None, []  # the model without weights is not kept
        layer.request_state(head_dim, torch.float32)  # an adapter that has none is refused here
        changes.update(_changes(name.rpartition(".")[0], layer))
    return ServedAdapter(tuple(layer for _, layer in attached), head_dim, changes)


def check_method(adapter: AdapterFolder) -> None:
    """Check that the method of an adapter has a state of a fixed size for each request.

    Raises:
        UnsupportedModelError: it has not.
    """
    if method_of(adapter.config).layer.request_state is SparseAttentionLayer.request_state:
        raise UnsupportedModelError(
            f"{adapter.source} is a {method_of(adapter.config).layer.label} adapter, whose state of a request grows "
            "with the text: it cannot be served from memory of a fixed size"
        )


def _check_kind(adapter: AdapterFolder, config: PreTrainedConfig) -> None:
    """Check that a model of this kind, with an adapter of this kind, can be served.

    Raises:
        UnsupportedModelError: it cannot.
    """
    if config.model_type not in SERVED:
        raise UnsupportedModelError(
            f"a model of type {config.model_type!r} cannot be served yet; supported: {', '.join(SERVED)}"
        )
    if adapter.model_class not in (None, SERVED[config.model_type]):
        raise UnsupportedModelError(
            f"{adapter.source} is for a {adapter.model_class}, and a {SERVED[config.model_type]} is served"
        )
    if adapter.config.named_modules_to_save or adapter.config.saves_embeddings:
        raise UnsupportedModelError(
            f"{adapter.source} brings modules of the base model of its own (a head or embeddings), which cannot be "
            "served: merge them into a base model first"
        )


def _changes(module: str, layer: SparseAttentionLayer) -> dict[str, Tensor]:
    """Return what LoRA adds to the weights of the linear layers of one attention module, by name."""
    if _NAME not in layer.lora:
        return {}
    low_rank: Any = layer.lora[_NAME]
    return {
        f"{module}.{name}.weight": low_rank.scale
        * (getattr(low_rank, f"{name}_B").float() @ getattr(low_rank, f"{name}_A").float())
        for name in layer.linears
    }
