"""Describe every sparse attention method to the table: one entry each, beside the families of `tests/families.py`.

A method promises all that the tests of this folder say. What it refuses stands in its entry with the message, and where
its definition decides what "dense" or "near" means, the entry has the function that says so.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.core.registry import Method, registered_methods
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.methods.sparsek.baselines import BASELINES
from hf_sparse.ops.entmax import entmax
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.base import family_of

Settings = dict[str, Any]


class Refusal(NamedTuple):
    """Name the error that something must end with, and a regular expression of its message."""

    error: type[Exception] | tuple[type[Exception], ...]
    match: str


@dataclass(frozen=True)
class TinyMethod:
    """Describe a method and the adapters of it that the tests attach. Texts have up to 71 tokens.

    Attributes:
        name: its name in the registry.
        variety: what the table calls these adapters of it, where the method has another entry.
        of_model: returns the settings that depend on the model.
        settings: far fewer keys than tokens, so that every layer must choose and every choice can be wrong.
        fits: tokens of a text that `settings` attend to whole.
        fitting: returns what to change for texts of up to so many tokens to be attended to whole, and longer ones not.
        whole: changes with each of which all keys of any text count.
        second: a change after which the same parameters choose other keys.
        variants: changes that compute the choice in another way.
        dense: makes, of a subject, what a model with `whole` must equal: by definition, without the method's own code.
        near: makes, of a subject, a model in which no query of a sparse layer sees a key 12 or more tokens away.
        scores: returns where a layer computes what it chooses by: an object and the name of its method. It must do so
            in float32 whatever the model's dtype is.
        randomise: fills one learned tensor of a layer, given its name and a generator.
        trained: the last names of the parameters that training with the model's own loss reaches; `None` is all.
        refusals: what it cannot do, by what is asked of it.
    """

    name: str
    settings: Settings
    fits: int
    fitting: Callable[[int], Settings]
    whole: tuple[Settings, ...]
    second: Settings
    variants: tuple[Settings, ...]
    dense: Callable[[Any], PreTrainedModel]
    near: Callable[[Any], PreTrainedModel]
    scores: Callable[[Any], tuple[Any, str]]
    randomise: Callable[[str, Tensor, torch.Generator], object]
    variety: str = ""
    of_model: Callable[[PreTrainedModel], Settings] = lambda model: {}
    trained: frozenset[str] | None = None
    refusals: Mapping[str, Refusal] = field(default_factory=dict)

    @property
    def registered(self) -> Method:
        """Return its entry in the registry."""
        return next(method for method in registered_methods().values() if method.name == self.name)

    def config(self, model: PreTrainedModel, **changes: Any) -> Any:
        """Make a configuration for a model: `settings`, changed."""
        return self.registered.config(**{**self.settings, **self.of_model(model), **changes})

    def learned(self, layer: Any) -> nn.ModuleDict:
        """Return what a layer learns, by adapter."""
        container = layer.adapter_layer_names[0]
        assert container.startswith(self.registered.prefix)
        return getattr(layer, container)


# SparseK: k keys by a learned score, the nearest ones, and sinks; all others are evicted for good.

_EVICTED = "evicted for good, so it cannot be cropped"
# Ours, or from transformers 5.24 on its own: it asks the cache after the prompt.
_NOT_CROPPABLE = Refusal((RuntimeError, ValueError), f"{_EVICTED}|requires a cache that can be cropped")


def _only_recent(subject: Any) -> PreTrainedModel:
    model = subject.fresh(sinks=0)
    for layer in sparse_layers(model):
        layer.baseline = BASELINES["recency"]
    return model


SPARSEK = TinyMethod(
    name="sparsek",
    settings={"k": 5, "window": 6, "sinks": 2},
    fits=13,
    fitting=lambda length: {"k": length - 8},
    whole=({"k": 150},),
    second={"k": 6},
    variants=({"scorer": "mlp", "position_slope": 0.02}, {"position_slope": 0.2, "slope_length": 9}),
    dense=lambda subject: subject.base,
    near=_only_recent,
    scores=lambda layer: (layer, "score"),
    randomise=lambda name, tensor, generator: tensor.normal_(std=0.3, generator=generator),
    refusals={
        "crop": Refusal(RuntimeError, _EVICTED),
        "assisted": _NOT_CROPPABLE,
        "lookup": _NOT_CROPPABLE,
        "static cache of some layers": Refusal(ValueError, "static cache needs every full-attention layer"),
    },
)


def _head_shares(model: PreTrainedModel) -> Settings:
    """Give every other KV head of a model three times as many keys as the ones between."""
    family = family_of(model)
    heads = [family.num_key_value_heads(module) for _, module in family.modules(model)]
    shares = cycle((0.5, 1.5))
    return {"head_shares": [[next(shares) for _ in range(number)] for number in heads]}


SPARSEK_BY_HEADS = replace(
    SPARSEK,
    variety="sparsek by heads",
    of_model=_head_shares,
    settings={"k": 4, "window": 6, "sinks": 3},  # 2 or 6 keys
    fits=11,
    fitting=lambda length: {"k": 2 * (length - 9)},
    whole=({"k": 300},),
)


# Sparsefinder: entmax over a predicted graph of tiles; all keys are kept. Its dense limit is entmax over all keys.


def _full_entmax(
    layer: SparsefinderAttention, query: Tensor, key: Tensor, value: Tensor, *, valid: Any, scaling: float, **_: Any
) -> Tensor:
    """Attend by the definition: the reference operator on all logits, in float64."""
    learned, new, total = layer.parameters_in_use, query.shape[2], key.shape[2]
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    logits = query.double() @ key.double().transpose(-1, -2) * scaling * learned.scale.double()[:, None, None]
    edges = torch.ones(1, 1, new, total, dtype=torch.bool)
    if layer.causal:
        edges = edges.tril(total - new)
    if valid is not None:
        own = torch.eye(total, dtype=torch.bool)[total - new :]  # padding attends to itself, so that it is finite
        edges = edges & valid[:, None, None] | own
    return (entmax(logits.masked_fill(~edges, -torch.inf), learned.alpha) @ value.double()).to(value.dtype)


def _entmax_model(subject: Any) -> PreTrainedModel:
    model = subject.fresh(predictor="full")
    for layer in sparse_layers(model):
        layer.attend = partial(_full_entmax, layer)
    return model


def _randomise_sparsefinder(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if name == "log_scale":  # about the scale that trained heads have; sharper logits amplify rounding
        return tensor.normal_(-1.0, 0.3, generator=generator)
    if name == "profile":  # a share of attention at each distance
        return tensor.uniform_(0.1, 1.0, generator=generator)
    if name == "boundaries":  # in order
        return tensor.copy_(torch.randn(tensor.shape, generator=generator).sort(-1).values)
    return tensor.normal_(std=1.0 if name == "centroids" else 0.3, generator=generator)


SPARSEFINDER = TinyMethod(
    name="sparsefinder",
    # Of the three tiles of a list only the query's own is given: the other two are predicted.
    settings={
        "tile": 8,
        "tiles_per_query": 3,
        "window": 1,
        "global_tokens": 0,
        "clusters": 6,
        "bins": 5,
    },
    fits=24,
    fitting=lambda length: {"tiles_per_query": math.ceil(length / 8)},
    whole=({"predictor": "full"}, {"complete": True}, {"predictor": "bound"}),
    second={"predictor": "distance"},
    variants=(
        {"query_tile": 1, "per_group": True},
        {"predictor": "quantization", "shared_projection": True, "learn_alpha": True},
        {"predictor": "distance", "tile": None},
    ),
    dense=_entmax_model,
    near=lambda subject: subject.fresh(tiles_per_query=1),
    scores=lambda layer: (layer.parameters_in_use, "project_keys"),
    randomise=_randomise_sparsefinder,
    # The projections decide the graph, which has no gradient; they learn from a loss of their own (graph_loss.py).
    trained=frozenset({"log_scale"}),
    refusals={
        "static cache": Refusal(ValueError, "static cache of predicted graphs takes texts without padding"),
    },
)

METHODS: dict[str, TinyMethod] = {
    method.variety or method.name: method for method in (SPARSEK, SPARSEK_BY_HEADS, SPARSEFINDER)
}
