"""Tell which inputs of a model are those of a prompt that can be recorded, and what replays of it need of them."""

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from hf_sparse._compat import with_cache
from hf_sparse.core.cache import is_recorded
from hf_sparse.ops.triton import is_on_gpu

CACHE = next(iter(with_cache(None)))  # the name of the cache among the inputs
_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict", CACHE}
_MOST_TOKENS = 16384  # of all rows of a recorded prompt; beyond, Python is a small part of it, and memory a large one
_STEP = 64  # between buckets; above eight times as many tokens an eighth of the power of two below


def may_be_played(inputs: dict[str, Any]) -> bool:
    """Tell whether inputs, and what is set for all of torch, are those of a prompt that may be recorded."""
    ids, cache = inputs.get("input_ids"), inputs.get(CACHE)
    positions, mask = inputs.get("position_ids"), _mask(inputs)
    if type(ids) is not Tensor or ids.ndim != 2 or ids.shape[1] < 2 or not is_on_gpu(ids):
        return False
    if _is_looked_at():
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type) or is_recorded(ids.device):
        return False
    if inputs.get("return_dict") not in (None, True):
        return False
    if not all([name in _INPUTS or _says_nothing(name, value) for name, value in inputs.items()]):
        return False
    if positions is not None and (positions.ndim != 2 or positions.shape[1] != ids.shape[1]):
        return False
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        return False
    if cache is None:  # without a mask, positions may begin again where another text does
        return positions is None or mask is not None
    layers: Any = getattr(cache, "layers", ())
    return bool(layers) and not getattr(layers[0], "is_initialized", True)


def keeps_keys(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Tell whether the forward of a model makes a cache where it is given none."""
    wanted, config = inputs.get("use_cache"), getattr(model, "config", None)
    if wanted is None:
        wanted = getattr(config, "use_cache", None)
    if wanted is None and config is not None:
        wanted = getattr(config.get_text_config(), "use_cache", False)
    return bool(wanted)


def _mask(inputs: dict[str, Any]) -> Any:
    """Return the mask of a prompt; `None` if there is none for any kind of layer."""
    mask = inputs.get("attention_mask")
    return None if isinstance(mask, dict) and all([part is None for part in mask.values()]) else mask


def has_padding(inputs: dict[str, Any]) -> bool:
    """Tell whether a mask hides tokens; this waits for the device, which has nothing to do before a first prompt."""
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


def bucket_of(model: nn.Module, rows: int, tokens: int, edges: Iterable[int]) -> int | None:
    """Return the length at which a prompt of so many tokens is recorded; `None` if it is too long.

    Where torch is to be deterministic that is its own: padding may change which kernels multiply its matrices.

    Args:
        model: of transformers, whose positions end the last bucket.
        rows: of the prompt.
        tokens: of each row.
        edges: lengths that padding must not take a prompt past, see `SparseAttentionLayer.prompt_edge`.

    >>> model = torch.nn.Module()
    >>> model.config = type("Config", (), {"get_text_config": lambda self: self, "max_position_embeddings": 2000})()
    >>> [bucket_of(model, 1, tokens, [200, 300]) for tokens in (100, 199, 201, 301, 513, 1025, 1950, 2001)]
    [128, 200, 256, 320, 576, 1152, 2000, None]
    >>> [bucket_of(model, 16, tokens, []) for tokens in (1000, 1024, 1025)]
    [1024, 1024, None]
    """
    config: Any = model.config
    longest = _MOST_TOKENS // rows
    most = min(getattr(config.get_text_config(), "max_position_embeddings", None) or longest, longest)
    if tokens > most:
        return None
    if torch.are_deterministic_algorithms_enabled():
        return tokens
    step = max(_STEP, 1 << (tokens - 1).bit_length() - 1 >> 3)
    return min(-(-tokens // step) * step, most, *[edge for edge in edges if edge >= tokens])


def is_unusual(model: nn.Module) -> bool:
    """Tell whether a model is quantised, which may mix tokens, or returns more than its last hidden states."""
    config: Any = model.config
    parts = [vars(part) for part in (config, config.get_text_config())]
    asks = [name for part in parts for name, value in part.items() if name.lstrip("_").startswith("output_") and value]
    crosses = getattr(config, "add_cross_attention", False)  # has a cache of its own kind
    return bool(getattr(config, "quantization_config", None) or asks or crosses)


def _says_nothing(name: str, value: Any) -> bool:
    """Tell whether an input is as if it were not there, such as the outputs of encoders of pictures without any."""
    return value is None or (isinstance(value, dict) and not value) or (value is False and name.startswith("output_"))


def _is_looked_at() -> bool:
    """Tell whether something of torch watches each operation, or computes more with it, which a replay would not do.

    That are modes, as those that count operations, transforms of functions, and derivatives in forward mode.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    modes = [torch._C._get_function_stack_at(place) for place in range(torch._C._len_torch_function_stack())]
    return forward_ad._current_level >= 0 or any([type(mode) is not DeviceContext for mode in modes])
