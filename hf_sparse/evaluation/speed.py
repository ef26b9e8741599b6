"""Measure bytes of keys and values, and tokens per second."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse._compat import cache_of, with_cache
from hf_sparse.evaluation.switching import evaluation_of, using
from hf_sparse.patches.cache import kv_bytes

_REPEATS = 3  # the median of three survives one slow start


@torch.no_grad()
def decoding(model: nn.Module, chunk: Tensor, new_tokens: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return KV bytes at the end of a chunk `[1, T]`, and the speed of decoding its last tokens, dense and sparse.

    The chunk's own tokens are fed, not sampled ones: both do exactly the same steps.
    """
    memory: dict[str, int] = {}
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(_REPEATS):
        for kind in times:  # in turn, so that a slow moment of the machine hits both
            with using(model, "dense" if kind == "dense" else "learned"):
                cache, seconds = _decode(model, chunk, new_tokens)
            times[kind].append(seconds)
            memory[kind] = kv_bytes(cache)
    memory["sparse_bookkeeping"] = evaluation_of(model).bookkeeping_bytes(cache)
    memory["tokens"] = chunk.shape[1]
    speed: dict[str, Any] = {kind: new_tokens / statistics.median(values) for kind, values in times.items()}
    return memory, {**speed, "new_tokens": new_tokens}


@torch.no_grad()
def forward_speed(model: nn.Module, chunks: Tensor) -> dict[str, Any]:
    """Return the tokens per second of the forward over chunks `[B, T]`, dense and sparse."""
    tokens = chunks.to(next(model.parameters()).device)
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(_REPEATS):
        for kind in times:
            with using(model, "dense" if kind == "dense" else "learned"):
                _finish(tokens.device)
                start = time.perf_counter()
                model(input_ids=tokens)
                _finish(tokens.device)
                times[kind].append(time.perf_counter() - start)
    speed: dict[str, Any] = {kind: tokens.numel() / statistics.median(values) for kind, values in times.items()}
    return {**speed, "batch_size": len(tokens), "length": tokens.shape[1]}


def _decode(model: nn.Module, chunk: Tensor, new_tokens: int) -> tuple[Any, float]:
    """Return the cache after a chunk `[1, T]`, and the seconds that its last `new_tokens` took, one by one."""
    tokens = chunk.to(next(model.parameters()).device)
    cache = cache_of(model(input_ids=tokens[:, :-new_tokens], use_cache=True))
    _finish(tokens.device)
    start = time.perf_counter()
    for token in tokens[:, -new_tokens:].split(1, dim=1):
        cache = cache_of(model(input_ids=token, **with_cache(cache), use_cache=True))
    _finish(tokens.device)
    return cache, time.perf_counter() - start


def _finish(device: torch.device) -> None:
    """Wait for an accelerator that works asynchronously."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
