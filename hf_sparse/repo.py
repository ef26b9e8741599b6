"""The folder of an adapter as it is published: flat, every number of the card from a JSON file beside it."""

import json
import math
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_sparse.adapter import CONFIG, WEIGHTS, read_adapter
from hf_sparse.card import render
from hf_sparse.demo import BASE_NAME
from hf_sparse.errors import DataError, HubError
from hf_sparse.figures import quality_figure
from hf_sparse.files import write_json, write_text
from hf_sparse.methods import method_of
from hf_sparse.methods.sparsek import SparseKConfig

CARD, EVALUATION, TRAINING, FIGURE = "README.md", "eval.json", "finetune.json", "quality.png"

#: Every file that a push may write or remove; others in a repository are left alone.
FILES = (CONFIG, WEIGHTS, CARD, EVALUATION, TRAINING, FIGURE)


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
        HubError: the folder holds no adapter of hf-sparse, or one of a method without a card.
        DataError: a measurement is damaged, or is one of another budget.
    """
    folder = Path(folder)
    adapter = read_adapter(folder, str(folder))
    if not isinstance(adapter.config, SparseKConfig):
        label = method_of(adapter.config).attention.label
        raise HubError(f"{folder} cannot be published: there is no model card for {label} adapters yet")
    evaluation = evaluation or read_json(folder / EVALUATION)
    training = training or read_json(folder / TRAINING)
    own = {name: getattr(adapter.config, name) for name in ("k", "window", "sinks", "slots")}
    if evaluation is not None and evaluation.get("budget") != own:
        raise DataError(f"{EVALUATION} is of the budget {evaluation.get('budget')}, but the adapter has {own}")
    base_model = adapter.base_model if is_public(adapter.base_model) else None
    if evaluation is not None and base_model is not None:
        evaluation = {**evaluation, "base_model": base_model}  # not the folder that it was loaded from
    card = render(
        adapter.config,
        repo_id=repo_id or folder.resolve().name,
        base_model=base_model,
        parameters=sum(math.prod(shape) for shape in adapter.shapes.values()),
        evaluation=evaluation,
        training=training,
        figure=FIGURE,
        model_class=adapter.model_class,
    )
    if evaluation is not None:
        quality_figure(evaluation, training, folder / FIGURE)
    for name, content in ((EVALUATION, evaluation), (TRAINING, training)):
        if content is not None:
            write_json(folder / name, content)
    write_text(folder / CARD, card)


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
