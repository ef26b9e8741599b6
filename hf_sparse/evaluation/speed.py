"""Measure bytes of keys and values, and tokens per second."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from hf_sparse._compat import cache_of
from hf_sparse.evaluation.switching import evaluation_of, using
from hf_sparse.patches.cache import kv_bytes

_REPEATS = 3  # the median of three survives one slow start


@torch.no_grad()
def decoding(model: nn.Module, chunk: Tensor, new_tokens: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return KV bytes after as many tokens as a chunk `[1, T]` has, and the speed of `generate`, dense and sparse.

    The chunk without its last `new_tokens` is the prompt, whose time does not count; then so many steps are taken.
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


class _Clock(BaseStreamer):
    """Note when the prompt and each token come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _decode(model: Any, chunk: Tensor, new_tokens: int) -> tuple[Any, float]:
    """Return the cache of a greedy `generate` as long as a chunk `[1, T]`, and the seconds of its last steps."""
    prompt = chunk[:, :-new_tokens].to(next(model.parameters()).device)
    clock = _Clock()
    output = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        pad_token_id=0,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        streamer=clock,
        min_new_tokens=new_tokens + 1,  # the last one is not fed
        max_new_tokens=new_tokens + 1,
    )
    _, first, *others = clock.times
    return cache_of(output), others[-1] - first


def _finish(device: torch.device) -> None:
    """Wait for an accelerator that works asynchronously."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
