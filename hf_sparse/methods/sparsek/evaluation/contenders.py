"""Compare the trained scorers with dense attention and with baselines that have as many slots."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_sparse.core.overrides import override
from hf_sparse.evaluation.base import DENSE, LEARNED
from hf_sparse.evaluation.contenders import Evaluation, base_model_of
from hf_sparse.evaluation.show import comparison_table, sweep_table
from hf_sparse.evaluation.switching import layers_to_measure, switched
from hf_sparse.methods.sparsek.attention import SparseKAttention
from hf_sparse.methods.sparsek.baselines import BASELINES, Oracle, PromptRandom
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.methods.sparsek.evaluation_settings import SparseKEvaluationSettings
from hf_sparse.model_kinds import kind_of

if TYPE_CHECKING:
    from rich.table import Table

#: What attends: the base model, the baselines at equal slots, and the trained scorers.
CONTENDERS = (DENSE, *BASELINES, LEARNED)

#: Those that can answer tasks: not the one that must see the whole text first, nor the one whose slots must hold a
#: whole prompt, for the prompts of tasks are longer than the slots.
GENERATING = tuple(name for name in CONTENDERS if not isinstance(BASELINES.get(name), Oracle | PromptRandom))

#: What attends in both directions, where the nearest keys of a query are those of a wider window.
ENCODER_CONTENDERS = (DENSE, "window", "random", LEARNED)

_BASELINE_OF = {"window": "recency"}  # in an encoder

LOGITS = 2**26  # numbers of a batch; 256 MiB in float32
_MOST_CHUNKS = 8  # at a time: more hardly save time
_LOGIT_BYTES = 16  # of an accelerator's free memory per logit: two of them are held, and what the forward needs


class SparseKEvaluation(Evaluation):
    """Compare contenders with as many slots, at the budget of the adapter and at others.

    A baseline has the LoRA of the adapter too: only what chooses the keys differs. The scorers at another budget stay
    those that were trained.
    """

    name = "sparsek"
    settings_type = SparseKEvaluationSettings

    def batch_size(self, model: nn.Module, length: int) -> int:
        """Return up to 8 for a causal language model, as long as its logits are few for the memory, and 1 for others.

        To decide block by block what to keep costs little more for 8 chunks than for one.
        """
        if kind_of(model) != "causal":
            return 1
        config: Any = model.config
        logits, device = LOGITS, next(model.parameters()).device
        if device.type == "cuda":
            logits = max(logits, torch.cuda.mem_get_info(device)[0] // _LOGIT_BYTES)
        return max(1, min(_MOST_CHUNKS, logits // (length * config.get_text_config().vocab_size)))

    def contenders(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of all that can be compared in a model, which are fewer in an encoder."""
        return CONTENDERS if sparsek_layers(model)[0].causal else ENCODER_CONTENDERS

    def generating(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of those that can generate: all but the oracle and `prompt_random`."""
        return GENERATING

    def budget(self, model: nn.Module) -> Budget:
        """Return the budget of the active adapter, see `budget_of`."""
        return budget_of(model)

    def budgets(self, model: nn.Module, settings: SparseKEvaluationSettings) -> list[Any]:
        """Return the budget of the active adapter, and it resized to each of the `slots`."""
        budget = budget_of(model)
        return [budget, *(budget.resized(slots) for slots in settings.slots)]

    def at_budget(self, model: nn.Module, budget: Budget) -> AbstractContextManager[None]:
        """Give the active adapter a budget within a `with` block, see `at_budget`."""
        return at_budget(model, budget)

    @contextmanager
    def attending(self, model: nn.Module, name: str) -> Iterator[None]:
        """Let dense attention, the scorers or a baseline choose the keys within a `with` block."""
        layers = sparsek_layers(model)
        with override(layers, baseline=BASELINES.get(_BASELINE_OF.get(name, name))), switched(layers, name != DENSE):
            yield

    def bookkeeping_bytes(self, cache: Any) -> int:
        """Return the bytes of the scores and positions of all slots of a KV cache."""
        slots = [layer for layer in cache.layers if isinstance(layer, SparseKCacheLayer)]
        tensors = (tensor for layer in slots for tensor in (layer.scores, layer.positions) if tensor is not None)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def subject(self, model: nn.Module) -> dict[str, Any]:
        """Return the base model and the budget; an eval.json of SparseK does not name its method."""
        return {"base_model": base_model_of(model), "budget": budget_of(model).sizes}

    def made(self, result: dict[str, Any]) -> bool:
        """Tell whether the content of an eval.json is of SparseK."""
        return "method" not in result

    def tables(self, result: dict[str, Any]) -> list["Table"]:
        """Return the table of all contenders, and of further budgets if there are any."""
        budget = result["budget"]
        title = f"{budget['sinks']} sinks, window {budget['window']}, {budget['k']} selected"
        return [comparison_table(result, title), *([sweep_table(result)] if "sweep" in result else [])]


def sparsek_layers(model: nn.Module) -> list[SparseKAttention]:
    """Return the SparseK layers of the active adapter, at least one.

    Raises:
        ValueError: a model without SparseK attention.
    """
    layers = layers_to_measure(model)
    sparsek = [layer for layer in layers if isinstance(layer, SparseKAttention)]
    if not sparsek:
        raise ValueError(
            f"this is about the slots of SparseK attention, and the model has {layers[0].label} attention, without any"
        )
    return sparsek


def budget_of(model: nn.Module) -> Budget:
    """Return the budget of the active adapter; its mean over layers, where `layer_shares` differ."""
    config = sparsek_layers(model)[0].config
    return Budget(config.k, config.window, config.sinks)


def at_budget(model: nn.Module, budget: Budget) -> AbstractContextManager[None]:
    """Give the active adapter another budget within a `with` block; caches made outside it do not fit inside."""
    configs = [layer.config for layer in sparsek_layers(model)]
    return override(configs, k=budget.k, window=budget.window, sinks=budget.sinks)
