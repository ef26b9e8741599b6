"""Attach Sparsefinder to one attention module: code the new tokens, predict their graph, attend over it."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from hf_sparse.core.layer import AttentionShape, SparseAttentionLayer
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsefinder.cache import SparsefinderCacheLayer
from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.padding import PackedBatch
from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters
from hf_sparse.methods.sparsefinder.predictors import ProjectedPredictor, predictor_of
from hf_sparse.methods.sparsefinder.predictors.base import AttentionInputs as AttentionInputs
from hf_sparse.methods.sparsefinder.predictors.base import Codes
from hf_sparse.methods.sparsefinder.static_cache import StaticSparsefinderCacheLayer
from hf_sparse.methods.sparsefinder.step import take_step
from hf_sparse.methods.sparsefinder.ways import Way, is_learning, is_unfitted, way_of
from hf_sparse.ops.entmax import Certificate, certified_entmax_attention, entmax_attention
from hf_sparse.ops.entmax.step import Scales, attend_few
from hf_sparse.ops.tiles import Tiles

# A graph in place of the predicted one: tiles, or edges `[B, Hq, Tq, Tk]` bool, or None for all keys.
Pattern = Callable[[AttentionInputs], Tiles | Tensor | None]
# Gets each text, the graph that was attended over (None for all keys), and with tiles that were certified their proof.
Observer = Callable[[AttentionInputs, Tiles | Tensor | None, Certificate | None], None]
# Attends in texts without padding, with the codes of all their tokens if they have any.
Attend = Callable[[AttentionInputs, Codes | None], Tensor]

# What decides of a configuration which keys a prompt attends to that can be recorded, and how.
_settings_of_prompts = attrgetter(
    "alpha", "entmax_native", "complete", "tile", "query_tile", "window", "global_tokens", "per_group", "pool",
    "exact_up_to", "choices",
)  # fmt: skip


class SparsefinderAttention(SparseAttentionLayer[SparsefinderConfig]):
    """Attend as Sparsefinder does, in one attention module.

    In `train` mode attention is entmax over all keys, which is what the logit scales are trained with; in `eval` mode,
    and wherever a cache is filled without gradients, as in generation, over the predicted graph. In a checkpoint that
    was trained with entmax (`entmax_native`) it is over all keys until the predictor is fitted. Rows with padding are
    packed first, so that padding moves no tile; a `pattern` or an `observer`, which read whole texts, get them one by
    one.

    Attributes:
        pattern: a graph of the analysis in place of the predicted one, see `Pattern`; also in `train` mode.
        certify: have each row over tiles certified, for the observer.
        observer: when set, it is called after each attention, see `Observer`.
    """

    label = "Sparsefinder"
    shape_fields = ("num_attention_heads", "num_key_value_heads", "head_dim")
    unfitted = ("centroids", "boundaries", "profile", "budgets")
    adapter_layer_names = ("sparsefinder_parameters", "sparsefinder_lora")
    cache_layer_type = SparsefinderCacheLayer
    static_cache_layer_type = StaticSparsefinderCacheLayer

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape, self.layer, self.causal = shape, shape.layer, shape.causal
        self.sparsefinder_parameters = nn.ModuleDict()
        self.sparsefinder_lora = nn.ModuleDict()
        self.pattern: Pattern | None = None
        self.certify = False
        self.observer: Observer | None = None

    @classmethod
    def for_shape(cls, shape: AttentionShape) -> "SparsefinderAttention":
        """Make the layer for one attention module, without adapters yet."""
        return cls(shape)

    @classmethod
    def check(cls, config: SparsefinderConfig, shape: AttentionShape, num_layers: int) -> None:
        """Raise `ValueError` for a rank above the size of a head, or a predictor that a causal model cannot have."""
        if config.rank > shape.head_dim:
            raise ValueError(
                f"SparsefinderConfig.rank must be at most the size of a head, {shape.head_dim}, got {config.rank}"
            )
        if shape.causal and predictor_of(config).needs_whole_text:
            raise ValueError(
                "fixed bins and balanced clusters rank the tokens of a whole text, which a causal model has not seen: "
                "use bin_kind='shared' and balanced=False"
            )

    def make_parameters(self, config: SparsefinderConfig) -> SparsefinderParameters:
        """Make new learned parameters of one adapter."""
        return SparsefinderParameters(config, self.shape)

    @property
    def parameters_in_use(self) -> SparsefinderParameters:
        """Return the parameters of the active adapter."""
        learned = self._modules["sparsefinder_parameters"]._modules[self.active]  # type: ignore[union-attr] # in each step
        assert isinstance(learned, SparsefinderParameters)
        return learned

    @property
    def prompt_edge(self) -> int | None:
        """Count the tokens up to which all keys are attended to, see `SparseAttentionLayer`.

        Returns:
            0 where longer texts attend to all keys too; `None` with a learned graph or a learned alpha, and where the
            graph is looked at or certified.
        """
        if not self.causal or not self.is_used or self.certify or self.is_observed:
            return None
        predictor, config = self.parameters_in_use.predictor, self.config
        if config.learn_alpha or (config.entmax_native is not None and predictor.learns_graph):
            return None  # the host looks at alpha, and whether the predictor is fitted
        return 0 if config.complete else predictor.prompt_edge

    def recording_key(self) -> Hashable | None:
        """Return what decides what is computed, see `SparseAttentionLayer`; `None` in training too."""
        if self.training or self.prompt_edge is None:
            return None
        predictor = self.parameters_in_use.predictor
        settings = _settings_of_prompts(self.config), _settings_of_prompts(predictor.config)
        return self.active, self.identities[self.active], self.disable_adapters, type(predictor), *settings

    def make_cache_layer(self) -> SparsefinderCacheLayer:
        """Make a cache layer for all keys, values and codes."""
        return SparsefinderCacheLayer()

    def dense_cache_layer(self, layer: DynamicLayer) -> SparsefinderCacheLayer:
        """Return a layer that grows in place as those of the patched layers do, so that steps can be recorded."""
        growing = self.make_cache_layer()
        vars(growing).update(vars(layer), is_dense=True)
        return growing

    def static_cache_layer(self, tokens: int) -> StaticSparsefinderCacheLayer:
        """Make a cache layer of fixed size.

        Raises:
            ValueError: the attention is bidirectional, the graph joins single tokens, or other layers attend densely.
        """
        if not self.causal:
            super().static_cache_layer(tokens)
        if self.config.tile is None and self.parameters_in_use.predictor.learns_graph:
            raise ValueError(
                "a static cache takes graphs of tiles, and this one joins single tokens (`tile=None`): use the "
                "ordinary cache"
            )
        if self.config.layers is not None:
            raise ValueError(
                "a static cache needs every full-attention layer patched, and the adapter names some only (`layers`): "
                "use the ordinary cache"
            )
        return StaticSparsefinderCacheLayer(tokens)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden_states: Tensor,
        valid: Tensor | None,
        cache: Any,
        scaling: float,
    ) -> Tensor:
        """Attend by the way that `way_of` decides; see `SparseAttentionLayer`."""
        new = NewTokens(query, key, value, hidden_states, valid, scaling)
        if cache is not None:
            self.check_cache(cache)
        place = cache.place if cache is not None and query.shape[2] == 1 else None
        way = way_of(self, new, cache, place)
        if isinstance(cache, SparsefinderCacheLayer):
            output = take_step(self, way, new, cache) if query.shape[2] == 1 else None
            if output is not None:
                return output
            cache.write_newest()
        valid, learned = _padding(valid, key), self.parameters_in_use
        if way is Way.FEW_OVER_ALL_KEYS:
            scales = learned.step_scales(query, scaling)
            return attend_few(query, key, value, scales, causal=True, valid=valid, first_query=place)
        options: dict[str, Any] = {"alpha": learned.alpha, "scaling": scaling * learned.scale, "causal": self.causal}
        first_query = None if place is None else place.expand(len(query))
        if way is Way.ALL_KEYS:
            return entmax_attention(query, key, value, valid=valid, first_query=first_query, **options)
        call = getattr(cache, "call", None)
        end = None if call is None else call.end
        text = AttentionInputs(query, key, value, **options, layer=self.layer, first_query=first_query, end=end)
        return self._in_texts(way, text, cache, valid, place)

    @property
    def is_observed(self) -> bool:
        """Tell whether a pattern or an observer is set, which read whole texts."""
        return self.pattern is not None or self.observer is not None

    def _in_texts(
        self, way: Way, text: AttentionInputs, cache: Any, valid: Tensor | None, place: Tensor | None
    ) -> Tensor:
        """Attend over listed tiles or a graph, within each text of a batch: its tiles are those without padding.

        Args:
            way: `LISTED_TILES` or `GRAPH`.
            text: all that came, padding included.
            cache: of these texts, or `None`.
            valid: `[B, Tk]` bool, False for padding.
            place: see `way_of`.

        Raises:
            RuntimeError: a step that is being recorded needs a graph.
            ValueError: a graph is to be predicted of texts with padding in a static cache.
        """
        predicts = self.pattern is None and not is_learning(self, cache) and not is_unfitted(self)
        has_codes = predicts and self.parameters_in_use.predictor.learns_graph
        in_static = isinstance(cache, StaticSparsefinderCacheLayer)
        if way is Way.GRAPH and place is not None and not in_static:
            raise RuntimeError("a step of this predictor cannot be recorded: it needs the keys of its text alone")
        if way is Way.GRAPH and in_static and has_codes and valid is not None:
            raise ValueError(
                "a static cache of predicted graphs takes texts without padding, and the attention mask has some: "
                "use the ordinary cache, or SparsefinderConfig(predictor='full')"
            )
        codes = self._codes(text.query, text.key, cache) if has_codes else None
        attend: Attend = partial(self._over_graph, predicts=predicts)
        if way is Way.LISTED_TILES:
            attend = self._over_listed_tiles
        if in_static and way is Way.LISTED_TILES:  # keys stay where they are: padding moves the tiles
            return attend(replace(text, valid=valid), codes)
        if valid is None:
            return attend(text, codes)
        if self.is_observed:
            return self._one_by_one(attend, text, codes, valid)
        return self._packed(attend, text, codes, valid, place)

    def _over_listed_tiles(self, text: AttentionInputs, codes: Codes | None) -> Tensor:
        """Attend with one causal query per text over its predicted tiles; nothing waits for the device.

        Args:
            text: `first_query` says where the queries stand, by default at the last position; `valid` moves no tile.
            codes: for all positions of the keys; there may be anything behind the queries.
        """
        learned, position = self.parameters_in_use, text.first_query
        assert isinstance(learned.predictor, ProjectedPredictor) and codes is not None and self.config.tile is not None
        if position is None:
            position = torch.full((1,), text.key.shape[2] - 1, device=text.key.device).expand(len(text.query))
        return attend_few(
            text.query,
            text.key,
            text.value,
            Scales.of(text.alpha, text.scaling, text.query),
            causal=True,
            valid=text.valid,
            first_query=position,
            index=learned.predictor.step_lists(learned, *codes, position),
            size=self.config.tile,
        )

    def _over_graph(self, text: AttentionInputs, codes: Codes | None, predicts: bool) -> Tensor:
        """Attend in texts without padding over the predicted graph, over that of `pattern`, or over all keys."""
        learned = self.parameters_in_use
        graph: Tiles | Tensor | None = None
        if self.pattern is not None:
            graph = self.pattern(text)
        elif predicts:
            graph = learned.predictor.graph(learned, text, codes)
        tensors = text.query, text.key, text.value
        options = text.settings | {"valid": text.valid, "first_query": text.first_query}
        certificate = None
        if isinstance(graph, Tiles):
            complete = self.config.complete and self.pattern is None
            if complete or self.certify:
                output, certificate = certified_entmax_attention(*tensors, graph, complete=complete, **options)
            else:
                output = entmax_attention(*tensors, tiles=graph, **options)
        else:
            output = entmax_attention(*tensors, edges=graph, **options)
        if self.observer is not None:
            self.observer(text, graph, certificate)
        return output

    def _codes(
        self, query: Tensor, key: Tensor, cache: SparsefinderCacheLayer | StaticSparsefinderCacheLayer | None
    ) -> Codes:
        """Code the new tokens and return the codes of all; the cache has those of the earlier ones."""
        learned, new = self.parameters_in_use, query.shape[2]
        predictor = learned.predictor
        assert isinstance(predictor, ProjectedPredictor)
        if cache is None or cache.key_codes is None:
            learned.check_fitted()
        new_key = key[:, :, key.shape[2] - new :]
        if cache is not None and new == 1 and cache.place is not None:
            new_key = key.index_select(2, cache.place)
        with torch.no_grad():
            codes = predictor.query_codes(learned, query), predictor.key_codes(learned, new_key)
        return codes if cache is None else cache.append(*codes, self.identities[self.active])

    def _packed(
        self, attend: Attend, text: AttentionInputs, codes: Codes | None, valid: Tensor, place: Tensor | None
    ) -> Tensor:
        """Attend in all rows of a padded batch at once; `place` as `PackedBatch` takes it."""
        batch = PackedBatch(valid, text.query.shape[2], self.config.rows or 1, place)
        packed = replace(
            text,
            query=batch.queries(text.query),
            key=batch.keys(text.key),
            value=batch.keys(text.value),
            first_query=batch.first_query,
            valid=None if self.causal else batch.valid,
        )
        if codes is not None:
            of_queries, of_keys = (batch.keys(part, 0 if part.is_floating_point() else -1) for part in codes)
            codes = of_queries, of_keys
        return batch.unpack(attend(packed, codes)).to(text.query.dtype)

    def _one_by_one(self, attend: Attend, text: AttentionInputs, codes: Codes | None, valid: Tensor) -> Tensor:
        """Attend in each row of a padded batch by itself."""
        output = torch.zeros_like(text.query)
        for row, real in enumerate(valid):
            new = real[len(real) - text.query.shape[2] :]
            if new.any():
                query, key, value = (
                    text.query[row, None, :, new],
                    text.key[row, None, :, real],
                    text.value[row, None, :, real],
                )
                of_row = None if codes is None else (codes[0][row, None, :, real], codes[1][row, None, :, real])
                attended = attend(replace(text, query=query, key=key, value=value), of_row)
                output[row, :, new] = attended[0].to(output.dtype)
        return output


def _padding(valid: Tensor | None, key: Tensor) -> Tensor | None:
    """Return the mask of padding `[B, Tk]` of keys; on the CPU `None` where it hides none, for packing copies all keys.

    Raises:
        ValueError: it has another number of columns.
    """
    if valid is None:
        return None
    if valid.shape[1] != key.shape[2]:
        raise ValueError(f"the attention mask must cover all {key.shape[2]} keys, got {valid.shape[1]} columns")
    waits = torch.compiler.is_compiling() or key.device.type != "cpu"  # to ask a GPU would wait for it
    return None if not waits and bool(valid.all()) else valid
