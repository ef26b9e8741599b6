"""Attach SparseK to one attention module: score the new tokens, attend, keep what is worth keeping."""

import copy
import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.cache import ModelCall
from hf_sparse.core.generation import take_announcement
from hf_sparse.core.layer import AttentionShape, SparseAttentionLayer
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.methods.sparsek import rows
from hf_sparse.methods.sparsek.ahead import step_ahead
from hf_sparse.methods.sparsek.baselines import AdaptiveBaseline, Arrivals, Baseline
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.compiled import attend_compiled
from hf_sparse.methods.sparsek.compiled_step import step_compiled
from hf_sparse.methods.sparsek.config import SparseKConfig
from hf_sparse.methods.sparsek.continued import attend_more, attend_step
from hf_sparse.methods.sparsek.first_calls import steps_begun
from hf_sparse.methods.sparsek.in_blocks import attend_block_after_block
from hf_sparse.methods.sparsek.known_layer import KnownLayer, known_layer, layer_to_read
from hf_sparse.methods.sparsek.padded import attend_padded
from hf_sparse.methods.sparsek.ragged_cache import RaggedCacheLayer
from hf_sparse.methods.sparsek.reading import begin_reading, read_fast, read_in_few_launches
from hf_sparse.methods.sparsek.scorer import Scorer, make_scorer
from hf_sparse.methods.sparsek.settings import WHOLE_PROMPT
from hf_sparse.methods.sparsek.step import step_in_one_kernel
from hf_sparse.methods.sparsek.tokens import ScoredTokens, token_index
from hf_sparse.methods.sparsek.without_cache import (
    ReadyLayer,
    attend_fast_alone,
    attend_without_cache,
    ready_layer,
)

# (query [B, Hq, T, D], key [B, Hkv, T, D], scores [B, Hkv, T], scaling) of whole sequences without padding
Observer = Callable[[Tensor, Tensor, Tensor, float], None]


