"""Compare contenders by the predictions or embeddings of one model, and weigh what sparse attention saves."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from hf_sparse.evaluation.base import AbstractEvaluation, Request
from hf_sparse.evaluation.quality import compare, embeddings, masked_perplexity, position_edges
from hf_sparse.evaluation.speed import decoding, forward_speed
from hf_sparse.metrics import METRIC_KEYS


def compare_contenders(evaluation: AbstractEvaluation, model: nn.Module, request: Request) -> dict[str, Any]:
    """Measure the quality of every contender at every budget, bytes of keys and values, and speed.

    Returns:
        The metric of the model's kind by contender; for a causal language model also `divergence`, `by_position`,
        `kv_bytes`; `tokens_per_second`; `sweep` with the sizes and the quality of every further budget.
    """
    budgets = evaluation.budgets(model, request.settings)
    if request.kind == "causal":
        qualities = _predictions(model, budgets, request)
        tokens = min(request.speed_tokens, request.tokens.shape[1] - 1)
        memory, speed = decoding(model, request.tokens[:1], tokens)
        costs = {"kv_bytes": memory, "tokens_per_second": speed}
    else:
        qualities = _encodings(evaluation, model, budgets, request)
        costs = {"tokens_per_second": forward_speed(model, request.tokens[: request.batch_size])}
    further = zip(budgets[1:], qualities[1:], strict=True)
    sweep = [{**budget.sizes, **quality} for budget, quality in further if budget is not None]
    return {**qualities[0], **costs, **({"sweep": sweep} if sweep else {})}


def _predictions(model: nn.Module, budgets: Sequence[Any], request: Request) -> list[dict[str, Any]]:
    """Return the perplexities and divergences of a causal language model at each budget; by position at the first."""
    names, length = request.contenders, request.tokens.shape[1]
    runs = list(dict.fromkeys((budget, name) for budget in budgets for name in names))
    counted = request.stride or length - 1
    losses = compare(model, request.tokens, runs, batch_size=request.batch_size, progress=request.progress)
    last = {run: loss.last(counted) for run, loss in losses.items()}
    qualities: list[dict[str, Any]] = [
        {
            "perplexity": {name: last[budget, name].perplexity for name in names},
            "divergence": {name: last[budget, name].mean_divergence for name in names},
        }
        for budget in budgets
    ]
    edges = position_edges(length, first=length - counted)
    values = {name: losses[budgets[0], name].by_position(edges) for name in names}
    qualities[0]["by_position"] = {"edges": edges, **values}
    return qualities


def _encodings(
    evaluation: AbstractEvaluation, model: nn.Module, budgets: Sequence[Any], request: Request
) -> list[dict[str, Any]]:
    """Return the metric of an encoder, or of a model without a head, of every contender at each budget."""
    tokens, labels = request.tokens, request.labels
    options: dict[str, Any] = {"batch_size": request.batch_size}
    reference = None
    if labels is None:
        with evaluation.using(model, "dense"):
            reference = embeddings(model, tokens, **options, progress=request.progress and "dense")
    qualities = []
    for budget in budgets:
        values = {}
        for name in request.contenders:
            options["progress"] = request.progress and name
            with evaluation.using(model, name, budget):
                if reference is not None:
                    states = reference if name == "dense" else embeddings(model, tokens, **options)
                    values[name] = F.cosine_similarity(states.double(), reference.double(), dim=-1).mean().item()
                else:
                    assert labels is not None
                    values[name] = masked_perplexity(model, tokens, labels, **options)
        qualities.append({METRIC_KEYS[request.kind]: values})
    return qualities
