"""Open a base model by its name, from the configuration to the loaded model, whatever its files say.

They may be a stranger's, so the configuration is bounded before transformers builds anything from it, no pickle is
read, and no code that it names is fetched: neither modelling code nor kernels of attention.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from hf_sparse.atomic_files import read_object
from hf_sparse.bundled import BASE_NAME, CHECKPOINT
from hf_sparse.core.checks import shown
from hf_sparse.errors import HfSparseError, HubError
from hf_sparse.model_kinds import task_of
from hf_sparse.patches.base import check_model_type
from hf_sparse.patches.saving import INSIDE

#: Attention functions of transformers itself; it would fetch a kernel for any other name.
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")

_MOST_LAYERS = 1024  # one Python object and more for each, while a skeleton is built
_MOST_LABELS = 2**20
_MOST_SIZE = 2**31 - 1

_HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "force_download", "proxies")
_OF_LOADING = ("dtype", "torch_dtype", "quantization_config")  # in a configuration these mean something else


@dataclass(frozen=True)
class Base:
    """Describe a base model that is not loaded yet.

    Attributes:
        name: a folder, an id on the Hub or `"demo"`, as for `resolve_base`.
        config: its configuration, without what would be fetched for it.
        options: for `from_pretrained` of the model.
        is_full: whether its checkpoint holds an adapter of hf-sparse too; the base model is what is dense in it.
    """

    name: str
    config: PreTrainedConfig
    options: dict[str, Any]
    is_full: bool = False

    def skeleton(self, model_class: str | None = None) -> PreTrainedModel:
        """Build the model without weights, on the meta device.

        Args:
            model_class: see `hf_sparse.model_kinds.task_of`.

        Raises:
            ValueError: transformers has no class for its task, or cannot build one from the configuration.
        """
        config = copy.deepcopy(self.config)
        with usable("its config.json"), torch.device("meta"):
            return task_of(config, model_class).auto.from_config(config, trust_remote_code=False)

    def load(self, model_class: str | None = None) -> tuple[PreTrainedModel, set[str]]:
        """Load the model from safetensors.

        Args:
            model_class: see `hf_sparse.model_kinds.task_of`.

        Returns:
            The model, and the names of the parameters that the checkpoint did not hold, or in another shape.

        Raises:
            OSError, ValueError, HTTPError, SafetensorError: it cannot be loaded.
        """
        auto = task_of(self.config, model_class).auto
        unread = self._adapter_unread(model_class) if self.is_full else nullcontext()
        with usable("its files"), unread:
            try:
                model, info = auto.from_pretrained(
                    resolve_base(self.name),
                    config=copy.deepcopy(self.config),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    **self.options,
                )
            except TypeError as error:
                unknown = [name for name in self.options if f"argument '{name}'" in str(error)]
                if not unknown:
                    raise
                raise ValueError(
                    f"{auto.__name__}.from_pretrained takes no {unknown[0]}=, and the configuration has no such field"
                ) from error
        return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}

    @contextmanager
    def _adapter_unread(self, model_class: str | None) -> Iterator[None]:
        """Keep transformers from warning of the adapter's tensors in the checkpoint, which it does not know."""
        kind: Any = type(self.skeleton(model_class))
        before = vars(kind).get("_keys_to_ignore_on_load_unexpected")
        kind._keys_to_ignore_on_load_unexpected = [*(kind._keys_to_ignore_on_load_unexpected or ()), rf"^{INSIDE}\."]
        try:
            yield
        finally:
            if before is None:
                del kind._keys_to_ignore_on_load_unexpected
            else:
                kind._keys_to_ignore_on_load_unexpected = before


def resolve_base(name: str) -> str:
    """Return what transformers can load for the name of a base model: `"demo"` is the bundled checkpoint, always."""
    return str(CHECKPOINT) if name == BASE_NAME else name


def stored_name(name: str) -> str:
    """Return the name under which an adapter stores its base model: that of a folder is absolute, others stay."""
    return str(Path(name).resolve()) if name != BASE_NAME and Path(name).is_dir() else name


