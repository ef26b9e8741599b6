"""What sparse attention costs in quality and saves: quality at equal slots, KV bytes, speed.

What quality is depends on the model: perplexity of every next token, perplexity of hidden tokens for a masked language
model, and likeness of embeddings to the dense model's for one without a language modelling head.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from hf_sparse import machine
from hf_sparse.data import IGNORED, check_chunks, fingerprint, tensors
from hf_sparse.errors import DataError
from hf_sparse.methods.sparsek import SparseKAttention, SparseKCacheLayer
from hf_sparse.methods.sparsek.selection import POLICIES
from hf_sparse.metrics import metric_of
from hf_sparse.patches import methods_in_use
from hf_sparse.tasks import Kind, final_states, kind_of, pooled

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FORMAT = 1

#: What attends: the base model, the baselines at equal slots, and the trained scorers.
SELECTIONS = ("dense", *POLICIES, "learned")

#: The same for attention in both directions, where the nearest keys of a query are those of a wider window.
ENCODER_SELECTIONS = ("dense", "window", "random", "learned")

_POLICY_OF = {"window": "recency"}

_METRICS: dict[Kind, str] = {
    "causal": "perplexity",
    "masked": "masked_perplexity",
    "features": "embedding_similarity",
}

_REPEATS = 3  # of the speed measurement; the median of three survives one slow start
_SLICE = 512  # positions whose logits are float32 at a time


def evaluate(
    model: "PeftModel | PreTrainedModel",
    chunks: Any,
    *,
    selections: Sequence[str] | None = None,
    batch_size: int = 1,
    speed_tokens: int = 64,
    progress: bool = True,
    text_name: str = "",
) -> dict[str, Any]:
    """Measure a patched model on text, against dense attention and against baselines with as many slots.

    The model comes back as it was: its mode, its policies, and whether it is switched on.

    Args:
        model: a `PeftModel` or a model patched by `hf_sparse.patch`.
        chunks: `[N, T]` int64 tokens, `T` larger than the slots, see `hf_sparse.data.pack`; for a masked language model
            what `hf_sparse.data.mask_tokens` returns.
        selections: what to measure, of `selections_of(model)`; all by default.
        batch_size: chunks at a time.
        speed_tokens: tokens that are decoded to measure the speed of a causal language model: the last ones of the
            first chunk, after the others as the prompt; fewer where the chunk is not that long.
        progress: show a progress bar on stderr.
        text_name: what the text is called in the result.

    Returns:
        What `eval.json` holds. Its `metric` names the entry with the quality of each selection: perplexity per token of
        every position but the first of each chunk; perplexity per hidden token; or the mean cosine similarity of
        mean-pooled embeddings to the dense model's. For a causal language model, bytes of keys and values after one
        chunk (for the sparse cache also its bookkeeping, the scores and positions of its slots) and tokens per second
        of decoding one sequence; for others, tokens per second of the forward.

    Raises:
        DataError: chunks that cannot be measured.
        ValueError: a model that is not patched, or options out of range.
    """
    config = _methods(model)[0].config
    selections = selections_of(model) if selections is None else selections
    tokens, labels = tensors(model, chunks)
    _check(model, tokens, labels, config.slots, selections, batch_size, speed_tokens)
    kind = kind_of(model)
    metric = _METRICS[kind]
    with _evaluating(model):
        values = _quality(model, kind, tokens, labels, selections, batch_size, progress)
        if kind == "causal":
            memory, speed = _decoding(model, tokens[:1], min(speed_tokens, tokens.shape[1] - 1))
            costs = {"kv_bytes": memory, "tokens_per_second": speed}
        else:
            costs = {"tokens_per_second": _forward_speed(model, tokens[:batch_size])}
    count, length = tokens.shape
    text = {"name": text_name, "sha256": fingerprint(tokens, labels), "chunks": count, "length": length}
    if kind != "features":
        text["predicted_tokens"] = count * (length - 1) if labels is None else int((labels != IGNORED).sum())
    return {
        "format": FORMAT,
        "base_model": config.base_model_name_or_path or model.config.name_or_path,
        "budget": {"k": config.k, "window": config.window, "sinks": config.sinks, "slots": config.slots},
        "text": text,
        "metric": metric,
        metric: values,
        **costs,
        **machine.describe(),
    }


def _quality(
    model: nn.Module,
    kind: Kind,
    tokens: Tensor,
    labels: Tensor | None,
    selections: Sequence[str],
    batch_size: int,
    progress: bool,
) -> dict[str, float]:
    """What the metric of a kind of model gives for each selection."""
    options: dict[str, Any] = {"batch_size": batch_size}
    reference = None
    if kind == "features":
        with selection(model, "dense"):
            reference = embeddings(model, tokens, **options, progress=progress and "dense")
    values = {}
    for name in selections:
        options["progress"] = progress and name
        with selection(model, name):
            if reference is not None:
                found = reference if name == "dense" else embeddings(model, tokens, **options)
                values[name] = F.cosine_similarity(found.double(), reference.double(), dim=-1).mean().item()
            elif labels is not None:
                values[name] = masked_perplexity(model, tokens, labels, **options)
            else:
                values[name] = perplexity(model, tokens, **options)
    return values


def selections_of(model: nn.Module) -> tuple[str, ...]:
    """The selections that can be compared in a patched model, dense attention and the scorers included.

    Raises:
        ValueError: a model that is not patched.
    """
    return SELECTIONS if _methods(model)[0].causal else ENCODER_SELECTIONS


@contextmanager
def selection(model: nn.Module, name: str) -> Iterator[None]:
    """Let `name` choose the keys within a `with` block, whatever happens in it.

    Args:
        model: a patched model.
        name: one of `selections_of(model)`. `"dense"` switches sparse attention off; `"recency"` (`"window"` where
            attention has both directions) and `"random"` are baselines with as many slots; `"learned"` is the scorers.

    Raises:
        ValueError: another name, or a model that is not patched.
    """
    methods, known = _methods(model), selections_of(model)
    if name not in known:
        raise ValueError(f"selection must be one of {', '.join(known)}, got {name!r}")
    before = [(method, method.policy, method.disable_adapters) for method in methods]
    try:
        for method in methods:
            method.policy = POLICIES.get(_POLICY_OF.get(name, name))
            method.switch(name != "dense")
        yield
    finally:
        for method, policy, disabled in before:
            method.policy = policy
            method.switch(not disabled)


@torch.no_grad()
def perplexity(model: nn.Module, chunks: Tensor, *, batch_size: int = 1, progress: str | bool = False) -> float:
    """`exp` of the mean negative log-likelihood of every token but the first of each chunk.

    The model runs as it is; log-likelihoods are computed in float32, a slice of positions at a time, and summed in
    float64.

    Args:
        chunks: `[N, T]` int64, `T` at least 2.
        progress: a label for a progress bar on stderr, or False for none.
    """
    total = 0.0
    for (tokens,) in _batches(model, chunks, batch_size=batch_size, progress=progress and f"perplexity, {progress}"):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
        for some, target in zip(logits.split(_SLICE, 1), tokens[:, 1:].split(_SLICE, 1), strict=True):
            losses = F.cross_entropy(some.float().transpose(1, 2), target, reduction="none")
            total += losses.double().sum().item()
    return math.exp(total / (chunks.shape[0] * (chunks.shape[1] - 1)))


@torch.no_grad()
def masked_perplexity(
    model: nn.Module, chunks: Tensor, labels: Tensor, *, batch_size: int = 1, progress: str | bool = False
) -> float:
    """`exp` of the mean negative log-likelihood of the hidden tokens, float32 and summed in float64.

    Args:
        chunks: `[N, T]` int64 with hidden tokens; labels: `[N, T]`, what they were, -100 elsewhere.
        progress: as for `perplexity`.
    """
    total = 0.0
    label = progress and f"masked-token perplexity, {progress}"
    for tokens, wanted in _batches(model, chunks, labels, batch_size=batch_size, progress=label):
        hidden = wanted != IGNORED
        logits = model(input_ids=tokens).logits[hidden]
        total += F.cross_entropy(logits.float(), wanted[hidden], reduction="none").double().sum().item()
    return math.exp(total / int((labels != IGNORED).sum()))


@torch.no_grad()
def embeddings(model: nn.Module, chunks: Tensor, *, batch_size: int = 1, progress: str | bool = False) -> Tensor:
    """Mean of the last hidden states of each chunk: `[N, C]` float32, on the CPU.

    Args:
        chunks: `[N, T]` int64.
        progress: as for `perplexity`.
    """
    batches = _batches(model, chunks, batch_size=batch_size, progress=progress and f"embeddings, {progress}")
    return torch.cat([pooled(final_states(model, tokens)).cpu() for (tokens,) in batches])


def _batches(model: nn.Module, *rows: Tensor, batch_size: int, progress: str | bool) -> Iterator[tuple[Tensor, ...]]:
    """Equal rows of some tensors, `batch_size` at a time, on the model's device."""
    device = next(model.parameters()).device
    batches: Any = list(zip(*(tensor.split(batch_size) for tensor in rows), strict=True))
    if progress:
        batches = track(batches, str(progress), console=Console(stderr=True), transient=True)
    for batch in batches:
        yield tuple(tensor.to(device) for tensor in batch)


