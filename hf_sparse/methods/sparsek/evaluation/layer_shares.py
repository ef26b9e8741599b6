"""Measure what each layer loses by having few slots, and divide a budget among the layers accordingly."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_sparse.errors import DataError
from hf_sparse.methods.sparsek.evaluation.contenders import budget_of, sparsek_layers
from hf_sparse.methods.sparsek.evaluation.damages import damages

_POWERS = (0.2, 3.0)  # of damage against slots; what lies beyond is noise
_RANGE = 4.0  # no layer gets more than so many times the mean, or less than that part of it


def layer_damages(
    model: nn.Module, chunks: Tensor, slots: int, *, batch_size: int = 1, progress: bool = True
) -> dict[int, float]:
    """Return the KL divergence from dense attention, in nats per token, that each layer causes while others are dense.

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
    sparse_layers, length = sparsek_layers(model), chunks.shape[1]
    if length <= slots:
        raise DataError(f"nothing is evicted: {slots} slots cover the whole text of {length} tokens")
    layers = [layer.layer for layer in sparse_layers]

    def alone(layer: int | None) -> dict[str, Any]:  # a layer whose budget covers the text is dense
        shares = [1.0 if other == layer else float(length) for other in range(max(layers) + 1)]
        return {**budget_of(model).resized(slots)._asdict(), "layer_shares": shares, "head_shares": None}

    ways = {layer: alone(layer) for layer in layers}
    label = f"layers, {slots} slots"
    return damages(model, chunks, ways, alone(None), label, batch_size=batch_size, progress=progress)


def divide_layers(
    model: nn.Module, chunks: Tensor, *, batch_size: int = 1, progress: bool = True
) -> tuple[list[float], dict[int, dict[int, float]]]:
    """Return shares of the budget for the layers, by what each loses at half and at twice the adapter's slots.

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
    config, slots = sparsek_layers(model)[0].config, budget_of(model).slots
    sizes = (max(slots // 2, config.sinks + 2), 2 * slots)
    by_size = {
        size: layer_damages(model, chunks, size, batch_size=batch_size, progress=progress) for size in reversed(sizes)
    }
    few, many = (list(by_size[size].values()) for size in sizes)
    shares = dict(zip(by_size[sizes[0]], best_shares(few, many, sizes), strict=True))
    total = (config.base_shape or {})["num_attention_layers"]
    return [shares.get(layer, 1.0) for layer in range(total)], by_size


def best_shares(
    few: Sequence[float], many: Sequence[float], sizes: tuple[int, int], *, way: float = 0.5, least: float = 0.0
) -> list[float]:
    """Return shares, 1 on average, on the way from equal ones to those for which damages `c n^-p` have the least sum.

    Args:
        few, many: damages at the smaller and at the larger of two `sizes`.
        way: how far to go, 0 to 1.
        least: no share is smaller.
    """
    low, high = sizes
    powers = [math.log(max(a, 1e-9) / max(b, 1e-9)) / math.log(high / low) for a, b in zip(few, many, strict=True)]
    powers = [min(max(power, _POWERS[0]), _POWERS[1]) for power in powers]
    # Where the sum is smallest, one more slot gains every part the same: c p n^-(p + 1) is a constant, exp(-level).
    gains = [max(a, 1e-9) * power for a, power in zip(few, powers, strict=True)]  # with n in units of `low`
    mean = math.sqrt(high / low)

    def shares(level: float) -> list[float]:
        pairs = zip(gains, powers, strict=True)
        counts = [(math.exp(level) * gain) ** (1 / (1 + power)) / mean for gain, power in pairs]
        bounded = [min(max(count, 1 / _RANGE), _RANGE) for count in counts]
        return [max(least, 1 + way * (count - 1)) for count in bounded]

    bottom, top = -60.0, 60.0
    for _ in range(100):
        level = (bottom + top) / 2
        bottom, top = (level, top) if sum(shares(level)) < len(few) else (bottom, level)
    return [round(share, 4) for share in shares(top)]
