"""Find the head of a model: what follows its encoder or decoder, and what of it was in no checkpoint.

PEFT trains and saves such modules with an adapter (`modules_to_save`). It finds them by the ends of their names, and
says nothing where a name fits no module, or where a module that is not saved was just initialised and so is random at
every load. Here the names are looked up, and both are errors.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from hf_sparse.core.config import TASKS_WITH_HEAD, SparseConfig
from hf_sparse.errors import AdapterMismatchError
from hf_sparse.patches.base import family_of

# Names that PEFT adds to `modules_to_save` for these task types, whatever the name of the model's head.
_PEFT_NAMES = frozenset({"classifier", "score", "qa_outputs"})


def choose_modules_to_save(model: PreTrainedModel, config: SparseConfig, *, new: bool) -> None:
    """Replace `modules_to_save` of a configuration by the exact names of the modules, before PEFT wraps them.

    Args:
        model: the base model; it may have other adapters.
        config: of a method, with its `base_shape`.
        new: whether the adapter is made now: with one of PEFT's task types it then gets the head of the model. An
            adapter that was made before has the modules that its file names.

    Raises:
        ValueError: a name that fits no module or one with sparse attention inside; a new adapter would leave out
            modules that were just initialised; a task type with labels for a language model, whose head has none.
        AdapterMismatchError: the same, for an adapter that was made before.
    """
    error = ValueError if new else AdapterMismatchError
    names = _matches(model, config.modules_to_save or () if new else config.named_modules_to_save, error)
    unsaved = uncovered(initialised(model), names)
    if new and config.task_type in TASKS_WITH_HEAD:
        if model.get_output_embeddings() is not None:
            raise ValueError(
                f"{type(config).__name__}.task_type is {config.task_type!r}, which trains and saves a head of labels, "
                f"and {type(model).__name__} is a language model: leave task_type out, or load a model with such a head"
            )
        names = _outermost({*names, *head_of(model), *modules_of(model, unsaved)})
        unsaved = []
    if unsaved:
        if new:
            modules = modules_of(model, unsaved)
            raise ValueError(
                f"{' and '.join(modules)} of this {type(model).__name__} just got random weights, which the checkpoint "
                f"{model.name_or_path!r} does not hold and an adapter would not: add modules_to_save={modules} to the "
                f"{type(config).__name__}, or save the base model with a trained head and load that one"
            )
        raise AdapterMismatchError(random_weights(model, unsaved))
    assert config.base_shape is not None
    if names and hasattr(model, "num_labels"):
        names_of: Any = model.config.id2label or {}
        labels = [names_of.get(number, f"LABEL_{number}") for number in range(model.config.num_labels or 0)]
        if new:
            config.base_shape["head"] = {
                "labels": labels,
                "problem_type": getattr(model.config, "problem_type", None),
            }
        elif noted := config.base_shape.get("head"):
            _check_labels(labels, noted["labels"])
    if names or config.modules_to_save is not None:
        config.modules_to_save = names
    config.named_modules_to_save = list(names)  # should the same configuration be used for another model


def head_of(model: PreTrainedModel) -> list[str]:
    """Name the children that a model has beside its encoder or decoder, those with parameters; none of a bare one."""
    if model.base_model is model:
        return []
    children = model.named_children()
    return [name for name, child in children if child is not model.base_model and any(True for _ in child.parameters())]


def initialised(model: PreTrainedModel) -> list[str]:
    """Name the parameters of a head, or of the pooler before it, that were in no checkpoint.

    transformers marks each parameter that it loads. A model made from a configuration alone, or a copy, has no marks:
    nothing is known of it, and the result is empty. Output embeddings are left out, for a resized one has no mark.
    """
    outputs = model.get_output_embeddings()
    known = set() if outputs is None else {id(parameter) for parameter in outputs.parameters()}
    parameters = [(name, p) for name, p in model.named_parameters() if ".modules_to_save." not in name]
    if not any(_is_marked(parameter) for _, parameter in parameters):
        return []
    new = [name.replace(".original_module", "") for name, p in parameters if not _is_marked(p) and id(p) not in known]
    head = tuple(f"{name}." for name in head_of(model))
    return [name for name in new if name.startswith(head) or (head and _in_pooler(name))]


def uncovered(parameters: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return the names of parameters, sorted, that lie in none of the named modules."""
    within = tuple(f"{module}." for module in modules)
    return sorted(name for name in parameters if not name.startswith(within))


