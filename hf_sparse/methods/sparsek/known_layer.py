"""Keep what follows from the settings and the scorer of a layer, until one of these changes.

A forward asks every layer for it, and on short texts the host sets the pace.
"""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.scorer import LinearScorer

if TYPE_CHECKING:
    from hf_sparse.methods.sparsek.attention import SparseKAttention


class Scoring(NamedTuple):
    """Hold what a linear scorer computes with.

    Attributes:
        weight, slope: its parameters.
        slopes: of the configuration, see `Scorer.slopes`.
        addresses: of weight and slope, 0 for none.
        layout: what launches depend on of them; `None` if an address is no multiple of 16 bytes.
    """

    weight: Tensor
    slope: Tensor | None
    slopes: Any
    addresses: tuple[int, int]
    layout: Hashable | None


class LayerToRead(NamedTuple):
    """Hold what a layer of a call of a model may differ in from the others that read the same text.

    Attributes:
        budget: of the layer.
        counts: slots of each KV head where they differ; `None` where they do not.
        scoring: what its scorer computes with; `None` where it cannot read as those before it.
    """

    budget: Budget
    counts: tuple[int, ...] | None
    scoring: Scoring | None


class KnownLayer(NamedTuple):
    """Hold what follows from the settings and the scorer of a layer.

    Attributes:
        source: what it follows from.
        scoring: what the scorer computes with; `None` if its scores are not linear, or it is not on a GPU.
        to_read: the layer in a call of the model that fills a cache.
        cache_type, attributes: class and attributes of its new cache layers.
    """

    source: tuple[Any, ...]
    scoring: Scoring | None
    to_read: LayerToRead
    cache_type: type[SparseKCacheLayer]
    attributes: dict[str, Any]

    def new_cache_layer(self) -> Any:
        """Make what `SparseKAttention.cache_layer` makes."""
        layer: Any = self.cache_type.__new__(self.cache_type)
        vars(layer).update(self.attributes)
        return layer


def known_layer(attention: "SparseKAttention") -> KnownLayer | None:
    """Return what is known of a layer in causal order; `None` where no scorer chooses, or others look on.

    Raises:
        ValueError: the attention is bidirectional, so that there is no cache layer.
    """
    if not attention.uses_scorer:
        return None
    name = attention.active
    config = attention.configs[name]
    scorers: Any = attention._modules["sparsek_scorer"]  # not by `nn.Module.__getattr__`, which is slow
    parameters = scorers._modules[name]._parameters
    weight, slope = parameters.get("weight"), parameters.get("slope")
    is_on_gpu = weight is not None and weight.is_cuda
    source = (
        attention.identities[name], config.k, config.window, config.sinks, config.pin_prompt, config.layer_shares,
        config.head_shares, config.layers, config.position_slope, config.slope_length, id(weight), id(slope),
        *((weight.data_ptr(), weight.dtype, 0 if slope is None else slope.data_ptr()) if is_on_gpu else ()),
    )  # fmt: skip
    known = attention.known
    if known is None or known.source != source:
        cache: Any = attention.cache_layer()
        scoring = scoring_of(scorers._modules[name])
        to_read = layer_to_read(cache, None if cache.pins_prompt else scoring)
        known = attention.known = KnownLayer(source, scoring, to_read, type(cache), dict(vars(cache)))
    return known


def known_scoring(attention: "SparseKAttention") -> Scoring | None:
    """Return what the scorer in use computes with, see `known_layer`; `None` where launches cannot score by it."""
    known = known_layer(attention)
    return None if known is None else known.scoring


def scoring_of(scorer: Any) -> Scoring | None:
    """Return what a scorer computes with; `None` if its scores are not linear, or it is not on a GPU."""
    weight, slope = scorer._parameters.get("weight"), scorer._parameters.get("slope")
    if weight is None or not isinstance(scorer, LinearScorer) or not weight.is_cuda:
        return None
    if not {type(weight), type(slope)} <= {Tensor, nn.Parameter, type(None)}:  # a part of one on several devices
        return None
    addresses = weight.data_ptr(), 0 if slope is None else slope.data_ptr()
    of_slope = None if slope is None else (slope.dtype, slope.device)
    layout = (weight.shape, weight.stride(), weight.dtype, weight.device, of_slope, scorer.slopes)
    is_aligned = (addresses[0] | addresses[1]) % 16 == 0
    return Scoring(weight, slope, scorer.slopes, addresses, layout if is_aligned else None)


def layer_to_read(cache: SparseKCacheLayer, scoring: Scoring | None) -> LayerToRead:
    """Return what the layer may differ in that a cache layer, which holds nothing yet, belongs to."""
    return LayerToRead(Budget(cache.k, cache.window, cache.sinks), cache.counts, scoring)
