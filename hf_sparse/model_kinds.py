"""Find the model of transformers in what wraps it, and how it is loaded, trained and measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from hf_sparse._compat import private
from hf_sparse.patches import sparse_layers

#: `"causal"` and `"masked"` language models; `"features"` is every other model, known by its last hidden states.
Kind = Literal["causal", "masked", "features"]


@dataclass(frozen=True)
class ModelKind:
    """Describe the models of one Auto class of transformers.

    Attributes:
        kind: the way in which they are trained and measured.
        auto: the Auto class that loads them.
        pipeline: the Hub's name for the task.
        models: their class, or classes, by model type.
    """

    kind: Kind
    auto: Any
    pipeline: str
    models: Mapping[str, Sequence[str]]


def _names(table: str) -> Any:
    return private("transformers.models.auto.modeling_auto", table)


_CAUSAL = ModelKind("causal", AutoModelForCausalLM, "text-generation", _names("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"))
_MASKED = ModelKind("masked", AutoModelForMaskedLM, "fill-mask", _names("MODEL_FOR_MASKED_LM_MAPPING_NAMES"))
_IMAGES = ModelKind(
    "causal",
    AutoModelForImageTextToText,
    "image-text-to-text",
    _names("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
)
_BARE = ModelKind("features", AutoModel, "feature-extraction", _names("MODEL_MAPPING_NAMES"))
_OTHERS = (
    (
        AutoModelForSequenceClassification,
        "text-classification",
        _names("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ),
    (AutoModelForTokenClassification, "token-classification", _names("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES")),
    (AutoModelForQuestionAnswering, "question-answering", _names("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES")),
    (
        AutoModelForNextSentencePrediction,
        "text-classification",
        _names("MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES"),
    ),
    (AutoModelForMultipleChoice, "multiple-choice", _names("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES")),
    # Of the heads for pretraining the one that holds none for masked tokens: it tells which tokens were replaced.
    (AutoModelForPreTraining, "feature-extraction", {"electra": "ElectraForPreTraining"}),
)

_BY_CLASS: dict[str, ModelKind] = {}
for _task in (_CAUSAL, _MASKED, _IMAGES, *(ModelKind("features", *other) for other in _OTHERS), _BARE):
    for _names_of_type in _task.models.values():
        for _name in (_names_of_type,) if isinstance(_names_of_type, str) else _names_of_type:
            _BY_CLASS.setdefault(_name, _task)


def task_of(config: Any, model_class: str | None = None) -> ModelKind:
    """Find the task of a checkpoint.

    Args:
        config: its configuration, whose `architectures` names the class that was saved.
        model_class: a class to prefer, such as the one that an adapter was made for.
    """
    saved = config.architectures or []
    for name in (model_class, *saved):
        if name in _BY_CLASS:
            return _BY_CLASS[name]
    if config.model_type not in _MASKED.models:
        return _CAUSAL
    # A head for pretraining holds that for masked tokens, and a class of somebody's own may be named after one for
    # masked tokens; of any other head the encoder is what can be loaded.
    return _MASKED if any(name.endswith(("ForPreTraining", "ForMaskedLM")) for name in saved) else _BARE


def kind_of(model: nn.Module) -> Kind:
    """Find how a model, with an adapter or without, is trained and measured.

    Raises:
        TypeError: a module that wraps a model, whose class does not tell.
        ValueError: a language model of next tokens that attends in both directions.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"expected a transformers PreTrainedModel or a PeftModel of one, got {type(model).__name__}: give the "
            "model that is inside (of the result of torch.compile, the model that was compiled)"
        )
    kind: Kind = next((_BY_CLASS[c.__name__].kind for c in type(base).__mro__ if c.__name__ in _BY_CLASS), "features")
    if kind == "causal" and not all(layer.causal for layer in sparse_layers(base)):
        raise ValueError(
            f"a {type(base).__name__} whose attention has both directions sees the tokens that it predicts: load it "
            "with is_decoder=True, or load the masked language model"
        )
    return kind


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """Return the model of transformers in what wraps it, such as a `PeftModel` or `DistributedDataParallel`.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"expected a transformers PreTrainedModel or what wraps one, got {type(model).__name__}")


def task_of_class(model_class: str | None) -> ModelKind:
    """Find the task of a class of models; causal language modelling where the class is not known."""
    return _BY_CLASS.get(model_class or "", _CAUSAL)


def have_one_task(one: str | None, other: str) -> bool:
    """Tell whether two classes of models are for the same task; they may be where one of them is not known."""
    tasks = [_BY_CLASS.get(one or ""), _BY_CLASS.get(other)]
    return None in tasks or tasks[0] is tasks[1]


def attends_both_ways(model_type: str | None, task: ModelKind) -> bool:
    """Tell whether the models of a type attend in both directions when they are used for a task."""
    return task.kind != "causal" and model_type in _MASKED.models


def final_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """Compute the last hidden states `[B, T, C]` of tokens `[B, T]`, whatever head the patched model has."""
    caching = {"use_cache": False} if any(layer.causal for layer in sparse_layers(model)) else {}
    # The call goes through the model itself, so that wrappers (autocast, DDP) see it.
    return model(input_ids=tokens, output_hidden_states=True, return_dict=True, **caching).hidden_states[-1]


def pooled(states: Tensor) -> Tensor:
    """Embed texts without padding, `[B, C]` float32, by the mean of their states `[B, T, C]`."""
    return states.mean(1, dtype=torch.float32)
