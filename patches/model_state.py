"""Tell whether a model is as it was when a forward of it was recorded."""

import weakref
from collections.abc import Hashable
from itertools import chain, islice
from operator import attrgetter, itemgetter
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
_device, _layout = attrgetter("device"), attrgetter("layout")
_OF_MEMORY = (Tensor.data_ptr, attrgetter("dtype"), attrgetter("shape"), Tensor.stride)
_parameters_and_buffers = itemgetter("_parameters", "_buffers")
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
    stack: list[Any] = [model]
    seen: set[int] = set()
    tensors: list[Any] = []
    values: list[Any] = []
    while stack:  # few steps for each module, of which there are hundreds: a prompt waits for it
        module = stack.pop()
        if module is None:
            continue
        own = module.__dict__
        if children := own["_modules"]:
            if id(module) in seen:
                continue
            seen.add(id(module))
            stack += children.values()
        if "forward" in own or own.get("_compiled_call_impl") is not None:
            return None
        if (hooks := own["_forward_pre_hooks"]) and not ours.issuperset(hooks):
            return None
        if (hooks := own["_forward_hooks"]) and not all([n in ours or collects_states(hooks[n]) for n in hooks]):
            return None
        if "rope_type" in own and _depends_on_length(own["rope_type"]):
            return None
        kind: Any = type(module)
        state += (kind, getattr(kind, "unpatched_class", kind).forward, own["training"])
        for held in (own["_parameters"], own["_buffers"]):
            if held:
                tensors += held.values()
        common = _OF_EVERY_MODULE if next(iter(own)) == "training" else 0  # first, unless one was set before them
        others = islice(own.values(), common, None)
        if "_active_adapter" not in own:
            values += others
        elif isinstance(module, SparseAttentionLayer):  # its `recording_key` says what it computes
            values += [value for value in others if value is not None]  # `None` will be what its first forward keeps
        else:
            values += others
            values += [repr(value) for value in own.values() if type(value) in _CONTAINERS]
    state += [tensor is None for tensor in tensors]
    found = [tensor for tensor in tensors if tensor is not None]
    if not _TENSORS.issuperset(map(type, found)) or {*map(_device, found)} != {device}:
        return None
    kept = [value for value in values if type(value) in _KEPT]
    state += [None if type(value) is Tensor else value for value in kept]
    found += [value for value in kept if type(value) is Tensor]
    if {*map(_layout, found)} != {torch.strided}:
        return None
    for what in _OF_MEMORY:
        state += map(what, found)
    return tuple(state)


class ReadMemory:
    """Tell whether all tensors of a model are still where they were, so that a recording can read them.

    It refers to modules, and weakly: nothing is kept alive, and torch can swap tensors, which it refuses for those that
    are weakly referred to. What has the address and the extent of a tensor is on its device, for no two devices share
    an address.

    Args:
        model: of transformers, all of whose tensors have strides.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if module._parameters or module._buffers]
        self._modules = [weakref.ref(module) for module in modules]
        self._others = [
            (weakref.ref(module), name)
            for module in model.modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        ]
        self._memory = self._look()

    def are_there(self) -> bool:
        """Tell whether no tensor was moved, replaced or freed."""
        return self._memory is not None and self._look() == self._memory

    def _look(self) -> list[list[Any]] | None:
        """Return where the tensors are, and how large; `None` if that cannot be said of all."""
        modules = [reference() for reference in self._modules]
        others = [(reference(), name) for reference, name in self._others]
        if None in modules or any([module is None for module, _ in others]):
            return None
        held = chain.from_iterable(map(_parameters_and_buffers, map(vars, modules)))
        found = [tensor for tensor in chain.from_iterable(map(dict.values, held)) if tensor is not None]
        found += [vars(module).get(name) for module, name in others]
        if not _TENSORS.issuperset(map(type, found)) or {*map(_layout, found)} != {torch.strided}:
            return None
        return [[*map(what, found)] for what in _OF_MEMORY]


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
