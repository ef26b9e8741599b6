"""Check that an adapter was made for a base model, before any weight of the base model is read."""

import copy
from collections.abc import Iterable

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from hf_sparse.adapters.files import WEIGHTS
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.base_model import usable
from hf_sparse.embeddings import embeddings_of
from hf_sparse.errors import AdapterMismatchError, HubError, UnsupportedModelError, WeightsError
from hf_sparse.model_kinds import have_one_task
from hf_sparse.patches.heads import random_weights, uncovered
from hf_sparse.weights import check_names


def check_fit(adapter: AdapterFolder, skeleton: PreTrainedModel, base: str) -> int | None:
    """Check that an adapter holds exactly the keys and shapes that a base model asks for.

    PEFT would leave what is missing random, and let any other key overwrite weights of the base.

    Args:
        skeleton: the base model without weights, on the meta device; PEFT changes it, so it serves one check only.
        base: the name of the base model in error messages.

    Returns:
        The number of tokens of the embeddings that the adapter brings, `None` if it leaves those of the base.

    Raises:
        AdapterMismatchError: the adapter was made for another base model, or its configuration does not fit this one.
        UnsupportedModelError: the base model has no sparse attention patch.
        HubError: keys are missing, unexpected or of another shape.
    """
    if adapter.config.modules_to_save and not have_one_task(adapter.model_class, type(skeleton).__name__):
        raise AdapterMismatchError(  # heads for two tasks may have the same names and shapes
            f"{adapter.source} does not fit the base model {base}: it brings {adapter.config.modules_to_save} of a "
            f"{adapter.model_class}, got a {type(skeleton).__name__}"
        )
    # The class that will be loaded: each asks something else of its base model.
    peft_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(adapter.config.task_type, PeftModel)
    if adapter.config.task_type == "CAUSAL_LM" and not hasattr(skeleton, "prepare_inputs_for_generation"):
        raise AdapterMismatchError(  # PEFT's class for the task asks for it
            f"{adapter.source} does not fit the base model {base}: its task_type CAUSAL_LM is for models that "
            f"generate, such as a {adapter.model_class}, got a {type(skeleton).__name__}"
        )
    try:
        with usable(f"{adapter.source} on a {type(skeleton).__name__}"), torch.device("meta"):
            model = peft_class(skeleton, copy.deepcopy(adapter.config))
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
    except UnsupportedModelError:
        raise
    except ValueError as error:  # another base model, or a layer that it does not have
        raise AdapterMismatchError(f"{adapter.source} does not fit the base model {base}: {error}") from error
    embeddings = embeddings_of(skeleton, "base_model.model.")  # without those in a head that PEFT has wrapped
    expected = {key: tuple(value.shape) for key, value in state.items() if key not in embeddings}
    try:
        tokens = check_names(adapter.layouts, expected, embeddings)
        if adapter.config.saves_embeddings and tokens is None:
            raise WeightsError("missing: the embeddings that it brings")
        return tokens
    except WeightsError as error:
        several = ";" in str(error)
        made = f"; it was made on a {adapter.model_class}: pass one as base_model=" if several else ""
        raise HubError(
            f"{WEIGHTS} of {adapter.source} does not hold the parameters for {base}; {error}{made}"
        ) from error


def check_loaded(adapter: AdapterFolder, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Check that the base model or the adapter has every weight: transformers makes missing ones up.

    A pooler that nothing follows is left out: it takes no part in the states that a bare encoder is used for.

    Args:
        missing: names of the parameters that the checkpoint of the base model did not hold, or in another shape.

    Raises:
        AdapterMismatchError: neither has them.
    """
    made_up = uncovered(missing, adapter.config.named_modules_to_save)
    if model.base_model is model:
        made_up = uncovered(made_up, ["pooler"])
    if made_up:
        raise AdapterMismatchError(f"{adapter.source} does not fit: {random_weights(model, made_up)}")
