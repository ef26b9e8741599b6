"""Say which parameters of a model a run trains: those of its stages, and no others."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_sparse.finetune.stages import Training
from hf_sparse.patches.heads import parameters_saved, untrained_modules


def check_frozen(model: nn.Module, training: Training) -> None:
    """Make what is trained trainable, and raise `ValueError` if anything but the adapter's parameters is besides."""
    for parameter in training.parameters.values():
        parameter.requires_grad_(True)
    of_adapter = {id(p) for layer in training.layers for p in layer.parameters()}
    of_adapter |= {id(p) for p in parameters_saved(model)}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in of_adapter]
    if others:
        raise ValueError(
            f"{len(others)} parameters besides the {training.learned} would be trained, the first is {others[0]}: "
            "freeze them (model.requires_grad_(False)) or use peft.get_peft_model"
        )


def warn_of_untrained(model: nn.Module, training: Training) -> None:
    """Warn of modules that are saved with the adapter and have random weights."""
    if untrained := untrained_modules(model):
        warnings.warn(
            f"{' and '.join(untrained)} of the adapter has the random weights that it was made with, and finetune "
            f"leaves it so, for it trains the {training.learned}: train it with transformers.Trainer, before or after",
            stacklevel=4,
        )


@contextmanager
def only_trained(model: nn.Module, training: Training) -> Iterator[None]:
    """Put sparse layers into `train` mode and the base model, without dropout, into `eval` mode, for a `with` block.

    What no stage trains, such as LoRA with an objective that only reads the model, or a head, gets no gradient
    meanwhile. Afterwards all of it can be trained again and is in `eval` mode, whatever happens.
    """
    learned = {id(parameter): parameter for parameter in training.parameters.values()}
    of_adapter = [p for layer in training.layers for p in layer.parameters()] + parameters_saved(model)
    idle = [parameter for parameter in of_adapter if parameter.requires_grad and id(parameter) not in learned]
    model.eval()
    for layer in training.layers:
        layer.train()
    for parameter in idle:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in (*idle, *learned.values()):
            parameter.requires_grad_(True)
        model.eval()
