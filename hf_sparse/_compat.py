"""Reach into what other libraries do not promise: names of transformers and torch, and an enum of PEFT's.

Only this file does.

transformers 5.24 calls `cache` what was `past_key_values` before, in forwards, `generate` and their outputs. Either
name is taken from callers as transformers takes it; `with_cache` and `cache_of` use the one of the installed version.

PEFT has no registration for third-party methods: `peft.utils.register_peft_method` refuses names that are not members
of `PeftType`. With a member added, everything works as for PEFT's own methods: `PeftModel`, `AutoPeftModel` and
transformers' `load_adapter` alike. Enums are meant to be closed, so this writes the three tables that CPython keeps for
one. Checked by `tests/test_compat.py` on the versions that CI runs; drop it when PEFT offers entry points.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from inspect import getclosurevars
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_sparse.errors import CompatibilityError

#: Under which keywords attention modules of transformers get the cache; GPT-NeoX's is the last.
_ATTENTION_CACHE = ("cache", "past_key_values", "layer_past")

#: Under which name a model, `generate` and their outputs have it in the installed transformers.
_MODEL_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """Name a cache as the installed transformers does: keywords for a model's forward or `generate`."""
    return {_MODEL_CACHE: cache}


def cache_of(output: Any) -> Any:
    """Read the cache off the output of a model or of `generate`."""
    return getattr(output, _MODEL_CACHE)


def cache_given(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Find the cache among the arguments of an attention module; `None` if it was called without one.

    Raises:
        CompatibilityError: there is a cache where none is expected, and attention beside it would be dense in silence.
    """
    for name in _ATTENTION_CACHE:
        if name in kwargs:
            return kwargs[name]
    for place, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Cache):
            from transformers import __version__

            where = f"as {place}" if isinstance(place, str) else f"as its positional argument {place}"
            raise CompatibilityError(
                f"{type(module).__name__} was called with a {type(value).__name__} {where}, and hf-sparse knows caches "
                f"as {' or '.join(_ATTENTION_CACHE)}: transformers {__version__} may need a newer hf-sparse"
            )
    return None


def attention_implementation(config: Any) -> str | None:
    """Read the attention implementation off the config of a model.

    Every layer asks in every forward, and what transformers puts before attributes takes longer than the rest of that.
    """
    values = object.__getattribute__(config, "__dict__")
    known = values.get("_attn_implementation_internal")
    return config._attn_implementation if known is None else known


def private(module: str, name: str) -> Any:
    """Import a name of transformers that it does not promise to keep.

    Raises:
        CompatibilityError: it is not there.
    """
    from transformers import __version__

    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CompatibilityError(
            f"transformers {__version__} has no {module}.{name}, which hf-sparse needs. Install a transformers in the "
            "range that hf-sparse declares (pip install 'transformers>=5.17,<5.25') or a newer hf-sparse."
        ) from error


def texts_in_mask(mask_function: Any) -> Tensor | None:
    """Read which text each token belongs to, `[B, T]` int64, off a mask function: causal within packed texts.

    Returns `None` for every other mask function, and where transformers makes it in a way that is not known here.
    """
    functions = _caught(mask_function, "and_masks").get("mask_functions", ())
    if len(functions) != 2:
        return None
    within, texts = functions
    # Newer versions of transformers compare positions within the texts; within one, causal is the same.
    within = _caught(within, "remap_positions_for_packed_sequence").get("mask_function", within)
    if within is not getattr(masking_utils, "causal_mask_function", None):
        return None
    return _caught(texts, "packed_sequence_mask_function").get("packed_sequence_mask")


def _caught(function: Any, maker: str) -> Mapping[str, Any]:
    """Return the variables that a function holds of the function of transformers that made it; none of another."""
    if getattr(function, "__qualname__", "").startswith(f"{maker}.<locals>."):
        return getclosurevars(function).nonlocals
    return {}


def is_recorded_as_graph() -> bool:
    """Tell whether what runs on the current device is recorded as a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def texts_are_whole() -> Iterator[None]:
    """Spare forwards of whole texts, without positions of their own, the search for several texts packed into a row.

    transformers looks for those wherever there is neither a mask nor a cache. To read what it found waits for the
    device, and in the recording of a CUDA graph it attends as if there were some, with a mask `T x T`; there versions
    before 5.24 leave no causal mask to SDPA either.
    """
    module: Any = import_module("transformers.masking_utils")
    search, is_tracing = (private(module.__name__, name) for name in ("find_packed_sequence_indices", "is_tracing"))
    module.find_packed_sequence_indices = lambda *_, **__: None
    module.is_tracing = lambda *args: not is_recorded_as_graph() and is_tracing(*args)
    try:
        yield
    finally:
        module.find_packed_sequence_indices, module.is_tracing = search, is_tracing


@contextmanager
def recorded_gradients() -> Iterator[None]:
    """Let autograd record within an operator of `torch.library`, which runs below it."""
    keys = torch._C.DispatchKey
    with torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False), torch.enable_grad():
        yield


def extend_peft_type(name: str) -> Any:
    """Add the member `name` to `peft.PeftType` (once) and return it.

    Raises:
        CompatibilityError: PEFT's enum no longer works as this function expects.
    """
    from peft import PeftType, __version__

    if name in PeftType.__members__:
        return PeftType[name]
    try:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        member.__objclass__ = PeftType  # type: ignore[attr-defined]
        setattr(PeftType, name, member)  # before the tables know it: Enum refuses to reassign a member
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        works = PeftType(name) is PeftType[name] is getattr(PeftType, name) is member and member in list(PeftType)
    except (AttributeError, TypeError, ValueError) as error:
        raise CompatibilityError(_moved(__version__)) from error
    if not works:
        raise CompatibilityError(_moved(__version__))
    return member


def register_with_peft(name: str, *, config: type, tuner: type, prefix: str) -> None:
    """Make a method known to PEFT; does nothing the second time.

    Raises:
        CompatibilityError: PEFT no longer registers methods as this function expects.
    """
    from peft import __version__

    member = extend_peft_type(name)
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import register_peft_method

        if PEFT_TYPE_TO_CONFIG_MAPPING.get(member) is not config:
            register_peft_method(name=name.lower(), config_cls=config, model_cls=tuner, prefix=prefix)
    except (ImportError, TypeError, KeyError, ValueError) as error:
        raise CompatibilityError(_moved(__version__)) from error


def _moved(version: str) -> str:
    return (
        f"PEFT {version} registers its methods in a way that this version of hf-sparse does not know. Install a "
        "PEFT in the range that hf-sparse declares (pip install 'peft>=0.21,<0.22') or a newer hf-sparse."
    )
