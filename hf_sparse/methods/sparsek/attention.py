"""SparseK attached to one attention module: score the new tokens, attend, keep what is worth keeping."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from hf_sparse.core.layer import NO_CACHE, AttentionShape, SparseAttentionLayer, token_index
from hf_sparse.methods.sparsek.baselines import AdaptivePolicy, Arrivals, Policy
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.config import SparseKConfig
from hf_sparse.methods.sparsek.scorer import Scorer, make_scorer
from hf_sparse.methods.sparsek.step import step_in_one_kernel
from hf_sparse.ops.selection import sparsek_attention
from hf_sparse.ops.selection.slots import attend_slots

# (query [B, Hq, T, D], key [B, Hkv, T, D], scores [B, Hkv, T], scaling) of whole sequences without padding
Observer = Callable[[Tensor, Tensor, Tensor, float], None]


class SparseKAttention(SparseAttentionLayer):
    """SparseK for one attention module.

    In `train` mode the gates are soft and only whole sequences are possible; in `eval` mode, and wherever a cache is
    filled without gradients, as in generation, the selection is hard.

    Attributes:
        causal: whether queries see earlier keys only. An encoder's module sees all of them, and has no cache.
        policy: a baseline's scores instead of the scorer's, see `selection`.
        observer: when set, the module computes its dense attention and hands queries, keys and scores to the
            observer. The objective `attention` trains with it.
    """

    label = "SparseK"
    fits = ("hidden_size", "num_key_value_heads")
    adapter_layer_names = ("sparsek_scorer", "sparsek_lora")
    cache_layer_type = SparseKCacheLayer
    has_slots = True

    @classmethod
    def at(cls, site: AttentionShape) -> "SparseKAttention":
        return cls(site.hidden_size, site.num_key_value_heads, site.layer, site.causal)

    @classmethod
    def check(cls, config: SparseKConfig, site: AttentionShape) -> None:
        shares, layers = config.layer_shares, (config.base_shape or {}).get("num_attention_layers")
        if shares is not None and len(shares) != layers:
            raise ValueError(f"layer_shares has {len(shares)} entries, and the model has {layers} attention layers")

    def __init__(self, hidden_size: int, num_key_value_heads: int, layer: int, causal: bool = True) -> None:
        super().__init__()
        self.hidden_size, self.num_key_value_heads, self.layer = hidden_size, num_key_value_heads, layer
        self.causal = causal
        self.sparsek_scorer = nn.ModuleDict()
        self.sparsek_lora = nn.ModuleDict()
        self.policy: Policy | None = None
        self.observer: Observer | None = None

    def make_parameters(self, config: SparseKConfig) -> Scorer:
        return make_scorer(config, self.hidden_size, self.num_key_value_heads, self.causal)

    @property
    def config(self) -> SparseKConfig:
        """Configuration of the active adapter."""
        return self.configs[self.active]

    @property
    def budget(self) -> Budget:
        """What the active adapter gives each KV head of this layer."""
        return self.config.budget(self.layer)

    @property
    def _chooser(self) -> tuple[str, Policy | None]:
        """Whose scores are used now: the adapter in use, or a baseline at its budget."""
        return self.identities[self.active], self.policy

    def cache_layer(self) -> SparseKCacheLayer:
        if not self.causal:
            raise ValueError(NO_CACHE)
        return SparseKCacheLayer(
            *self.budget,
            owner=self._chooser,
            only_sparse=self.config.layers is None,  # otherwise some layers are left dense
            remembers=self.policy is not None and self.policy.remembers,
        )

    def _may_learn(self) -> bool:
        """Tell whether a backward could follow, and the scorers are not frozen."""
        scorer = self.sparsek_scorer[self.active]
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in scorer.parameters())

    def check_cache(self, cache: SparseKCacheLayer) -> None:
        if cache.owner != self._chooser:
            raise ValueError("the cache holds what another adapter chose: start a new cache after switching adapters")
        if not cache.empty and (cache.soft or (self.policy is None and self.is_learning(cache))):
            raise ValueError(
                "decoding uses hard selection, and a training forward has soft gates: call model.eval() or use "
                "torch.no_grad() before generating, from the first token on"
            )

    def score(self, hidden_states: Tensor, index: Tensor) -> Tensor:
        """The scorer's frozen scores `[B, Hkv, T]` float32 of tokens that stand at `index` `[B, T]` of their rows."""
        return self.sparsek_scorer[self.active](hidden_states, index)

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
        batch, _, length, _ = query.shape
        if length == 1 and isinstance(cache, SparseKCacheLayer):
            step = step_in_one_kernel(self, query, key, value, hidden_states, valid, cache, scaling)
            if step is not None:
                return step
        config, policy, budget = self.config, self.policy, self.budget
        if cache is not None and not self.causal:
            raise ValueError(NO_CACHE)
        if cache is not None and not isinstance(cache, SparseKCacheLayer):
            raise TypeError(f"SparseK needs its own cache layer, got {type(cache).__name__}")
        if policy is not None and not self.causal and not policy.bidirectional:
            raise ValueError(
                f"{type(policy).__name__} selects keys as a text grows, and a bidirectional attention module sees all "
                "at once: the baselines of encoders are recency (a window) and random"
            )
        if cache is not None:
            self.check_cache(cache)
        seen = 0 if cache is None else cache.seen
        index = token_index(valid, seen, batch, length, query.device)
        if policy is None:
            scores = self.score(hidden_states, index)
        else:
            scores = policy(Arrivals(query, key, index, valid, scaling, budget.window, self.layer, cache))
        fresh = cache is None or cache.empty
        if self.observer is not None:
            self.observer(query, key, scores, scaling)
            dense: dict[str, Any] = {"k": max(1, length), "window": 1, "sinks": 0, "causal": self.causal}
            return _aligned(query, key, value, scores, valid, valid, scaling=scaling, **dense)
        soft = policy is None and self.is_learning(cache)

        if policy is not None:
            budget = policy.budget(budget, self.causal)
        options: dict[str, Any] = {**budget._asdict(), "scaling": scaling}
        if isinstance(policy, AdaptivePolicy) and (fresh or length > 1):
            return self._in_blocks(policy, query, key, value, scores, index, valid, cache, options)
        if fresh:
            gates: dict[str, Any] = {"gates": "hard"}
            if soft:
                gates = {"gates": "soft", "support": config.soft_support(budget.k)}
            output = _aligned(query, key, value, scores, valid, valid, causal=self.causal, **options, **gates)
            if policy is None and self._may_learn() and not torch.compiler.is_compiling():
                if not soft and self.active in self.last_for:
                    output = _Unlearned.apply(output, scores)
                elif soft and length <= budget.slots:
                    _warn_of_short_text(budget.slots)
            if cache is not None:
                cache.soft = soft
                positions = index if valid is None else index.masked_fill(~valid, -1)
                positions = positions[:, None].expand_as(scores)
                count = index[:, -1] + 1 if valid is None else valid.sum(-1)
                cache.fill(key, value, scores, positions, count, padded=valid is not None)
            return output
        assert cache is not None
        if length == 1:
            cache.insert(key, value, scores, None if valid is None else valid[:, 0])
            output = attend_slots(query, cache.keys, cache.values, cache.positions, scaling=scaling)
            if isinstance(policy, AdaptivePolicy) and policy.watches_steps:
                at = index if valid is None else index.masked_fill(~valid, -1)
                cache.scores.copy_(policy.watch(query, cache.keys, cache.scores, at, cache.positions, **options))
            return output
        return self._continue(query, key, value, scores, index, valid, cache, options)

    @torch.compiler.disable
    def _in_blocks(
        self,
        policy: AdaptivePolicy,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        index: Tensor,
        valid: Tensor | None,
        cache: SparseKCacheLayer | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Block after block through the slots, so that the attention of one chooses the keys of the next."""
        length = query.shape[2]
        step = min(policy.block, options["window"])
        blocks = {**options, "implementation": "dense"}  # for a few queries, the fewest launches
        if cache is None:
            cache = self.cache_layer()
            cache.lazy_initialization(key, value)
        elif cache.empty and policy.dense_prompt:
            step, blocks = length, {**options, "k": cache.slots + length}
        outputs = []
        for begin in range(0, length, step):
            at = slice(begin, begin + step)
            q, k, v, s = (tensor[:, :, at] for tensor in (query, key, value, scores))
            real = None if valid is None else valid[:, at]
            outputs.append(self._continue(q, k, v, s, index[:, at], real, cache, blocks))
        return torch.cat(outputs, 2)

    def _continue(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        index: Tensor,
        valid: Tensor | None,
        cache: SparseKCacheLayer,
        options: dict[str, Any],
    ) -> Tensor:
        """Several tokens after others: the kept keys are all that they can reach, so they simply come first."""
        old_keys, old_values, old_scores, old_positions = cache.ordered()
        new_valid = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        keys, values = torch.cat([old_keys, key], 2), torch.cat([old_values, value], 2)
        all_scores = torch.cat([old_scores, scores], 2)
        present = torch.cat([old_positions[:, 0] >= 0, new_valid], 1)  # the same for every head
        output = _aligned(query, keys, values, all_scores, new_valid, present, **options)
        new_positions = index.masked_fill(~new_valid, -1)
        positions = torch.cat([old_positions, new_positions[:, None].expand_as(scores)], 2)
        if isinstance(self.policy, AdaptivePolicy):
            all_scores = self.policy.watch(query, keys, all_scores, new_positions, positions, **options)
        cache.fill(keys, values, all_scores, positions, cache.seen + new_valid.sum(-1))
        return output


class _Unlearned(torch.autograd.Function):
    """The output of a hard selection as it is; a backward says what does not learn from it."""

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
    warnings.warn(
        f"a training text fits into the {slots} KV slots (k + window + sinks), where every key is kept: the scorers "
        "learn nothing from it; train on longer texts, or with a smaller budget",
        stacklevel=1,
    )


@torch.compiler.disable  # its loops over tiles unroll into a graph of minutes, another one for every length
def _aligned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    present: Tensor | None,
    **options: Any,
) -> Tensor:
    """`sparsek_attention` of rows that hold padding anywhere: the padding moves to the front and back again.

    Args:
        valid: `[B, Tq]` bool, real queries; `None` if there is no padding at all.
        present: `[B, Tk]` bool, real keys.
    """
    if valid is None or present is None:
        return sparsek_attention(query, key, value, scores, **options)

    def to_end(mask: Tensor) -> Tensor:  # a stable order, padding first
        return mask.int().argsort(dim=-1, stable=True)

    def move(tensor: Tensor, order: Tensor) -> Tensor:
        order = order[:, None, :, None] if tensor.ndim == 4 else order[:, None, :]
        return tensor.gather(2, order.expand_as(tensor))

    rows, columns = to_end(valid), to_end(present)
    output = sparsek_attention(
        move(query, rows),
        move(key, columns),
        move(value, columns),
        move(scores, columns),
        start=(~present).sum(-1),
        **options,
    )
    return move(output, rows.argsort(dim=-1))
