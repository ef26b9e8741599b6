"""Measure what each layer loses by having few slots, and divide a budget among the layers accordingly."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_sparse.core.overrides import override
from hf_sparse.data import check_chunks
from hf_sparse.errors import DataError
from hf_sparse.evaluation.quality import kl, logits_of
from hf_sparse.evaluation.switching import evaluating, using
from hf_sparse.methods.sparsek.evaluation.contenders import budget_of, sparsek_layers
from hf_sparse.progress import tracked

_SLICE = 256  # positions whose logits are float32 at a time
_POWERS = (0.2, 3.0)  # of damage against slots; what lies beyond is noise
_RANGE = 4.0  # no layer gets more than so many times the mean, or less than that part of it


@torch.no_grad()
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
    check_chunks(model, chunks)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    sparse_layers, length = sparsek_layers(model), chunks.shape[1]
    if length <= slots:
        raise DataError(f"nothing is evicted: {slots} slots cover the whole text of {length} tokens")
    config, layers = sparse_layers[0].config, [layer.layer for layer in sparse_layers]
    sums, device = dict.fromkeys(layers, 0.0), next(model.parameters()).device
    steps: list[tuple[Tensor, int | None]] = [
        (tokens, layer) for tokens in chunks.split(batch_size) for layer in (None, *layers)
    ]
    with evaluating(model), using(model, "learned", budget_of(model).resized(slots)):
        for tokens, layer in tracked(steps, f"layers, {slots} slots") if progress else steps:
            # A layer whose budget covers the text is dense.
            shares = [1.0 if other == layer else float(length) for other in range(max(layers) + 1)]
            with override([config], layer_shares=shares):
                logits = logits_of(model, tokens.to(device))[:, :-1]
            if layer is None:  # all are dense
                dense = logits
            else:
                slices = zip(dense.split(_SLICE, 1), logits.split(_SLICE, 1), strict=True)
                sums[layer] += sum(kl(*pair).double().sum().item() for pair in slices)
    return {layer: total / (len(chunks) * (length - 1)) for layer, total in sums.items()}


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
    damages = {
        size: layer_damages(model, chunks, size, batch_size=batch_size, progress=progress) for size in reversed(sizes)
    }
    few, many = (list(damages[size].values()) for size in sizes)
    shares = dict(zip(damages[sizes[0]], best_shares(few, many, sizes), strict=True))
    total = (config.base_shape or {})["num_attention_layers"]
    return [shares.get(layer, 1.0) for layer in range(total)], damages


def best_shares(few: Sequence[float], many: Sequence[float], sizes: tuple[int, int]) -> list[float]:
    """Return the shares half way to those, 1 on average, for which damages `c n^-p` have the smallest sum.

    Args:
        few, many: damages at the smaller and at the larger of two `sizes`.
    """
    low, high = sizes
    powers = [math.log(max(a, 1e-9) / max(b, 1e-9)) / math.log(high / low) for a, b in zip(few, many, strict=True)]
    powers = [min(max(power, _POWERS[0]), _POWERS[1]) for power in powers]
    # Where the sum is smallest, one more slot gains every layer the same: c p n^-(p + 1) is a constant, exp(-level).
    gains = [max(a, 1e-9) * power for a, power in zip(few, powers, strict=True)]  # with n in units of `low`
    bottom, top = -60.0, 60.0
    total_slots = len(few) * math.sqrt(low * high) / low
    for _ in range(100):
        level = (bottom + top) / 2
        counts = [(math.exp(level) * gain) ** (1 / (1 + power)) for gain, power in zip(gains, powers, strict=True)]
        bottom, top = (level, top) if sum(counts) < total_slots else (bottom, level)
    mean = total_slots / len(few)
    counts = [min(max(count / mean, 1 / _RANGE), _RANGE) for count in counts]
    scale = len(counts) / sum(counts)
    return [round((1 + count * scale) / 2, 4) for count in counts]
