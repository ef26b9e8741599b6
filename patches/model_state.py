"""Tell whether a model is as it was when a forward of it was recorded."""

from collections.abc import Hashable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all_modules

from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.patches.recorded_steps import collects_states

_PLAIN = frozenset((bool, int, float, str, type(None), torch.dtype))
_KEPT = _PLAIN | {Tensor}
_TENSORS = frozenset((Tensor, nn.Parameter))  # others compute with memory that is not theirs
_CONTAINERS = frozenset((list, dict, tuple, set))
_OF_EVERY_MODULE = len(vars(nn.Module()))  # attributes, of which `training` comes first


def state_of(model: nn.Module, device: torch.device, ours: set[int]) -> Hashable | None:
    """Return what decides in a model which kernels its forward launches, on which memory.

    That is where its tensors lie, and what its modules and configurations hold as plain values; a module of PEFT says
    in lists and dictionaries which adapters it uses. Weights may change in place.

    Args:
        model: of transformers.
        device: of all its tensors.
        ours: numbers of the hooks that a recording repeats.

    Returns:
        `None` if a recording would not repeat the forward: there are hooks of others, a replaced or a compiled forward,
        training, tensors elsewhere or of other kinds, or rotary positions that depend on the length of the text.
    """
    if hooks_of_all_modules._global_forward_hooks or hooks_of_all_modules._global_forward_pre_hooks or model.training:
        return None
    state = _settings()
    config: Any = model.config
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        state += [value for value in vars(part).values() if type(value) in _PLAIN]
    stack: list[nn.Module | None] = [model]
    seen: set[int] = set()
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        own = vars(module)
        if "forward" in own or own.get("_compiled_call_impl") is not None:
            return None
        before, after = own["_forward_pre_hooks"], own["_forward_hooks"]
        if before and not ours.issuperset(before):
            return None
        if after and not all([number in ours or collects_states(hook) for number, hook in after.items()]):
            return None
        if "rope_type" in own and _depends_on_length(own["rope_type"]):
            return None
        state += (type(module), type(module).forward)
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is None:
                state.append(None)
            elif type(tensor) in _TENSORS and tensor.device == device and tensor.layout is torch.strided:
                state += _place_of(tensor)
            else:
                return None
        values = _own_values(own)
        has_adapters = "_active_adapter" in own  # an instance check, of an abstract class, takes longer
        is_ours = has_adapters and isinstance(module, SparseAttentionLayer)  # its `recording_key` says what it computes
        if is_ours:  # what its first forward keeps for the next ones was `None`
            values = [value for value in values if value is not None]
        state.append(own["training"])
        state += [_place_of(value) if type(value) is Tensor else value for value in values if type(value) in _KEPT]
        if has_adapters and not is_ours:
            state += [repr(value) for value in own.values() if type(value) in _CONTAINERS]
        stack.extend(own["_modules"].values())
    return tuple(state)


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor lies, and how its numbers are read."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _own_values(attributes: dict[str, Any]) -> Iterable[Any]:
    """Return the attributes that a module has beside those of every module, which are most of them."""
    comes_first = next(iter(attributes)) == "training"  # none was set before those of every module
    return islice(attributes.values(), _OF_EVERY_MODULE if comes_first else 0, None)


def _settings() -> list[Any]:
    """Return the settings of torch that choose among its kernels."""
    backend = torch.backends.cuda
    every: Any = torch.backends
    return [
        every.fp32_precision,
        backend.matmul.fp32_precision,
        backend.matmul.allow_fp16_accumulation,
        backend.matmul.allow_fp16_reduced_precision_reduction,
        backend.matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        backend.flash_sdp_enabled(),
        backend.mem_efficient_sdp_enabled(),
        backend.math_sdp_enabled(),
        backend.cudnn_sdp_enabled(),
    ]


def _depends_on_length(rope_type: Any) -> bool:
    """Tell whether rotary positions are computed anew for long texts: of one kind, or of one for each kind of layer."""
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)
