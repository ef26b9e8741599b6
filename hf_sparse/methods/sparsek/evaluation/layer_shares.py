"""How much each layer minds having few slots, and how a budget is best divided among the layers."""

import math
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from hf_sparse.core.overrides import override
from hf_sparse.data import check_chunks
from hf_sparse.errors import DataError
from hf_sparse.evaluation.quality import kl, logits_of
from hf_sparse.methods.sparsek.evaluation.budgets import at_budget, budget_of
from hf_sparse.methods.sparsek.evaluation.contenders import evaluating, patched_layers, selection

_SLICE = 256  # positions whose logits are float32 at a time
_POWERS = (0.2, 3.0)  # of damage against slots; what lies beyond is noise
_RANGE = 4.0  # no layer gets more than so many times the mean, or less than that part of it


@torch.no_grad()
def layer_damages(
    model: nn.Module, chunks: Tensor, slots: int, *, batch_size: int = 1, progress: bool = True
) -> dict[int, float]:
    """The KL divergence from dense attention, in nats per token, that each layer causes while all others are dense.

    An adapter's LoRA stays on in all of them.

    Args:
        model: a patched causal language model; it comes back as it was.
        chunks: `[N, T]` int64, `T` larger than `slots`.
        slots: KV pairs per KV head of the sparse layer, see `Budget.resized`.
        batch_size: chunks at a time.
        progress: show a progress bar on stderr.

    Returns:
        By index among the attention layers of the model, for the layers that are patched.

    Raises:
        DataError: chunks that cannot be measured.
        ValueError: a model that is not patched, or a `batch_size` below 1.
    """
    check_chunks(model, chunks)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    methods, length = patched_layers(model), chunks.shape[1]
    if length <= slots:
        raise DataError(f"nothing is evicted: {slots} slots cover the whole text of {length} tokens")
    config, layers = methods[0].config, [method.layer for method in methods]
    sums = dict.fromkeys(layers, 0.0)
    work = [(some, layer) for some in chunks.split(batch_size) for layer in (None, *layers)]
    label = f"layers, {slots} slots"
    with evaluating(model), at_budget(model, budget_of(model).resized(slots)), selection(model, "learned"):
        for some, layer in track(work, label, console=Console(stderr=True), transient=True, disable=not progress):
            # A layer whose budget covers the text is dense.
            shares = [1.0 if other == layer else float(length) for other in range(max(layers) + 1)]
            with override([config], layer_shares=shares):
                logits = logits_of(model, some.to(next(model.parameters()).device))[:, :-1]
            if layer is None:  # all are
                dense = logits
            else:
                parts = zip(dense.split(_SLICE, 1), logits.split(_SLICE, 1), strict=True)
                sums[layer] += sum(kl(*part).double().sum().item() for part in parts)
    return {layer: total / (len(chunks) * (length - 1)) for layer, total in sums.items()}


def divide_layers(
    model: nn.Module, chunks: Tensor, *, batch_size: int = 1, progress: bool = True
) -> tuple[list[float], dict[int, dict[int, float]]]:
    """Shares of the budget for the layers, by what each loses at half and at twice the adapter's slots.

    The damage of a layer is taken for a power law of its slots, and the sum of all damages is minimised for a fixed
    sum of slots. The shares returned are half way from equal ones to that minimum: the damages of layers do not just
    add up, and on SmolLM2-135M half the way was better than all of it (docs/experiments.md). Ours.

    Args:
        model, chunks, batch_size, progress: as for `layer_damages`; `T` larger than twice the slots.

    Returns:
        `SparseKConfig.layer_shares`, with 1 for layers that are not patched, and the damages by slots and layer.

    Raises:
        DataError, ValueError: as `layer_damages`.
    """
    methods = patched_layers(model)
    slots = budget_of(model).slots
    sizes = (max(slots // 2, methods[0].config.sinks + 2), 2 * slots)
    damages = {
        size: layer_damages(model, chunks, size, batch_size=batch_size, progress=progress) for size in reversed(sizes)
    }
    few, many = (list(damages[size].values()) for size in sizes)
    shares = dict(zip(damages[sizes[0]], best_shares(few, many, sizes), strict=True))
    total = (methods[0].config.base_shape or {})["num_attention_layers"]
    return [shares.get(layer, 1.0) for layer in range(total)], damages


def best_shares(few: Sequence[float], many: Sequence[float], sizes: tuple[int, int]) -> list[float]:
    """Half way to the shares, 1 on average, for which damages `c n^-p` have the smallest sum.

    Args:
        few, many: damages at the smaller and at the larger of two `sizes`.
    """
    low, high = sizes
    powers = [math.log(max(a, 1e-9) / max(b, 1e-9)) / math.log(high / low) for a, b in zip(few, many, strict=True)]
    powers = [min(max(power, _POWERS[0]), _POWERS[1]) for power in powers]
    # Where the sum is smallest, one more slot gains every layer the same: c p n^-(p + 1) is a constant, exp(-level).
    gains = [max(a, 1e-9) * power for a, power in zip(few, powers, strict=True)]  # with n in units of `low`
    bottom, top = -60.0, 60.0
    wanted = len(few) * math.sqrt(low * high) / low
    for _ in range(100):
        level = (bottom + top) / 2
        counts = [(math.exp(level) * gain) ** (1 / (1 + power)) for gain, power in zip(gains, powers, strict=True)]
        bottom, top = (level, top) if sum(counts) < wanted else (bottom, level)
    mean = wanted / len(few)
    counts = [min(max(count / mean, 1 / _RANGE), _RANGE) for count in counts]
    scale = len(counts) / sum(counts)
    return [round((1 + count * scale) / 2, 4) for count in counts]
