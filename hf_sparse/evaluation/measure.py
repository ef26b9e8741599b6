"""Everything that eval.json holds, in one call.

What quality is depends on the model: perplexity of every next token, perplexity of hidden tokens for a masked language
model, and likeness of embeddings to the dense model's for one without a language modelling head.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_sparse import environment
from hf_sparse.data import IGNORED, check_chunks, fingerprint, first_token, tensors
from hf_sparse.errors import DataError
from hf_sparse.evaluation.quality import compare, embeddings, masked_perplexity, position_edges
from hf_sparse.evaluation.speed import decoding, forward_speed
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.methods.sparsefinder.evaluation.analyse import analyse
from hf_sparse.methods.sparsek import Budget
from hf_sparse.methods.sparsek.evaluation.budgets import at_budget, budget_of
from hf_sparse.methods.sparsek.evaluation.contenders import (
    check_selections,
    evaluating,
    patched_layers,
    selection,
    selections_of,
)
from hf_sparse.metrics import METRIC_KEYS
from hf_sparse.model_kinds import kind_of
from hf_sparse.patches import sparse_layers_in_use

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FORMAT = 1


def evaluate(
    model: "PeftModel | PreTrainedModel",
    chunks: Any,
    *,
    selections: Sequence[str] | None = None,
    slots: Sequence[int] = (),
    sparsities: Sequence[float] | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    speed_tokens: int = 64,
    seed: int | None = None,
    progress: bool = True,
    text_name: str = "",
) -> dict[str, Any]:
    """Measure a patched model on text, against dense attention and against baselines with as many slots.

    The model comes back as it was: its mode, its policies, its budget, and whether it is switched on. One with
    Sparsefinder attention has no slots but graphs: what is said below is then that of
    `hf_sparse.methods.sparsefinder.evaluation.analyse`, with `selections` as its `patterns`.

    Args:
        model: a `PeftModel` or a model patched by `hf_sparse.patch`.
        chunks: `[N, T]` int64 tokens, `T` larger than the slots, see `hf_sparse.data.pack`; for a masked language model
            what `hf_sparse.data.mask_tokens` returns.
        selections: what to measure, of `selections_of(model)`; all by default.
        slots: further budgets to measure the same at, see `Budget.resized`. The scorers stay those that were trained.
        sparsities: of Sparsefinder, shares of the pairs of tiles that are left out.
        stride: of a causal language model, count the last `stride` tokens of each chunk only: perplexity over a sliding
            window, if `pack` cut the chunks with the same stride. By default all tokens but the first count.
        batch_size: chunks at a time.
        speed_tokens: tokens that are decoded to measure the speed of a causal language model: the last ones of the
            first chunk, after the others as the prompt; fewer where the chunk is not that long.
        seed: of Sparsefinder: of the baselines, and of the rows that are compared; 0 by default.
        progress: show a progress bar on stderr.
        text_name: what the text is called in the result.

    Returns:
        What `eval.json` holds. Its `metric` names the entry with the quality of each selection: perplexity per token of
        every position but the first of each chunk; perplexity per hidden token; or the mean cosine similarity of
        mean-pooled embeddings to the dense model's. For a causal language model also `by_position`, the perplexity
        between `edges`; `divergence`, the mean KL divergence from dense attention in nats per token; bytes of keys and
        values after one chunk (for the sparse cache also its bookkeeping, the scores and positions of its slots) and
        tokens per second of decoding one sequence. For others, tokens per second of the forward. `sweep` has one entry
        per element of `slots`.

    Raises:
        DataError: chunks that cannot be measured.
        ValueError: a model that is not patched, or options out of range.
    """
    if sparse_layers_in_use(model, SparsefinderAttention):
        if slots or stride is not None:
            raise ValueError("slots and stride are SparseK's: a Sparsefinder model is measured at sparsities")
        return analyse(
            model,
            chunks,
            patterns=selections,
            sparsities=sparsities,
            batch_size=batch_size,
            seed=seed or 0,
            progress=progress,
            text_name=text_name,
        )
    own = budget_of(model)
    if sparsities is not None or seed is not None:
        raise ValueError("sparsities and seed are Sparsefinder's: a SparseK model is measured at slots")
    selections = selections_of(model) if selections is None else selections
    tokens, labels = tensors(model, chunks)
    budgets = [own, *(own.resized(count) for count in slots)]
    _check(model, tokens, labels, budgets, selections, batch_size, speed_tokens)
    kind = kind_of(model)
    metric = METRIC_KEYS[kind]
    if stride is not None and (kind != "causal" or not 1 <= stride < tokens.shape[1]):
        raise ValueError(
            f"stride is for causal language models, 1 to {tokens.shape[1] - 1} tokens of chunks of {tokens.shape[1]}; "
            f"got {stride} for a model of the kind {kind!r}"
        )
    with evaluating(model):
        if kind == "causal":
            qualities = _predictions(model, tokens, budgets, selections, stride, batch_size, progress)
            memory, speed = decoding(model, tokens[:1], min(speed_tokens, tokens.shape[1] - 1))
            costs = {"kv_bytes": memory, "tokens_per_second": speed}
        else:
            qualities = _encodings(model, metric, tokens, labels, budgets, selections, batch_size, progress)
            costs = {"tokens_per_second": forward_speed(model, tokens[:batch_size])}
    count, length = tokens.shape
    text: dict[str, Any] = {"name": text_name, "sha256": fingerprint(tokens, labels), "chunks": count, "length": length}
    text["first_token"] = first_token(model, tokens)
    if kind != "features":
        text["predicted_tokens"] = count * (stride or length - 1) if labels is None else int((labels != IGNORED).sum())
    if stride is not None:
        text["stride"] = stride
    sweep = [_entry(budget, found) for budget, found in zip(budgets[1:], qualities[1:], strict=True)]
    return {
        "format": FORMAT,
        "base_model": patched_layers(model)[0].config.base_model_name_or_path or model.config.name_or_path,
        "budget": _entry(own, {}),
        "text": text,
        "metric": metric,
        **qualities[0],
        **costs,
        **({"sweep": sweep} if sweep else {}),
        **environment.describe(),
    }


def _predictions(
    model: nn.Module,
    tokens: Tensor,
    budgets: Sequence[Budget],
    selections: Sequence[str],
    stride: int | None,
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """For each budget the perplexities and divergences of a causal language model; by position for the first."""
    runs = list(dict.fromkeys((budget, name) for budget in budgets for name in selections))
    counted = stride or tokens.shape[1] - 1
    found = compare(model, tokens, runs, batch_size=batch_size, progress=progress)
    losses = {run: loss.last(counted) for run, loss in found.items()}
    qualities: list[dict[str, Any]] = [
        {
            "perplexity": {name: losses[budget, name].perplexity for name in selections},
            "divergence": {name: losses[budget, name].mean_divergence for name in selections},
        }
        for budget in budgets
    ]
    edges = position_edges(tokens.shape[1], first=tokens.shape[1] - counted)
    values = {name: found[budgets[0], name].by_position(edges) for name in selections}
    qualities[0]["by_position"] = {"edges": edges, **values}
    return qualities


def _encodings(
    model: nn.Module,
    metric: str,
    tokens: Tensor,
    labels: Tensor | None,
    budgets: Sequence[Budget],
    selections: Sequence[str],
    batch_size: int,
    progress: bool,
) -> list[dict[str, Any]]:
    """For each budget what the metric of an encoder, or of a model without a head, gives for each selection."""
    options: dict[str, Any] = {"batch_size": batch_size}
    reference = None
    if labels is None:
        with selection(model, "dense"):
            reference = embeddings(model, tokens, **options, progress=progress and "dense")
    qualities = []
    for budget in budgets:
        values = {}
        for name in selections:
            options["progress"] = progress and name
            with at_budget(model, budget), selection(model, name):
                if reference is not None:
                    found = reference if name == "dense" else embeddings(model, tokens, **options)
                    values[name] = F.cosine_similarity(found.double(), reference.double(), dim=-1).mean().item()
                else:
                    assert labels is not None
                    values[name] = masked_perplexity(model, tokens, labels, **options)
        qualities.append({metric: values})
    return qualities


def _entry(budget: Budget, qualities: dict[str, Any]) -> dict[str, Any]:
    sizes = {"k": budget.k, "window": budget.window, "sinks": budget.sinks, "slots": budget.slots}
    return {**sizes, **qualities}


def _check(
    model: Any,
    chunks: Tensor,
    labels: Tensor | None,
    budgets: Sequence[Budget],
    selections: Sequence[str],
    batch_size: int,
    speed_tokens: int,
) -> None:
    check_chunks(model, chunks, labels)
    length, slots = chunks.shape[1], max(budget.slots for budget in budgets)
    if length <= slots:
        raise DataError(
            f"nothing is evicted: the budget of {slots} slots (sinks + window + k) covers the whole text of {length} "
            "tokens; use longer chunks or a smaller budget"
        )
    check_selections(selections, selections_of(model))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if speed_tokens < 1:
        raise ValueError(f"speed_tokens must be at least 1, got {speed_tokens}")
