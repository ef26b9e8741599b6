"""What sparse attention costs in quality and saves in memory: perplexity at equal slots, KV bytes, decoding speed."""

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
from hf_sparse.data import check_chunks, fingerprint
from hf_sparse.errors import DataError
from hf_sparse.methods.sparsek import SparseKAttention, SparseKCacheLayer
from hf_sparse.methods.sparsek.selection import POLICIES
from hf_sparse.patches import methods_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FORMAT = 1

#: What attends: the base model, the baselines at equal slots, and the trained scorers.
SELECTIONS = ("dense", *POLICIES, "learned")

_REPEATS = 3  # of the speed measurement; the median of three survives one slow start
_SLICE = 512  # positions whose logits are float32 at a time


def evaluate(
    model: "PeftModel | PreTrainedModel",
    chunks: Tensor,
    *,
    selections: Sequence[str] = SELECTIONS,
    batch_size: int = 1,
    speed_tokens: int = 64,
    progress: bool = True,
    text_name: str = "",
) -> dict[str, Any]:
    """Measure a patched model on text, against dense attention and against baselines with as many slots.

    The model comes back as it was: its mode, its policies, and whether it is switched on.

    Args:
        model: a `PeftModel` or a model patched by `hf_sparse.patch`.
        chunks: `[N, T]` int64 tokens, `T` larger than the slots, see `hf_sparse.data.pack`.
        selections: which perplexities, of `"dense"`, `"recency"`, `"random"` and `"learned"`.
        batch_size: chunks at a time.
        speed_tokens: tokens that are decoded to measure speed: the last ones of the first chunk, after the others as
            the prompt; fewer where the chunk is not that long.
        progress: show a progress bar on stderr.
        text_name: what the text is called in the result.

    Returns:
        What `eval.json` holds: perplexity per token of every position but the first of each chunk; bytes of keys and
        values after one chunk (for the sparse cache also its bookkeeping, the scores and positions of its slots);
        tokens per second of decoding one sequence.

    Raises:
        DataError: chunks that cannot be measured.
        ValueError: a model that is not patched, or options out of range.
    """
    config = _methods(model)[0].config
    _check(model, chunks, config.slots, selections, batch_size, speed_tokens)
    with _evaluating(model):
        perplexities = {}
        for name in selections:
            with selection(model, name):
                perplexities[name] = perplexity(model, chunks, batch_size=batch_size, progress=progress and name)
        memory, speed = _decoding(model, chunks[:1], min(speed_tokens, chunks.shape[1] - 1))
    count, length = chunks.shape
    return {
        "format": FORMAT,
        "base_model": config.base_model_name_or_path or model.config.name_or_path,
        "budget": {"k": config.k, "window": config.window, "sinks": config.sinks, "slots": config.slots},
        "text": {
            "name": text_name,
            "sha256": fingerprint(chunks),
            "chunks": count,
            "length": length,
            "predicted_tokens": count * (length - 1),
        },
        "perplexity": perplexities,
        "kv_bytes": memory,
        "tokens_per_second": speed,
        **machine.describe(),
    }


@contextmanager
def selection(model: nn.Module, name: str) -> Iterator[None]:
    """Let `name` choose the keys within a `with` block, whatever happens in it.

    Args:
        model: a patched model.
        name: `"dense"` switches sparse attention off; `"recency"` and `"random"` are baselines with as many slots;
            `"learned"` is the scorers.

    Raises:
        ValueError: another name, or a model that is not patched.
    """
    methods = _methods(model)
    if name not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {name!r}")
    before = [(method, method.policy, method.disable_adapters) for method in methods]
    try:
        for method in methods:
            method.policy = POLICIES.get(name)
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
    device = next(model.parameters()).device
    batches: Any = chunks.split(batch_size)
    if progress:
        label = f"perplexity, {progress}"
        batches = track(batches, label, console=Console(stderr=True), transient=True)
    total = 0.0
    for batch in batches:
        tokens = batch.to(device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
        for some, target in zip(logits.split(_SLICE, 1), tokens[:, 1:].split(_SLICE, 1), strict=True):
            losses = F.cross_entropy(some.float().transpose(1, 2), target, reduction="none")
            total += losses.double().sum().item()
    return math.exp(total / (chunks.shape[0] * (chunks.shape[1] - 1)))


def kv_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a transformers cache."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def table(result: dict[str, Any]) -> Table:
    """What `evaluate` returned, for people."""
    text, budget, memory, speed = (result[key] for key in ("text", "budget", "kv_bytes", "tokens_per_second"))
    caption = f"{text['chunks']} chunks of {text['length']} tokens" + (f" of {text['name']}" if text["name"] else "")
    parts = f"{budget['sinks']} sinks, window {budget['window']}, {budget['k']} selected"
    view = Table(title=f"{result['base_model']}: {parts}", caption=caption)
    view.add_column("attention")
    for header in ("keys per query", "perplexity", f"KV cache at {memory['tokens']} tokens", "decoding, tokens/s"):
        view.add_column(header, justify="right")
    for name, value in result["perplexity"].items():
        dense = name == "dense"
        view.add_row(
            name,
            f"up to {text['length'] if dense else budget['slots']}",
            f"{value:.2f}",
            readable_bytes(memory["dense" if dense else "sparse"]),
            # The baselines run the same code as the scorers, which alone were timed.
            f"{speed['dense' if dense else 'sparse']:.1f}" if name in ("dense", "learned") else "",
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
    methods = methods_of(model)
    if not methods:
        raise ValueError(
            f"expected a model with sparse attention, got a {type(model).__name__} without; "
            "use hf_sparse.patch, peft.get_peft_model or hf_sparse.from_pretrained first"
        )
    return methods


def _check(
    model: Any, chunks: Tensor, slots: int, selections: Sequence[str], batch_size: int, speed_tokens: int
) -> None:
    check_chunks(model, chunks)
    length = chunks.shape[1]
    if length <= slots:
        raise DataError(
            f"nothing is evicted: the budget of {slots} slots (sinks + window + k) covers the whole text of {length} "
            "tokens; use longer chunks or a smaller budget"
        )
    unknown = [name for name in selections if name not in SELECTIONS]
    if unknown or not selections:
        raise ValueError(f"selections must be among {', '.join(SELECTIONS)}, got {list(selections)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if speed_tokens < 1:
        raise ValueError(f"speed_tokens must be at least 1, got {speed_tokens}")
