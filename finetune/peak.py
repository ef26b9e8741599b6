"""Compare a training step with the matrix products that its GPU could have done in the same time."""

from typing import Any

import torch
from torch import nn

from hf_sparse.finetune.sharding import size
from hf_sparse.model_kinds import transformers_model

# Operations per second of dense matrix products in half precision, of the data sheets, by a word in a GPU's name.
_PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "A10G": 125e12,
}

# How often a step on a loss multiplies all tokens by all weights: the teacher's forward, the student's, and the
# backward, which takes no more than a forward, for frozen weights have no gradient. Other losses take a forward.
_PASSES = {"distill": 3, "lm": 2}


def share_of_peak(
    model: nn.Module, loss: str, tokens_per_second: float, gpu: str, *, mixed_precision: str = "no"
) -> float | None:
    """Return the share of a GPU's peak that the matrix products of a training run take.

    Attention is not counted, nor what layers do again in the backward to save memory. The peak is that of half
    precision, also for a run in fp8.

    Args:
        model: with a frozen base.
        loss: the name of a stage of training.
        tokens_per_second: of one process.
        gpu: its name, as torch has it.
        mixed_precision: of accelerate.

    Returns:
        `None` for a GPU whose peak is not known here, and for weights that are not multiplied in half precision.
    """
    peak = next((_PEAKS[word] for word in gpu.replace("-", " ").split() if word in _PEAKS), None)
    dtypes = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    is_half = dtypes <= {torch.bfloat16, torch.float16} or (mixed_precision != "no" and dtypes <= {torch.float32})
    if peak is None or not is_half:
        return None
    base: Any = transformers_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    looked_up = 0 if head is not None and head.weight is embedding.weight else size(embedding.weight)
    weights = sum(map(size, model.parameters())) - looked_up
    return 2 * weights * _PASSES.get(loss, 1) * tokens_per_second / peak