def kv_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a transformers cache."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def table(result: dict[str, Any]) -> Table:
    """What `evaluate` returned, for people."""
    text, budget, speed = (result[key] for key in ("text", "budget", "tokens_per_second"))
    memory, metric = result.get("kv_bytes"), metric_of(result)
    caption = f"{text['chunks']} chunks of {text['length']} tokens" + (f" of {text['name']}" if text["name"] else "")
    parts = f"{budget['sinks']} sinks, window {budget['window']}, {budget['k']} selected"
    view = Table(title=f"{result['base_model']}: {parts}", caption=caption)
    view.add_column("attention")
    headers = ["keys per query", metric.name]
    headers += [f"KV cache at {memory['tokens']} tokens", "decoding, tokens/s"] if memory else ["forward, tokens/s"]
    for header in headers:
        view.add_column(header, justify="right")
    for name, value in result[metric.key].items():
        kind = "dense" if name == "dense" else "sparse"
        view.add_row(
            name,
            f"up to {text['length'] if kind == 'dense' else budget['slots']}",
            metric.show(value),
            *([readable_bytes(memory[kind])] if memory else []),
            # The baselines run the same code as the scorers, which alone were timed.
            f"{speed[kind]:.1f}" if name in ("dense", "learned") else "",
            style="bold" if name == "learned" else None,
        )
    return view