def is_public(name: str | None) -> bool:
    """Tell whether the name of a base model is one that others can resolve, and not a folder of this machine."""
    if name is None or name == BASE_NAME:
        return name == BASE_NAME
    return is_repo_id(name) and not Path(name).exists()


def is_repo_id(name: str) -> bool:
    """Tell whether a name could be that of a repository on the Hub; `./model` and `~/model` could not."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def open_base(name: str, **options: Any) -> Base:
    """Read the configuration of a base model, and nothing else.

    Args:
        name: a folder, an id on the Hub or `"demo"`, as for `resolve_base`.
        **options: for `from_pretrained` of the model. Those that name a field of the configuration change it, as
            transformers does it.

    Raises:
        HubError: the base model is an adapter itself.
        UnsupportedModelError: it has no sparse attention patch.
        OSError, HTTPError: its configuration cannot be read.
        ValueError: its configuration is damaged, or has sizes that no model has; it needs code from its repository, or
            a pickle; or `attn_implementation` is none of `ATTENTION`.
    """
    place = resolve_base(name)
    hub = {key: options[key] for key in _HUB if key in options}
    if not Path(place).is_dir() and not is_repo_id(name):
        raise FileNotFoundError("expected a folder that exists, or an id on the Hub with one `/` at most")
    attention = options.pop("attn_implementation", None)
    if attention is not None and attention not in ATTENTION:
        raise ValueError(
            f"attn_implementation must be one of {', '.join(ATTENTION)}, got {shown(attention)}: hf-sparse fetches no "
            "kernels"
        )
    adapted = HubError(
        f"the base model {name!r} holds an adapter itself: name the model below it, or load both yourself and pass "
        "them as base_model="
    )
    try:
        path = cached_file(place, "config.json", _raise_exceptions_for_missing_entries=False, **hub)
        if path is not None:
            _check_sizes(read_object(Path(path)))
        changes = {key: value for key, value in options.items() if key not in (*_HUB, *_OF_LOADING)}
        with usable("its config.json"):
            config, rest = AutoConfig.from_pretrained(
                place, return_unused_kwargs=True, trust_remote_code=False, **hub, **changes
            )
    except (OSError, ValueError):
        if (Path(place) / "adapter_config.json").is_file():
            raise adapted from None
        raise
    # transformers would put that adapter on the base in silence, from a pickle if there is no other file.
    if find_adapter_config_file(place, **hub) is not None:
        raise adapted
    check_model_type(config.model_type)
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"its config.json names the weights {weights!r}, expected a file of safetensors")
    # Whatever the configuration says: a name of its own could be that of a kernel on the Hub.
    config._attn_implementation = attention
    config._experts_implementation = None
    is_full = hasattr(config, INSIDE)
    if is_full:
        delattr(config, INSIDE)  # the base model alone would be saved with it
    loading = {key: options[key] for key in _OF_LOADING if key in options}
    return Base(name, config, {**hub, **rest, **loading}, is_full)


@contextmanager
def usable(what: str) -> Iterator[None]:
    """Turn whatever transformers, tokenizers or torch raise for files that make no sense into one `ValueError`.

    Errors that say what is wrong pass, and so does a device that is out of memory.
    """
    try:
        yield
    except (HfSparseError, HTTPError, OSError, SafetensorError, ValueError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # AttributeError, KeyError, RuntimeError, ZeroDivisionError, ...: there is no list
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be used: {type(error).__name__}: {reason[:300]}") from error


def _check_sizes(config: dict[str, Any]) -> None:
    """Raise `ValueError` for a size in a configuration that no model has, wherever it stands."""
    stack: list[Any] = [config]
    while stack:
        part = stack.pop()
        stack += [
            value for value in (part.values() if isinstance(part, dict) else part) if isinstance(value, dict | list)
        ]
        for key, value in part.items() if isinstance(part, dict) else ((None, value) for value in part):
            if isinstance(value, int):
                most = _MOST_SIZE
                if key is not None and "layer" in key:
                    most = _MOST_LAYERS
                elif key is not None and "label" in key:
                    most = _MOST_LABELS
                if abs(value) > most:
                    raise ValueError(
                        f"its config.json is damaged: {key or 'a list'} must be at most {most}, got {shown(value)}"
                    )
