"""Measure what each KV head loses by selecting few keys, and divide the selected keys among the heads accordingly."""

from typing import Any

from torch import Tensor, nn

from hf_sparse.errors import DataError
from hf_sparse.methods.sparsek.evaluation.contenders import sparsek_layers
from hf_sparse.methods.sparsek.evaluation.damages import damages
from hf_sparse.methods.sparsek.evaluation.layer_shares import best_shares

Head = tuple[int, int]  # layer, and head in it

_ROUNDED = 2e-4  # by so much may the smallest share, and the mean of all, be rounded


def head_damages(
    model: nn.Module, chunks: Tensor, k: int, *, batch_size: int = 1, progress: bool = True
) -> dict[Head, float]:
    """Return the KL divergence from dense attention that each KV head causes while others are dense, in nats per token.

    Args:
        model: a patched causal language model; it comes back as it was.
        chunks: `[N, T]` int64, `T` larger than the slots of a head with `k` selected keys.
        k: selected keys of the sparse head, beside the adapter's window and sinks.
        batch_size, progress: see `damages`.

    Returns:
        By layer, counted among the attention layers of the model, and head, for the layers that are patched.

    Raises:
        DataError: chunks that cannot be measured.
        ValueError: a model that is not patched, or a `batch_size` below 1.
    """
    layers, length = sparsek_layers(model), chunks.shape[1]
    config = layers[0].config
    if length <= k + config.window + config.sinks:
        slots = k + config.window + config.sinks
        raise DataError(f"nothing is evicted: {slots} slots cover the whole text of {length} tokens")
    heads = [(layer.layer, head) for layer in layers for head in range(layer.num_key_value_heads)]
    rows, columns = max(layer.layer for layer in layers) + 1, max(layer.num_key_value_heads for layer in layers)

    def alone(only: Head | None) -> dict[str, Any]:  # a head that selects as many keys as the text has is dense
        shares = [[1.0 if (row, head) == only else float(length) for head in range(columns)] for row in range(rows)]
        return {"k": k, "pin_prompt": 0, "layer_shares": None, "head_shares": shares}

    ways = {head: alone(head) for head in heads}
    return damages(
        model, chunks, ways, alone(None), f"heads, {k} selected keys", batch_size=batch_size, progress=progress
    )


def divide_heads(
    model: nn.Module, chunks: Tensor, *, batch_size: int = 1, progress: bool = True
) -> tuple[list[list[float]], dict[int, dict[Head, float]]]:
    """Return shares of `k` for the KV heads, by what each loses at half and at twice the adapter's selected keys.

    As `divide_layers` does it, but all the way to the smallest sum of damages, which on SmolLM2-135M was better than
    half of it (docs/experiments.md): no head gets less than a quarter of the mean, or more than four times as much.
    Window and sinks stay those of all heads.

    Args:
        model, chunks, batch_size, progress: as for `head_damages`. Where twice the selected keys are all that a chunk
            has, the adapter's own number takes their place.

    Returns:
        `SparseKConfig.head_shares`, with 1 for the heads of layers that are not patched, and the damages by selected
        keys and head.

    Raises:
        DataError: as `head_damages`, or an adapter that selects one key, which cannot be divided.
        ValueError: as `head_damages`.
    """
    layers = sparsek_layers(model)
    config, k = layers[0].config, layers[0].config.k
    if k < 2:
        raise DataError("the adapter selects one key for each head (k=1), which cannot be divided among heads")
    fits = 2 * k + config.window + config.sinks < chunks.shape[1]
    sizes = (k // 2, 2 * k if fits else k)
    by_size = {k: head_damages(model, chunks, k, batch_size=batch_size, progress=progress) for k in reversed(sizes)}
    few, many = (list(by_size[size].values()) for size in sizes)
    least = (1 + max(0, config.pin_prompt - config.sinks)) / k + _ROUNDED  # a selected key beside those that are pinned
    shares = dict(zip(by_size[sizes[0]], best_shares(few, many, sizes, way=1.0, least=least), strict=True))
    total = (config.base_shape or {})["num_attention_layers"]
    heads = range(layers[0].num_key_value_heads)
    return [[shares.get((layer, head), 1.0) for head in heads] for layer in range(total)], by_size
