"""Attach SparseK to one attention module: score the new tokens, attend, keep what is worth keeping."""

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.core.cache import ModelCall
from hf_sparse.core.layer import AttentionShape, SparseAttentionLayer
from hf_sparse.methods.sparsek.ahead import step_ahead
from hf_sparse.methods.sparsek.baselines import AdaptiveBaseline, Arrivals, Baseline
from hf_sparse.methods.sparsek.baselines.blocks import attend_in_blocks
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.compiled import attend_compiled
from hf_sparse.methods.sparsek.config import SparseKConfig
from hf_sparse.methods.sparsek.padded import attend_padded
from hf_sparse.methods.sparsek.reading import Scoring, read_in_few_launches, scoring_of
from hf_sparse.methods.sparsek.scorer import Scorer, make_scorer
from hf_sparse.methods.sparsek.step import step_in_one_kernel
from hf_sparse.methods.sparsek.tokens import NewTokens, token_index
from hf_sparse.ops.selection.slots import attend_slots

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
    """

    label = "SparseK"
    shape_fields = ("hidden_size", "num_key_value_heads")
    adapter_layer_names = ("sparsek_scorer", "sparsek_lora")
    cache_layer_type = SparseKCacheLayer

    @classmethod
    def for_shape(cls, shape: AttentionShape) -> "SparseKAttention":
        """Make the layer for one attention module, without adapters yet."""
        return cls(shape.hidden_size, shape.num_key_value_heads, shape.layer, shape.causal)

    @classmethod
    def check(cls, config: SparseKConfig, shape: AttentionShape, num_layers: int) -> None:
        """Raise `ValueError` unless each attention layer of the model has its share of the budget."""
        shares = config.layer_shares
        if shares is not None and len(shares) != num_layers:
            raise ValueError(f"layer_shares has {len(shares)} entries, and the model has {num_layers} attention layers")

    def __init__(self, hidden_size: int, num_key_value_heads: int, layer: int, causal: bool = True) -> None:
        super().__init__()
        self.hidden_size, self.num_key_value_heads, self.layer = hidden_size, num_key_value_heads, layer
        self.causal = causal
        self.sparsek_scorer = nn.ModuleDict()
        self.sparsek_lora = nn.ModuleDict()
        self.baseline: Baseline | None = None
        self.observer: Observer | None = None
        self.scoring: Scoring | None = None  # of the last call that `reading` knows

    def make_parameters(self, config: SparseKConfig) -> Scorer:
        """Make a new scorer for one adapter."""
        return make_scorer(config, self.hidden_size, self.num_key_value_heads, self.causal)

    @property
    def budget(self) -> Budget:
        """Return what the active adapter gives each KV head of this layer."""
        return self.config.budget(self.layer)

    @property
    def _owner(self) -> tuple[str, Baseline | None]:
        """Return whose scores are used now: the adapter in use, or a baseline at its budget."""
        return self.identities[self.active], self.baseline

    def make_cache_layer(self) -> SparseKCacheLayer:
        """Make the KV slots of this module."""
        name, baseline = self.active, self.baseline
        config = self.configs[name]
        depends_on_text = baseline is not None and baseline.depends_on_text
        all_sparse = config.layers is None  # otherwise some layers are left dense
        owner = (self.identities[name], baseline)
        return SparseKCacheLayer(*config.budget(self.layer), owner, all_sparse, depends_on_text)

    def recording_key(self) -> Hashable | None:
        """Return what decides what is computed, see `SparseAttentionLayer`; `None` where others look on or choose."""
        if self.baseline is not None or self.observer is not None or not self.is_used:
            return None
        support = self.config.soft_support(self.budget.k)
        return self.active, self.identities[self.active], self.disable_adapters, self.training, self.budget, support

    def cache_layer_in_call(self, call: ModelCall) -> SparseKCacheLayer:
        """Make the KV slots of this module in a call of the model that is going to fill them."""
        layer: Any = super().cache_layer_in_call(call)
        layer.scoring = scoring_of(self)
        return layer

    def check_cache(self, cache: SparseKCacheLayer) -> None:
        """Refuse a cache of another adapter, and hard selection after soft gates or before them."""
        super().check_cache(cache)
        if cache.owner != self._owner:
            raise ValueError("the cache holds what another adapter chose: start a new cache after switching adapters")
        if not cache.empty and (cache.soft or (self.baseline is None and self.is_learning(cache))):
            raise ValueError(
                "decoding uses hard selection, and a training forward has soft gates: call model.eval() or use "
                "torch.no_grad() before generating, from the first token on"
            )

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
        length = query.shape[2]
        if length == 1 and isinstance(cache, SparseKCacheLayer):
            for step in (step_in_one_kernel, step_ahead):  # on a GPU, on the CPU
                output = step(self, query, key, value, hidden_states, valid, cache, scaling)
                if output is not None:
                    return output
        if isinstance(cache, SparseKCacheLayer) and not cache.is_initialized:
            output = read_in_few_launches(self, query, key, value, hidden_states, valid, cache, scaling)
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
            scores = self._scores_of_baseline(self.baseline, query, key, index, valid, scaling, cache)
        tokens = NewTokens(query, key, value, scores, index, valid, scaling)
        if self.observer is not None:
            return self._attend_observed(tokens, self.observer)
        is_first = cache is None or cache.empty
        if isinstance(self.baseline, AdaptiveBaseline) and (is_first or length > 1):
            return self._attend_in_blocks(tokens, cache, self.baseline)
        if is_first:
            return self._attend_first(tokens, cache)
        if length == 1:
            return self._attend_step(tokens, cache)
        return self._attend_more(tokens, cache, self._budget_in_use)

    def _scores_of_baseline(
        self,
        baseline: Baseline,
        query: Tensor,
        key: Tensor,
        index: Tensor,
        valid: Tensor | None,
        scaling: float,
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
        return baseline(Arrivals(query, key, index, valid, scaling, self.budget.window, self.layer, cache))

    @property
    def _budget_in_use(self) -> Budget:
        """Return how the budget of the layer is spent now, by the scorer or a baseline."""
        return self.budget if self.baseline is None else self.baseline.budget(self.budget, self.causal)

    def _attend_observed(self, tokens: NewTokens, observer: Observer) -> Tensor:
        """Attend to all keys, for an observer that gets queries, keys and scores."""
        observer(tokens.query, tokens.key, tokens.scores, tokens.scaling)
        return _attend_whole_text(tokens, Budget(k=max(1, tokens.length), window=1, sinks=0), causal=self.causal)

    def _attend_first(self, tokens: NewTokens, cache: SparseKCacheLayer | None) -> Tensor:
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
            elif is_soft and tokens.length <= budget.slots:
                _warn_of_short_text(budget.slots)
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

    def _attend_step(self, tokens: NewTokens, cache: SparseKCacheLayer) -> Tensor:
        """Give the one new token of each row a slot, and attend to the slots."""
        valid = None if tokens.valid is None else tokens.valid[:, 0]
        cache.insert(tokens.key, tokens.value, tokens.scores, valid)
        output = attend_slots(tokens.query, cache.keys, cache.values, cache.positions, scaling=tokens.scaling)
        if isinstance(self.baseline, AdaptiveBaseline) and self.baseline.watches_steps:
            state = cache.keys, cache.scores, tokens.positions, cache.positions
            budget = self._budget_in_use
            cache.scores.copy_(self.baseline.watch(tokens.query, *state, budget=budget, scaling=tokens.scaling))
        return output

    @torch.compiler.disable
    def _attend_in_blocks(
        self, tokens: NewTokens, cache: SparseKCacheLayer | None, baseline: AdaptiveBaseline
    ) -> Tensor:
        """Attend block after block through the slots, so that the attention of one chooses the keys of the next."""
        budget = self._budget_in_use
        length, step = tokens.length, min(baseline.block, budget.window)
        if _is_plain_text(tokens, cache, baseline):
            return _attend_plain_text(tokens, cache, baseline, budget)
        if cache is None:
            cache = self.make_cache_layer()
            cache.lazy_initialization(tokens.key, tokens.value)
        elif cache.empty and baseline.dense_prompt:
            step, budget = length, budget._replace(k=cache.slots + length)
        blocks = (tokens.part(begin, begin + step) for begin in range(0, length, step))
        # For a few queries, the implementation "dense" has the fewest launches.
        return torch.cat([self._attend_more(block, cache, budget, implementation="dense") for block in blocks], 2)

    def _attend_more(self, tokens: NewTokens, cache: SparseKCacheLayer, budget: Budget, **options: Any) -> Tensor:
        """Attend to several tokens after others: the kept keys are all that they can reach, so they come first.

        Args:
            tokens: the new ones.
            cache: holds the kept keys, and takes in the new ones.
            budget: of the attention.
            options: of `sparsek_attention`.
        """
        old_keys, old_values, old_scores, old_positions = cache.ordered()
        valid = torch.ones_like(tokens.index, dtype=torch.bool) if tokens.valid is None else tokens.valid
        keys, values = torch.cat([old_keys, tokens.key], 2), torch.cat([old_values, tokens.value], 2)
        scores = torch.cat([old_scores, tokens.scores], 2)
        exists = torch.cat([old_positions[:, 0] >= 0, valid], 1)  # the same for every head
        output = attend_padded(
            tokens.query, keys, values, scores, valid, exists, **budget._asdict(), scaling=tokens.scaling, **options
        )
        new_positions = tokens.index.masked_fill(~valid, -1)
        positions = torch.cat([old_positions, new_positions[:, None].expand_as(tokens.scores)], 2)
        if isinstance(self.baseline, AdaptiveBaseline):
            state = keys, scores, new_positions, positions
            scores = self.baseline.watch(tokens.query, *state, budget=budget, scaling=tokens.scaling)
        cache.fill(keys, values, scores, positions, cache.seen + valid.sum(-1))
        return output


def _is_plain_text(tokens: NewTokens, cache: SparseKCacheLayer | None, baseline: AdaptiveBaseline) -> bool:
    """Tell whether `attend_in_blocks` takes the tokens: a text begins here, without padding, and not as one block."""
    if tokens.valid is not None or torch.is_autocast_enabled(tokens.query.device.type):
        return False
    return cache is None or (cache.empty and not baseline.dense_prompt)


def _attend_plain_text(
    tokens: NewTokens, cache: SparseKCacheLayer | None, baseline: AdaptiveBaseline, budget: Budget
) -> Tensor:
    """Attend block after block to a text from its beginning on, without padding, and fill the cache if there is one."""
    output, kept = attend_in_blocks(tokens.query, tokens.key, tokens.value, baseline, budget, scaling=tokens.scaling)
    if cache is not None:
        keys, values = (
            states.gather(2, kept.index.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))
            for states in (tokens.key, tokens.value)
        )
        cache.fill(keys, values, kept.scores, kept.index, tokens.index[:, -1] + 1)
    return output


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


def _attend_whole_text(tokens: NewTokens, budget: Budget, **options: Any) -> Tensor:
    """Attend within texts that begin with these tokens; `options` are those of `sparsek_attention`."""
    tensors = tokens.query, tokens.key, tokens.value, tokens.scores
    settings = budget._asdict() | options
    if torch.compiler.is_compiling() and not torch.is_autocast_enabled(tokens.query.device.type):
        return attend_compiled(*tensors, tokens.valid, scaling=tokens.scaling, **settings)
    return attend_padded(*tensors, tokens.valid, tokens.valid, scaling=tokens.scaling, **settings)