def modules_of(model: PreTrainedModel, parameters: Iterable[str]) -> list[str]:
    """Name the modules to save for parameters: poolers, children of the model, or those that hold a parameter."""
    head = head_of(model)
    names = set()
    for parameter in parameters:
        child = parameter.split(".")[0]
        if _in_pooler(parameter):
            names.add(parameter.partition("pooler.")[0] + "pooler")
        else:
            names.add(child if child in head else parameter.rpartition(".")[0])
    return _outermost(names)


def parameters_saved(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of the modules that are saved with the adapter in use (`modules_to_save`)."""
    return [parameter for saved in modules_saved(model) for parameter in saved.parameters()]


def modules_saved(model: nn.Module) -> list[nn.Module]:
    """List the modules that are saved with the adapter in use (`modules_to_save`)."""
    return [saved for _, saved in _saved(model)]


def untrained_modules(model: nn.Module) -> list[str]:
    """Name the modules of the adapter in use that still hold the random weights of a base model's new head."""
    names = []
    for name, saved in _saved(model):
        originals = dict(model.get_submodule(f"{name}.original_module").named_parameters())
        pairs = [(originals[key], parameter) for key, parameter in saved.named_parameters()]
        if not any(_is_marked(original) for original, _ in pairs) and all(torch.equal(*pair) for pair in pairs):
            names.append(name.removeprefix("base_model.model."))
    return names


def _saved(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List names and modules that are saved with the adapter in use."""
    return [
        (name, module.modules_to_save[module.active_adapters[0]])
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and module.active_adapters
    ]


def random_weights(model: PreTrainedModel, parameters: list[str]) -> str:
    """Say which weights are in neither the checkpoint of a base model nor an adapter, and the two ways out."""
    modules = modules_of(model, parameters)
    names = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    return (
        f"the checkpoint {model.name_or_path!r} has no weights for {names} of a {type(model).__name__}, and neither "
        "has the adapter, so they would be random: load a base model that has them, or an adapter that was trained "
        f"with modules_to_save={modules[:3]}"
    )


def _check_labels(here: list[str], noted: list[str]) -> None:
    """Raise `AdapterMismatchError` for other labels; transformers' default names are not compared."""
    unnamed = [f"LABEL_{number}" for number in range(len(here))]
    if len(here) != len(noted) or (here != noted and unnamed not in (here, noted)):
        raise AdapterMismatchError(
            f"the head of the adapter was trained for {len(noted)} labels ({_some(noted)}), and the base model has "
            f"{len(here)} ({_some(here)}): load it with those as id2label="
        )


def _some(labels: list[str]) -> str:
    return ", ".join(map(str, labels[:4])) + (", ..." if len(labels) > 4 else "")


def _matches(model: PreTrainedModel, asked: Iterable[str], error: type[ValueError]) -> list[str]:
    """Find the names of the modules that PEFT would take for those asked for, without modules inside of others."""
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if ".modules_to_save" not in name and ".original_module" not in name
    }
    names: set[str] = set()
    for name in dict.fromkeys(asked):
        matches = {key for key in modules if key.endswith(name)}
        if not matches and name not in _PEFT_NAMES:
            raise error(
                f"modules_to_save must name modules of the model, got {name!r}; the head of this "
                f"{type(model).__name__} is {', '.join(map(repr, head_of(model))) or 'none'}"
            )
        names |= matches
    chosen = _outermost(names)
    attention = [name for name, _ in family_of(model).modules(model)]
    for name in chosen:
        if any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in attention):
            raise error(
                f"modules_to_save must name modules beside the attention that becomes sparse, got {name!r}, which "
                "holds it or lies in it"
            )
    return chosen


def _outermost(names: Iterable[str]) -> list[str]:
    """Return names in order, without those of modules inside of others."""
    chosen: list[str] = []
    for name in sorted(names):
        if not any(name.startswith(f"{other}.") for other in chosen):
            chosen.append(name)
    return chosen


def _in_pooler(parameter: str) -> bool:
    return ".pooler." in f".{parameter}"


def _is_marked(parameter: nn.Parameter) -> bool:
    # Not promised by transformers; tests/test_heads.py tells if it goes.
    return getattr(parameter, "_is_hf_initialized", False)
