"""Sparsefinder attached to one attention module: code the new tokens, predict their graph, attend over it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from hf_sparse.methods.base import NO_CACHE, Site, SparseMethod
from hf_sparse.methods.sparsefinder.cache import SparsefinderCacheLayer
from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.parameters import SparsefinderParameters
from hf_sparse.methods.sparsefinder.predictors import key_codes, predicted_graph, query_codes
from hf_sparse.ops.entmax import Certificate, bound_tiles, entmax_attention
from hf_sparse.ops.graphs import Tiles


@dataclass(frozen=True)
class Text:
    """What entmax attention is computed from: texts of equal lengths, without padding.

    Attributes:
        query: `[B, Hq, Tq, D]`, the last tokens.
        key, value: `[B, Hkv, Tk, D]`.
        alpha: of entmax, a number or `[Hq]`.
        scaling: of the logits, `[Hq]`, the learned scale included.
        causal: whether queries see earlier keys only.
        layer: number of the attention module.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: float | Tensor
    scaling: Tensor
    causal: bool
    layer: int


# A graph in place of the predicted one: tiles, or edges `[B, Hq, Tq, Tk]` bool, or None for all keys.
Pattern = Callable[[Text], Tiles | Tensor | None]
# Gets each text, the graph that was attended over (None for all keys), and with tiles that were certified their proof.
Observer = Callable[[Text, Tiles | Tensor | None, Certificate | None], None]


class SparsefinderAttention(SparseMethod):
    """Sparsefinder for one attention module.

    In `train` mode attention is entmax over all keys, which is what the logit scales are trained with; in `eval` mode,
    and wherever a cache is filled without gradients, as in generation, over the predicted graph. Rows with padding are
    attended one by one, so that padding moves no tile.

    Attributes:
        pattern: a graph of the analysis in place of the predicted one, see `Pattern`; also in `train` mode.
        certify: have each row over tiles certified, for the observer.
        observer: when set, it is called after each attention, see `Observer`.
    """

    label = "Sparsefinder"
    fits = ("num_attention_heads", "num_key_value_heads", "head_dim")
    adapter_layer_names = ("sparsefinder_parameters", "sparsefinder_lora")
    cache_layer_type = SparsefinderCacheLayer
    has_slots = False

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site, self.layer, self.causal = site, site.layer, site.causal
        self.sparsefinder_parameters = nn.ModuleDict()
        self.sparsefinder_lora = nn.ModuleDict()
        self.pattern: Pattern | None = None
        self.certify = False
        self.observer: Observer | None = None

    @classmethod
    def at(cls, site: Site) -> "SparsefinderAttention":
        return cls(site)

    @classmethod
    def check(cls, config: SparsefinderConfig, site: Site) -> None:
        if config.rank > site.head_dim:
            raise ValueError(
                f"SparsefinderConfig.rank must be at most the size of a head, {site.head_dim}, got {config.rank}"
            )
        if site.causal and config.needs_whole_text:
            raise ValueError(
                "fixed bins and balanced clusters rank the tokens of a whole text, which a causal model has not seen: "
                "use bin_kind='shared' and balanced=False"
            )

    def make_parameters(self, config: SparsefinderConfig) -> SparsefinderParameters:
        return SparsefinderParameters(config, self.site)

    @property
    def config(self) -> SparsefinderConfig:
        """Configuration of the active adapter."""
        return self.configs[self.active]

    @property
    def parameters_in_use(self) -> SparsefinderParameters:
        """Parameters of the active adapter."""
        learned = self.sparsefinder_parameters[self.active]
        assert isinstance(learned, SparsefinderParameters)
        return learned

    def cache_layer(self) -> SparsefinderCacheLayer:
        if not self.causal:
            raise ValueError(NO_CACHE)
        return SparsefinderCacheLayer()

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden_states: Tensor,
        valid: Tensor | None,
        cache: CacheLayerMixin | None,
        scaling: float,
    ) -> Tensor:
        if cache is not None and not self.causal:
            raise ValueError(NO_CACHE)
        if cache is not None and not isinstance(cache, SparsefinderCacheLayer):
            raise TypeError(f"Sparsefinder needs its own cache layer, got {type(cache).__name__}")
        keys = key.shape[2]
        if valid is not None and valid.shape[1] != keys:
            raise ValueError(f"the attention mask must cover all {keys} keys, got {valid.shape[1]} columns")
        if valid is not None and bool(valid.all()):
            valid = None
        learned = self.parameters_in_use
        options: dict[str, Any] = {"alpha": learned.alpha, "scaling": scaling * learned.scale, "causal": self.causal}
        learning = self.is_learning(cache) or (self.training and self.observer is not None)  # finetune observes texts
        codes, sees_all = None, learning or self.config.predictor == "full"
        if self.pattern is None and self.config.learns_graph and not learning:
            codes = self._codes(query, key, cache)
        elif valid is not None and self.pattern is None and self.observer is None and sees_all:
            return entmax_attention(query, key, value, valid=valid, **options)
        if valid is None:
            return self._over_graph(Text(query, key, value, **options, layer=self.layer), codes, sees_all)
        output = torch.zeros_like(query)
        for row, real in enumerate(valid):
            new = real[keys - query.shape[2] :]
            if new.any():
                tensors = (query[row, None, :, new], key[row, None, :, real], value[row, None, :, real])
                of_row = None if codes is None else (codes[0][row, None, :, real], codes[1][row, None, :, real])
                found = self._over_graph(Text(*tensors, **options, layer=self.layer), of_row, sees_all)
                output[row, :, new] = found[0].to(output.dtype)
        return output

    def _codes(self, query: Tensor, key: Tensor, cache: SparsefinderCacheLayer | None) -> tuple[Tensor, Tensor]:
        """Codes of all tokens; the cache has those of the earlier ones."""
        learned, new = self.parameters_in_use, query.shape[2]
        if cache is None or cache.key_codes is None:
            learned.check_fitted()
        with torch.no_grad():
            codes = query_codes(learned, query), key_codes(learned, key[:, :, key.shape[2] - new :])
        return codes if cache is None else cache.append(*codes, self.identities[self.active])

    def _over_graph(self, text: Text, codes: tuple[Tensor, Tensor] | None, sees_all: bool) -> Tensor:
        config = self.config
        graph: Tiles | Tensor | None = None
        if self.pattern is not None:
            graph = self.pattern(text)
        elif codes is not None:
            queries = text.query.shape[2]
            graph = predicted_graph(self.parameters_in_use, *codes, queries=queries, causal=text.causal)
        elif not sees_all:
            assert config.tile is not None
            graph = bound_tiles(
                text.query,
                text.key,
                size=config.tile,
                rows=config.rows,
                alpha=text.alpha,
                scaling=text.scaling,
                causal=text.causal,
                window=max(1, config.window),
                global_tokens=config.global_tokens,
                grouped=config.per_group,
            )
        tensors = text.query, text.key, text.value
        options: dict[str, Any] = {"alpha": text.alpha, "scaling": text.scaling, "causal": text.causal}
        certificate = None
        if isinstance(graph, Tiles):
            complete = config.complete and self.pattern is None
            if complete or self.certify:
                output, certificate = entmax_attention(
                    *tensors, tiles=graph, certify=self.certify, complete=complete, **options
                )
            else:
                output = entmax_attention(*tensors, tiles=graph, **options)
        else:
            output = entmax_attention(*tensors, edges=graph, **options)
        if self.observer is not None:
            self.observer(text, graph, certificate)
        return output
