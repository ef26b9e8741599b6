"""The training of each method, and which settings it has."""

from torch import nn

from hf_sparse.core.registry import method_of, registered_methods
from hf_sparse.finetune.config import FinetuneConfig
from hf_sparse.finetune.training import Training, foreign_settings
from hf_sparse.patches import sparse_layers_in_use

# Settings of `FinetuneConfig` that are for adapters with LoRA alone.
_OF_LORA = frozenset({"lora_learning_rate", "lora_steps"})


def training_of(model: nn.Module, config: FinetuneConfig) -> Training:
    """The training of the method that a model has.

    Raises:
        ValueError: a model without, or settings that have no effect on it.
    """
    methods = sparse_layers_in_use(model)
    if not methods:
        raise ValueError(
            "the model has no sparse attention: use peft.get_peft_model(model, hf_sparse.SparseKConfig(...)) or "
            "hf_sparse.SparsefinderConfig(...)"
        )
    kind: type[Training] = method_of(methods[0].config).training()
    if changed := foreign_settings(config, _foreign(kind)):
        raise ValueError(f"{', '.join(changed)}: no setting for {kind.label}, which this model has")
    training = kind(model, methods, config)
    if not training.lora and (changed := foreign_settings(config, _OF_LORA)):
        raise ValueError(f"{', '.join(changed)}: the adapter has no LoRA, its lora_rank is 0")
    return training


def without_effect(training: Training) -> frozenset[str]:
    """Settings of other methods, and of LoRA where there is none."""
    return _foreign(type(training)) | (frozenset() if training.lora else _OF_LORA)


def _foreign(kind: type[Training]) -> frozenset[str]:
    """Settings of other methods."""
    trainings = [method.training() for method in registered_methods().values()]
    return frozenset().union(*(training.own for training in trainings if training is not kind))