def readable_bytes(count: int) -> str:
    """
    >>> readable_bytes(1_572_864)
    '1.50 MiB'
    """
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


@torch.no_grad()
def _decoding(model: nn.Module, chunk: Tensor, new_tokens: int) -> tuple[dict[str, int], dict[str, Any]]:
    """KV bytes at the end of a chunk `[1, T]`, and the speed of decoding its last tokens, dense and sparse.

    The chunk's own tokens are fed, not sampled ones: both do exactly the same steps.
    """
    memory: dict[str, int] = {}
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(_REPEATS):
        for kind in times:  # in turn, so that a slow moment of the machine hits both
            with selection(model, "dense" if kind == "dense" else "learned"):
                cache, seconds = _decode(model, chunk, new_tokens)
            times[kind].append(seconds)
            memory[kind] = kv_bytes(cache)
    slots = [layer for layer in cache.layers if isinstance(layer, SparseKCacheLayer)]
    held = (tensor for layer in slots for tensor in (layer.scores, layer.positions) if tensor is not None)
    memory["sparse_bookkeeping"] = sum(tensor.numel() * tensor.element_size() for tensor in held)
    memory["tokens"] = chunk.shape[1]
    speed: dict[str, Any] = {kind: new_tokens / statistics.median(values) for kind, values in times.items()}
    return memory, {**speed, "new_tokens": new_tokens}


@torch.no_grad()
def _forward_speed(model: nn.Module, chunks: Tensor) -> dict[str, Any]:
    """Tokens per second of the forward over chunks `[B, T]`, dense and sparse."""
    tokens = chunks.to(next(model.parameters()).device)
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(_REPEATS):
        for kind in times:
            with selection(model, "dense" if kind == "dense" else "learned"):
                _finish(tokens.device)
                start = time.perf_counter()
                model(input_ids=tokens)
                _finish(tokens.device)
                times[kind].append(time.perf_counter() - start)
    speed: dict[str, Any] = {kind: tokens.numel() / statistics.median(values) for kind, values in times.items()}
    return {**speed, "batch_size": len(tokens), "length": tokens.shape[1]}


def _decode(model: nn.Module, chunk: Tensor, new_tokens: int) -> tuple[Any, float]:
    """The cache after a chunk `[1, T]`, and the seconds that its last `new_tokens` took, one by one."""
    tokens = chunk.to(next(model.parameters()).device)
    cache = model(input_ids=tokens[:, :-new_tokens], use_cache=True).past_key_values
    _finish(tokens.device)
    start = time.perf_counter()
    for token in tokens[:, -new_tokens:].split(1, dim=1):
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    _finish(tokens.device)
    return cache, time.perf_counter() - start


def _finish(device: torch.device) -> None:
    """Wait for an accelerator that works asynchronously."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """`eval` mode, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _methods(model: nn.Module) -> list[SparseKAttention]:
    methods = methods_in_use(model)
    if not methods:
        raise ValueError(
            f"expected a model with sparse attention, got a {type(model).__name__} without; "
            "use hf_sparse.patch, peft.get_peft_model or hf_sparse.from_pretrained first"
        )
    return methods


def _check(
    model: Any,
    chunks: Tensor,
    labels: Tensor | None,
    slots: int,
    selections: Sequence[str],
    batch_size: int,
    speed_tokens: int,
) -> None:
    check_chunks(model, chunks, labels)
    length = chunks.shape[1]
    if length <= slots:
        raise DataError(
            f"nothing is evicted: the budget of {slots} slots (sinks + window + k) covers the whole text of {length} "
            "tokens; use longer chunks or a smaller budget"
        )
    known = selections_of(model)
    if not selections or not set(selections) <= set(known):
        raise ValueError(f"selections must be among {', '.join(known)}, got {list(selections)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if speed_tokens < 1:
        raise ValueError(f"speed_tokens must be at least 1, got {speed_tokens}")