class SparseKAttention(SparseAttentionLayer[SparseKConfig]):
    """Attend as SparseK does, in one attention module.

    In `train` mode the gates are soft and only whole sequences are possible; in `eval` mode, and wherever a cache is
    filled without gradients, as in generation, the selection is hard.

    Attributes:
        causal: whether queries see earlier keys only. An encoder's module sees all of them, and has no cache.
        baseline: when set, its scores take the place of the scorer's; see `hf_sparse.methods.sparsek.baselines`.
        observer: when set, the module computes its dense attention and hands queries, keys and scores to the
            observer. The objective `attention` trains with it.
        row_kernels: the kernels of decoding steps in the rows of a pool, see `methods.sparsek.step`.
        row_scratch: the memory that these share, once there is one of them.
    """

    label = "SparseK"
    shape_fields = ("hidden_size", "num_key_value_heads")
    adapter_layer_names = ("sparsek_scorer", "sparsek_lora")
    cache_layer_type = SparseKCacheLayer

    # Methods that attend in the rows of a pool, see `RequestAttention`.
    request_state = rows.request_state
    attend_chunk = rows.attend_chunk
    attend_chunks = rows.attend_chunks
    attend_steps = rows.attend_steps

    @classmethod
    def for_shape(cls, shape: AttentionShape) -> "SparseKAttention":
        """Make the layer for one attention module, without adapters yet."""
        return cls(shape.hidden_size, shape.num_key_value_heads, shape.layer, shape.causal)

    @classmethod
    def check(cls, config: SparseKConfig, shape: AttentionShape, num_layers: int) -> None:
        """Raise `ValueError` unless each attention layer, or each KV head, of the model has its share of the budget."""
        if config.pin_prompt == WHOLE_PROMPT and not shape.causal:
            raise ValueError("an encoder has no prompt that could be pinned: pin_prompt=-1 is for causal models")
        shares = config.layer_shares
        if shares is not None and len(shares) != num_layers:
            raise ValueError(f"layer_shares has {len(shares)} entries, and the model has {num_layers} attention layers")
        if config.head_shares is not None:
            heads, given = shape.num_key_value_heads, [len(row) for row in config.head_shares]
            if len(given) != num_layers:
                raise ValueError(
                    f"head_shares has {len(given)} layers, and the model has {num_layers} attention layers"
                )
            if other := next((number for number in given if number != heads), None):
                raise ValueError(
                    f"head_shares has {other} shares for layer {given.index(other)}, and the model has {heads} KV "
                    "heads in each attention layer"
                )

    def __init__(self, hidden_size: int, num_key_value_heads: int, layer: int, causal: bool = True) -> None:
        super().__init__()
        self.hidden_size, self.num_key_value_heads, self.layer = hidden_size, num_key_value_heads, layer
        self.causal = causal
        self.sparsek_scorer = nn.ModuleDict()
        self.sparsek_lora = nn.ModuleDict()
        self.baseline: Baseline | None = None
        self.observer: Observer | None = None
        self.row_kernels: dict[object, Any] = {}
        self.row_scratch: Tensor | None = None
        self.known: KnownLayer | None = None  # what `known_layer` returned last

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what it makes again for itself: compiled kernels, which know addresses, and memory."""
        return vars(self) | {"row_kernels": {}, "row_scratch": None, "known": None}

    def make_parameters(self, config: SparseKConfig) -> Scorer:
        """Make a new scorer for one adapter."""
        return make_scorer(config, self.hidden_size, self.num_key_value_heads, self.causal)

    @property
    def budget(self) -> Budget:
        """Return what the active adapter gives each KV head of this layer."""
        return self.config.budget(self.layer)

    @property
    def owner(self) -> tuple[str, Baseline | None]:
        """Return whose scores are used now: the adapter in use, or a baseline at its budget."""
        return self.identities[self.active], self.baseline

    def make_cache_layer(self) -> SparseKCacheLayer:
        """Make the KV slots of this module."""
        name, baseline = self.active, self.baseline
        config = self.configs[name]
        k, window, sinks = config.budget(self.layer)
        owner, all_sparse = (self.identities[name], baseline), config.layers is None  # otherwise some are left dense
        depends_on_text = baseline is not None and baseline.depends_on_text
        kind: Any = RaggedCacheLayer if isinstance(k, tuple) else SparseKCacheLayer
        layer = kind(k, window, sinks, owner, all_sparse, depends_on_text)
        if config.pin_prompt == WHOLE_PROMPT:
            layer.pins_prompt = True
        return layer

    def static_cache_layer(self, tokens: int) -> SparseKCacheLayer:
        """Make the KV slots of this module for a `StaticCache`, see `SparseAttentionLayer`."""
        layer: Any = super().static_cache_layer(tokens)
        layer.counts_arrivals = True
        return layer

    def recording_key(self) -> Hashable | None:
        """Return what decides what is computed, see `SparseAttentionLayer`; `None` where others look on or choose."""
        if not self.uses_scorer or not self.is_used:
            return None
        name, config = self.active, self.config
        budget = config.budget(self.layer)  # once: before a prompt all layers are asked
        support = config.soft_support(budget.k)
        slope = config.slope_length  # which `finetune` may set, as it may the budget
        return name, self.identities[name], self._disable_adapters, self.training, budget, support, slope

    def cache_layer_in_call(self, call: ModelCall) -> SparseKCacheLayer:
        """Make the KV slots of this module in a call of the model that is going to fill them."""
        known = known_layer(self) if self.causal else None
        if known is None:
            layer: Any = super().cache_layer_in_call(call)
            to_read = layer_to_read(layer, None)
        else:
            layer, to_read = known.new_cache_layer(), known.to_read
            layer.call, layer.scoring = call, to_read.scoring  # with it the layer reads as those before it in the call
        layer.number_in_call = len(call.kinds)
        call.kinds.append(to_read)
        return layer

    def check_cache(self, cache: SparseKCacheLayer) -> None:
        """Refuse a cache of another adapter, and hard selection after soft gates or before them."""
        super().check_cache(cache)
        if cache.owner != self.owner:
            raise ValueError(
                "the cache holds what another adapter chose, or this one before it was loaded anew: start a new cache "
                "after switching or loading adapters"
            )
        # A compiled step goes on from one that was checked, and serves layers with any `k`.
        if not torch.compiler.is_compiling():
            k: Any = self.budget.k
            if isinstance(cache, RaggedCacheLayer) != isinstance(k, tuple) or (isinstance(k, tuple) and cache.k != k):
                raise ValueError("the cache was made for other shares of the heads: start a new cache")
        if not cache.empty and (cache.soft or (self.baseline is None and self.is_learning(cache))):
            raise ValueError(
                "decoding uses hard selection, and a training forward has soft gates: call model.eval() or use "
                "torch.no_grad() before generating, from the first token on"
            )

    def shard(self, index: int, count: int) -> "SparseKAttention":
        """Return a copy with a part of the KV heads, see `SparseAttentionLayer`.

        Raises:
            UnsupportedModelError: the heads have different numbers of slots, so that devices would not have as many.
        """
        if count == 1:
            return self
        if not isinstance(self.budget.k, int):
            raise UnsupportedModelError(
                "the KV heads of this adapter have different numbers of slots (head_shares) and cannot be divided "
                "among devices: serve it on one, or one with layer_shares"
            )
        layer = copy.deepcopy(self)
        layer.num_key_value_heads = max(1, self.num_key_value_heads // count)
        first = index * self.num_key_value_heads // count
        scorer: Any
        for scorer in layer.sparsek_scorer.values():
            scorer.keep_heads(first, layer.num_key_value_heads)
        return layer

    @property
    def prompt_edge(self) -> int:
        """Count the tokens that fit into the slots of each head, or those that can be pinned."""
        config = self.config
        budget = config.budget(self.layer)
        return budget.fewest_slots - (budget.window if config.pin_prompt == WHOLE_PROMPT else 0)

    @property
    def longest_prompt(self) -> int | None:
        """Return the tokens that can be pinned, where the whole prompt is to be; see `SparseAttentionLayer`."""
        return self.prompt_edge if self.config.pin_prompt == WHOLE_PROMPT else None

    @property
    def dense_tokens(self) -> int:
        """Count the tokens that fit into the slots of each head, see `SparseAttentionLayer`."""
        return self.budget.fewest_slots if self.baseline is None else 0

    @property
    def uses_scorer(self) -> bool:
        """Tell whether the scorer chooses the keys, with no observer: the case that has paths of its own for speed."""
        return self.baseline is None and self.observer is None

    @property
    def steps_are_alike(self) -> bool:
        """Tell whether steps are those of `step_compiled`."""
        return self.uses_scorer

    def score(self, hidden_states: Tensor, index: Tensor) -> Tensor:
        """Return the scorer's frozen scores `[B, Hkv, T]` float32 of tokens that stand at `index` of their rows.

        Args:
            hidden_states: `[B, T, C]`.
            index: `[B, T]` int64.
        """
        return self.sparsek_scorer[self.active](hidden_states, index)

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
        """Score the new tokens, attend, and keep what is worth keeping; see `SparseAttentionLayer`."""
        new = NewTokens(query, key, value, hidden_states, valid, scaling)
        output: Tensor | None
        if cache is None:
            output = attend_without_cache(self, new)
            return self._attend(new, cache) if output is None else output
        if not isinstance(cache, SparseKCacheLayer):
            return self._attend(new, cache)
        if query.shape[2] == 1:
            for step in (step_in_one_kernel, step_ahead, step_compiled):  # on a GPU, on the CPU, in compiled code
                output = step(self, new, cache)
                if output is not None:
                    return output
        if not cache.empty or self.config.pin_prompt != WHOLE_PROMPT:
            return self._attend(new, cache)
        self._check_prompt(query.shape[2], valid)
        output = self._attend(new, cache)
        cache.pin()
        return output

    def attend_fast(
        self, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor, cache: Any, call: Any, scaling: float
    ) -> Tensor | None:
        """Attend by launches that are known, see `SparseAttentionLayer`."""
        if cache is None:
            return attend_fast_alone(query, key, value, hidden_states, call.ready.get(self), call, scaling)
        if call.shared is None:
            new = NewTokens(query, key, value, hidden_states, None, scaling)
            if not begin_reading(self, new, cache):
                return None
        return read_fast(query, key, value, hidden_states, cache, scaling)

    def prepare(self, length: int) -> ReadyLayer | None:
        """Return what texts are attended to with of which nothing is kept, see `SparseAttentionLayer`."""
        return ready_layer(self, length)

    def _check_prompt(self, length: int, valid: Tensor | None) -> None:
        """Raise `ValueError` if a prompt of `length` tokens does not fit into sinks and selected keys of each head."""
        most = self.budget.fewest_slots - self.budget.window
        if length > most and valid is not None:
            length = int(valid.sum(-1).max())
        if length > most:
            raise ValueError(
                f"pin_prompt keeps the whole prompt, and the {most} slots of a KV head for sinks and selected keys "
                f"(sinks + k) cannot hold its {length} tokens: give a larger budget, or a number of first tokens"
            )

    def _attend(self, new: NewTokens, cache: Any) -> Tensor:
        """Attend as `attend`, where no step is quicker, and keep no prompt beyond its scores."""
        query, key, value, hidden_states, valid, scaling = new
        length = query.shape[2]
        if isinstance(cache, SparseKCacheLayer) and not cache.is_initialized:
            generation = None if torch.compiler.is_compiling() else take_announcement(self)
            if generation is None:
                output = read_in_few_launches(self, new, cache)
            else:
                with steps_begun(generation, new):
                    output = read_in_few_launches(self, new, cache, generation)
            if output is not None:
                return output
            cache.begin_text(key, value)
        if cache is not None:
            self.check_cache(cache)
        seen = None if cache is None or cache.empty else cache.seen
        index = token_index(valid, seen, len(query), length, query.device)
        if self.baseline is None:
            scores = self.score(hidden_states, index)
        else:
            scores = self._scores_of_baseline(self.baseline, new, index, cache)
        tokens = ScoredTokens(query, key, value, scores, index, valid, scaling)
        if self.observer is not None:
            return self._attend_observed(tokens, self.observer)
        is_first = cache is None or cache.empty
        if isinstance(self.baseline, AdaptiveBaseline) and (is_first or length > 1):
            return attend_block_after_block(tokens, cache, self.baseline, self._budget_in_use)
        if is_first:
            return self._attend_first(tokens, cache)
        attend_on = attend_step if length == 1 else attend_more
        return attend_on(tokens, cache, self.baseline, self._budget_in_use)

    def _scores_of_baseline(
        self,
        baseline: Baseline,
        new: NewTokens,
        index: Tensor,
        cache: SparseKCacheLayer | None,
    ) -> Tensor:
        """Return the scores `[B, Hkv, T]` that a baseline gives to new tokens.

        Raises:
            ValueError: it cannot choose in an encoder.
        """
        if not self.causal and not baseline.bidirectional:
            raise ValueError(
                f"{type(baseline).__name__} selects keys as a text grows, and a bidirectional attention module sees "
                "all at once: the baselines of encoders are recency (a window) and random"
            )
        budget = self.budget
        least = budget.k if isinstance(budget.k, int) else min(budget.k)
        places = budget.sinks + least, budget.window
        return baseline(Arrivals(new.query, new.key, index, new.valid, new.scaling, *places, self.layer, cache))

    @property
    def _budget_in_use(self) -> Budget:
        """Return how the budget of the layer is spent now, by the scorer or a baseline."""
        return self.budget if self.baseline is None else self.baseline.budget(self.budget, self.causal)

    def _attend_observed(self, tokens: ScoredTokens, observer: Observer) -> Tensor:
        """Attend to all keys, for an observer that gets queries, keys and scores."""
        observer(tokens.query, tokens.key, tokens.scores, tokens.scaling)
        return _attend_whole_text(tokens, Budget(k=max(1, tokens.length), window=1, sinks=0), causal=self.causal)

    def _attend_first(self, tokens: ScoredTokens, cache: SparseKCacheLayer | None) -> Tensor:
        """Attend to the tokens of a text from its beginning on, and fill the cache with them if there is one."""
        budget = self._budget_in_use
        is_soft = self.baseline is None and self.is_learning(cache)
        if is_soft:
            support = self.config.soft_support(budget.k)
            output = _attend_whole_text(tokens, budget, causal=self.causal, gates="soft", support=support)
        else:
            output = _attend_whole_text(tokens, budget, causal=self.causal)
        if self.baseline is None and self._may_learn() and not torch.compiler.is_compiling():
            if not is_soft and self.active in self.last_for:
                output = _Unlearned.apply(output, tokens.scores)
            elif is_soft and tokens.length <= budget.fewest_slots:
                _warn_of_short_text(budget.fewest_slots)
        if cache is not None:
            cache.soft = is_soft
            if tokens.valid is None:
                cache.fill_whole(tokens.key, tokens.value, tokens.scores)
            else:
                positions = tokens.positions[:, None].expand_as(tokens.scores)
                cache.fill(tokens.key, tokens.value, tokens.scores, positions, tokens.valid.sum(-1))
        return output

    def _may_learn(self) -> bool:
        """Tell whether a backward could follow, and the scorers are not frozen."""
        scorer = self.sparsek_scorer[self.active]
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in scorer.parameters())


class _Unlearned(torch.autograd.Function):
    """Return the output of a hard selection as it is; a backward says what does not learn from it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, scores: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        reason = (
            "the scorers are trainable and get no gradient: the selection of a model in eval mode is hard; call "
            "model.train() before the forward"
        )
        if not ctx.needs_input_grad[0]:
            raise ValueError(reason)
        warnings.warn(f"{reason}, or freeze them to train something else", stacklevel=1)
        return gradient, None


@functools.cache
def _warn_of_short_text(slots: int) -> None:
    """Warn of a training text in which every key is kept."""
    warnings.warn(
        f"a training text fits into the {slots} KV slots (k + window + sinks), where every key is kept: the scorers "
        "learn nothing from it; train on longer texts, or with a smaller budget",
        stacklevel=1,
    )


def _attend_whole_text(tokens: ScoredTokens, budget: Budget, **options: Any) -> Tensor:
    """Attend within texts that begin with these tokens; `options` are those of `sparsek_attention`."""
    tensors = tokens.query, tokens.key, tokens.value, tokens.scores
    settings = budget._asdict() | options
    if torch.compiler.is_compiling() and not torch.is_autocast_enabled(tokens.query.device.type):
        return attend_compiled(*tensors, tokens.valid, scaling=tokens.scaling, **settings)
    return attend_padded(*tensors, tokens.valid, tokens.valid, scaling=tokens.scaling, **settings)
