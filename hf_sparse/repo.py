"""The folder of an adapter as it is published: flat, every number of the card from a JSON file beside it."""

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_sparse.adapter import CONFIG, WEIGHTS, Adapter, read_adapter
from hf_sparse.card import render
from hf_sparse.demo import BASE_NAME
from hf_sparse.errors import DataError
from hf_sparse.evaluation.graphs import adapter_settings
from hf_sparse.figures import pareto_figure, quality_figure
from hf_sparse.files import write_json, write_text
from hf_sparse.methods import method_of
from hf_sparse.methods.sparsefinder import SparsefinderConfig

CARD, EVALUATION, TRAINING = "README.md", "eval.json", "finetune.json"

#: The figures of a card: that of a SparseK adapter, and that of a Sparsefinder adapter.
FIGURES = QUALITY, PARETO = "quality.png", "pareto.png"

#: Every file that a push may write or remove; others in a repository are left alone.
FILES = (CONFIG, WEIGHTS, CARD, EVALUATION, TRAINING, *FIGURES)


def write_repo(
    folder: str | Path,
    *,
    evaluation: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    repo_id: str | None = None,
) -> None:
    """Complete a folder that holds an adapter: measurements, figure and model card. Each file appears whole.

    The card and the figure are made from the JSON files and replace what is there, so that no number that they show is
    older than its measurement.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        evaluation: becomes eval.json; by default the one that is there, if there is one.
        training: becomes finetune.json; by default the one that is there, if there is one.
        repo_id: how the card tells readers to load the adapter; by default the name of the folder.

    Raises:
        HubError: the folder holds no adapter of hf-sparse.
        DataError: a measurement is damaged, or is one of another method, budget, graph or of other weights.
    """
    folder = Path(folder)
    adapter = read_adapter(folder, str(folder))
    graphs = isinstance(adapter.config, SparsefinderConfig)
    evaluation = evaluation or read_json(folder / EVALUATION)
    training = training or read_json(folder / TRAINING)
    if evaluation is not None:
        check_evaluation(evaluation, adapter)
    base_model = adapter.base_model if is_public(adapter.base_model) else None
    if evaluation is not None and base_model is not None:
        evaluation = {**evaluation, "base_model": base_model}  # not the folder that it was loaded from
    lora = method_of(adapter.config).attention.adapter_layer_names[1]
    card = render(
        adapter.config,
        repo_id=repo_id or folder.resolve().name,
        base_model=base_model,
        parameters=sum(math.prod(shape) for shape in adapter.shapes.values()),
        lora_parameters=sum(math.prod(shape) for key, shape in adapter.shapes.items() if f".{lora}." in key),
        evaluation=evaluation,
        training=training,
        figure=PARETO if graphs else QUALITY,
        model_class=adapter.model_class,
    )
    if evaluation is not None and graphs:
        pareto_figure(evaluation, folder / PARETO)
    elif evaluation is not None:
        quality_figure(evaluation, training, folder / QUALITY)
    for name, content in ((EVALUATION, evaluation), (TRAINING, training)):
        if content is not None:
            write_json(folder / name, content)
    write_text(folder / CARD, card)


def check_evaluation(evaluation: dict[str, Any], adapter: Adapter) -> None:
    """See that an eval.json was measured with the settings of an adapter, and with its weights where it tells.

    Raises:
        DataError: it is one of another method, budget or graph, or of other weights.
    """
    if evaluation.get("weights_sha256", adapter.weights_sha256) != adapter.weights_sha256:
        raise DataError(
            f"{EVALUATION} was measured with other weights than {WEIGHTS} holds: measure these, or delete it"
        )
    config = adapter.config
    if isinstance(config, SparsefinderConfig):
        if evaluation.get("method") != "sparsefinder":
            raise DataError(f"{EVALUATION} is not of a Sparsefinder adapter, but the adapter is one")
        has, measured = adapter_settings(config), dict(evaluation.get("adapter") or {})
        different = [name for name in has if name in measured and measured[name] != has[name]]
        if different or not measured:
            of, here = ({name: settings[name] for name in different} for settings in (measured, has))
            raise DataError(f"{EVALUATION} is of the settings {of}, but the adapter has {here}")
        return
    own = {name: getattr(config, name) for name in ("k", "window", "sinks", "slots")}
    if evaluation.get("budget") != own:
        raise DataError(f"{EVALUATION} is of the budget {evaluation.get('budget')}, but the adapter has {own}")


def is_public(name: str | None) -> bool:
    """Whether the name of a base model is one that others can resolve, and not a folder of this machine."""
    if name is None or name == BASE_NAME:
        return name == BASE_NAME
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, `None` if there is no file.

    Raises:
        DataError: it is damaged, or holds something else.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path.name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path.name} must hold an object, got {type(content).__name__}")
    return content
