"""Tell which inputs of a model are those of a prompt that can be recorded, and what replays of it need of them."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse._compat import with_cache
from hf_sparse.ops.triton import is_on_gpu

CACHE = next(iter(with_cache(None)))  # the name of the cache among the inputs
_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict", CACHE}


def may_be_played(modules: Sequence[nn.Module], inputs: dict[str, Any]) -> bool:
    """Tell whether inputs, and what is set for all of torch, are those of a prompt that may be recorded."""
    ids, cache, to_keep = inputs.get("input_ids"), inputs.get(CACHE), inputs.get("logits_to_keep")
    positions, mask = inputs.get("position_ids"), _mask(inputs)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2 or not is_on_gpu(ids):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type):
        return False
    if type(to_keep) is not int or to_keep != 1 or not inputs.get("use_cache") or not inputs.get("return_dict"):
        return False
    if not all([name in _INPUTS or _says_nothing(value) for name, value in inputs.items()]):
        return False
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != ids.shape[1]):
        return False
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        return False
    layers: Any = getattr(cache, "layers", ())
    if [module.layer_idx for module in modules] != list(range(len(layers))):
        return False
    return bool(layers) and not getattr(layers[0], "is_initialized", True)


def _mask(inputs: dict[str, Any]) -> Any:
    """Return the mask of a prompt; `None` if there is none for any kind of layer."""
    mask = inputs.get("attention_mask")
    return None if isinstance(mask, dict) and all([part is None for part in mask.values()]) else mask


def has_padding(inputs: dict[str, Any]) -> bool:
    """Tell whether a mask hides tokens; this waits for nothing where the prompt is the first that is launched."""
    mask = _mask(inputs)
    return mask is not None and not bool(mask.all())


def is_in_range(inputs: dict[str, Any], vocabulary: int, length: int) -> bool:
    """Tell whether there is no padding, and neither a token nor a position that a recording has no embedding for.

    Args:
        inputs: of a prompt.
        vocabulary: rows of the embeddings of tokens.
        length: of the recording; where positions have embeddings, there are as many at least.
    """
    ids, positions, mask = inputs["input_ids"], inputs.get("position_ids"), _mask(inputs)
    bounds = [(ids, vocabulary)] if positions is None else [(ids, vocabulary), (positions, length)]
    values = [value.long() for tensor, _ in bounds for value in tensor.aminmax()]
    if mask is not None:
        values.append(mask.all().long())
    if any([value.device != ids.device for value in values]):
        return False
    found = torch.stack(values).tolist()  # waits for nothing, as `has_padding` does
    if mask is not None and not found.pop():
        return False
    return all([found[2 * i] >= 0 and found[2 * i + 1] < most for i, (_, most) in enumerate(bounds)])


def kind_of(inputs: dict[str, Any]) -> Hashable:
    """Return what has to be the same of the inputs of a replay, beside the length."""
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    return len(ids), ids.dtype, ids.device, None if positions is None else (len(positions), positions.dtype)


def _says_nothing(value: Any) -> bool:
    """Tell whether an input is as if it were not there, such as the outputs of encoders of pictures without any."""
    return value is None or value is False or (isinstance(value, dict) and not value)
