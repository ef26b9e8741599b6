"""The folder of an adapter as it is published: flat, every number of the card from a JSON file beside it.

Its report lies there too, and is not published.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_sparse.adapters.card import render
from hf_sparse.adapters.folder import CONFIG, EVALUATION, TRAINING, WEIGHTS, Adapter, read_adapter
from hf_sparse.adapters.results import all_results, results_of
from hf_sparse.atomic_files import write_json, write_text
from hf_sparse.bundled import BASE_NAME
from hf_sparse.core.registry import method_of
from hf_sparse.errors import DataError
from hf_sparse.folders import staged

CARD, REPORT, PICTURES = "README.md", "report.html", "figures"


def published_files() -> tuple[str, ...]:
    """List every file that a push may write or remove; others in a repository are left alone."""
    return (CONFIG, WEIGHTS, CARD, EVALUATION, TRAINING, *(results.figure for results in all_results()))


def write_repo(
    folder: str | Path,
    *,
    evaluation: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    repo_id: str | None = None,
    license: Mapping[str, Any] | None = None,
) -> None:
    """Complete a folder that holds an adapter: measurements, figure and model card. All of them appear, or none.

    The card and the figure are made from the JSON files and replace what is there, so that no number that they show is
    older than its measurement. A measurement that is passed is noted as one of the weights in the folder.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        evaluation: becomes eval.json; by default the one that is there, if there is one.
        training: becomes finetune.json; by default the one that is there, if there is one.
        repo_id: how the card tells readers to load the adapter; by default the name of the folder.
        license: of the card, see `hf_sparse.adapters.card.render`.

    Raises:
        HubError: the folder holds no adapter of hf-sparse.
        DataError: a measurement is damaged, or is one of another method, budget, graph or of other weights.
        BusyError: another run holds the folder.
    """
    folder = Path(folder)
    adapter = read_adapter(folder, str(folder))
    results = results_of(adapter.config)
    marks = {"weights_sha256": adapter.weights_sha256}
    training = {**marks, **training} if training else read_json(folder / TRAINING)
    marks |= {"settings_sha256": adapter.settings_sha256}
    evaluation = {**marks, **evaluation} if evaluation else read_json(folder / EVALUATION)
    if training is not None:
        check_training(training, adapter)
    if evaluation is not None:
        check_evaluation(evaluation, adapter)
    base_model = adapter.base_model if is_public(adapter.base_model) else None
    if evaluation is not None and base_model is not None:
        evaluation = {**evaluation, "base_model": base_model}  # not the folder that it was loaded from
    card = _render(adapter, evaluation, training, repo_id or folder.resolve().name, license)
    with staged(folder) as stage:
        if evaluation is not None:
            results.draw_figure(evaluation, training, stage / results.figure)
        for name, content in ((EVALUATION, evaluation), (TRAINING, training)):
            if content is not None:
                write_json(stage / name, content)
        write_text(stage / CARD, card)


def write_card(
    folder: Path,
    evaluation: dict[str, Any] | None,
    training: dict[str, Any] | None,
    *,
    repo_id: str | None = None,
    license: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> None:
    """Write the card of an adapter alone, with those measurements that are certainly of its weights.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        evaluation: content of eval.json; on the card if it names the hash of the weights, and its figure is there.
        training: content of finetune.json; on the card if it names the hash of the weights.
        repo_id: how the card tells readers to load the adapter; by default the name of the folder.
        license: see `hf_sparse.adapters.card.render`.
        tags: further tags of the card.
        left_out: measurements that may lie where the card goes, and are of nobody knows which weights.

    Raises:
        HubError: the folder holds no adapter of hf-sparse.
        DataError: a measurement is not what hf-sparse writes.
    """
    adapter = read_adapter(folder, str(folder))

    def is_its(content: dict[str, Any] | None) -> bool:
        return content is not None and content.get("weights_sha256") == adapter.weights_sha256

    left_out = list(left_out) + [
        name
        for name, content in ((EVALUATION, evaluation), (TRAINING, training))
        if content is not None and not is_its(content)
    ]
    evaluation, training = (content if is_its(content) else None for content in (evaluation, training))
    if evaluation is not None:
        check_evaluation(evaluation, adapter)
        if not (folder / results_of(adapter.config).figure).is_file():
            evaluation = None
            left_out.append(EVALUATION)
    name = repo_id or folder.resolve().name
    write_text(folder / CARD, _render(adapter, evaluation, training, name, license, tags, left_out))


def _render(
    adapter: Adapter,
    evaluation: dict[str, Any] | None,
    training: dict[str, Any] | None,
    repo_id: str,
    license: Mapping[str, Any] | None,
    tags: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> str:
    lora = method_of(adapter.config).layer.adapter_layer_names[1]
    return render(
        adapter.config,
        repo_id=repo_id,
        base_model=adapter.base_model if is_public(adapter.base_model) else None,
        parameters=sum(math.prod(shape) for shape in adapter.shapes.values()),
        lora_parameters=sum(math.prod(shape) for key, shape in adapter.shapes.items() if f".{lora}." in key),
        head_parameters=adapter.head_parameters,
        evaluation=evaluation,
        training=training,
        figure=results_of(adapter.config).figure,
        model_class=adapter.model_class,
        license=license,
        tags=tags,
        left_out=left_out,
    )


def check_evaluation(evaluation: dict[str, Any], adapter: Adapter) -> None:
    """See that an eval.json was measured with the settings of an adapter, and with its weights where it tells.

    Raises:
        DataError: it is one of another method, budget or graph, or of other weights.
    """
    if evaluation.get("weights_sha256", adapter.weights_sha256) != adapter.weights_sha256:
        raise DataError(
            f"{EVALUATION} was measured with other weights than {WEIGHTS} holds: measure these, or delete it"
        )
    results_of(adapter.config).check(evaluation, adapter.config)
    if evaluation.get("settings_sha256", adapter.settings_sha256) != adapter.settings_sha256:
        raise DataError(
            f"{EVALUATION} was measured with other settings than {CONFIG} holds (layer_shares, say): measure again, or "
            "delete it"
        )


def check_training(training: dict[str, Any], adapter: Adapter) -> None:
    """See that a finetune.json tells of the weights of an adapter, where it says of which it tells.

    Raises:
        DataError: it tells of other weights.
    """
    if training.get("weights_sha256", adapter.weights_sha256) != adapter.weights_sha256:
        raise DataError(
            f"{TRAINING} tells of the training of other weights than {WEIGHTS} holds: train these, or delete it"
        )


def measurements(folder: Path) -> list[str]:
    """Relative paths of what was measured of the adapter in a folder, and of the report that shows it."""
    others = [name for results in all_results() for name in (results.figure, results.aside)]
    return [
        *(name for name in (EVALUATION, *others, REPORT) if (folder / name).exists()),
        *report_pictures(folder),
    ]


def report_pictures(folder: Path, without: Collection[str] = ()) -> Iterable[str]:
    """Relative paths of the pictures of the report in a folder, but for those of some names."""
    names = ("training", *(name for results in all_results() for name in results.pictures))
    for path in sorted((folder / PICTURES).glob("*.png")):
        if path.stem not in without and any(fnmatchcase(path.stem, name) for name in names):
            yield f"{PICTURES}/{path.name}"


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
