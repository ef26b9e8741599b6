"""Hold the folder of an adapter: every file is read once, checked, and replaced together with what depends on it."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_sparse.adapters.card import AdapterFacts, Form, Measurements, Page, render
from hf_sparse.adapters.files import (
    CARD,
    CONFIG,
    EVALUATION,
    TRAINING,
    WEIGHTS,
    measurement_files,
)
from hf_sparse.adapters.method_report import MethodReport, report_of
from hf_sparse.adapters.read import check_complete, read_config, read_layouts, read_measurement
from hf_sparse.atomic_files import write_json, write_text
from hf_sparse.base_model import is_public
from hf_sparse.core.registry import method_of
from hf_sparse.errors import DataError, HubError
from hf_sparse.folders import recover, staged
from hf_sparse.patches.attached import CHILD

Json = dict[str, Any]

# Settings of a configuration that change no number.
_NAMES = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "task_type")

# The key of the hash of the weights in the file of details; it is older than methods without scorers.
_WEIGHTS_OF_DETAILS = "scorers_sha256"


class AdapterFolder:
    """Hold the content of an adapter's folder. A verb opens one and hands it on, so that each file is read once.

    Configuration and weights are read when it is made, the other files when they are first asked for. What is written
    is not read again: open the folder anew to see it.

    Attributes:
        path: the folder.
        source: the name of the adapter in messages.
        config_content: adapter_config.json as it stands.
        config: the configuration of its method, such as a `SparseKConfig`.
        base_model: name of its base model, `"demo"` for the bundled checkpoint, `None` if it has none.
        model_class: name of the class that it was trained on, if it says.
        layouts: shape and dtype of every tensor by key.
    """

    def __init__(self, path: str | Path, source: str | None = None) -> None:
        """Read the configuration and the weights of an adapter.

        Args:
            path: the folder.
            source: the name of the adapter in messages; by default the path.

        Raises:
            HubError: there is no such folder, a file is missing or damaged, weights are of a dtype that adapters do not
                have or not finite, or the adapter is none of hf-sparse's.
            BusyError: another run is replacing it.
        """
        self.path = Path(path)
        self.source = str(path) if source is None else source
        if not self.path.is_dir():
            raise HubError(f"{self.path} is no folder; `hf-sparse patch MODEL --output {self.path}` makes one")
        recover(self.path)
        check_complete(self.path, self.source)
        file = read_config(self.path, self.source)
        self.config_content, self.config = file.content, file.config
        self.base_model, self.model_class = file.base_model, file.model_class
        self.layouts = read_layouts(self.path, self.source, self.config)

    @cached_property
    def report(self) -> MethodReport:
        """Return the `MethodReport` of its method, which fills cards and reports."""
        return report_of(self.config)

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.path.resolve().name

    @property
    def public_base_model(self) -> str | None:
        """Return the name of the base model where others can resolve it, `None` for a folder of this machine."""
        return self.base_model if is_public(self.base_model) else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what the method learns by key, without embeddings and heads that the adapter brings."""
        inside = f".{CHILD}."
        return {key: shape for key, (shape, _) in self.layouts.items() if inside in key}

    @property
    def parameters(self) -> int:
        """Count the parameters of what the method learns, LoRA's among them."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def lora_parameters(self) -> int:
        """Count the parameters of LoRA."""
        container = f".{method_of(self.config).layer.adapter_layer_names[1]}."
        return sum(math.prod(shape) for key, shape in self.shapes.items() if container in key)

    @property
    def head(self) -> Json:
        """Return the settings of the base model's configuration for a head in the adapter; empty without one."""
        noted = dict(self.config.base_shape or {}).get("head")
        if noted is None or not self.config.named_modules_to_save:
            return {}
        labels = dict(enumerate(noted["labels"]))
        settings = {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}
        problem = noted.get("problem_type")
        return settings if problem is None else settings | {"problem_type": problem}

    @property
    def head_parameters(self) -> int:
        """Count the parameters of modules of the base model that it brings, such as a head."""
        modules = tuple(f"base_model.model.{name}." for name in self.config.named_modules_to_save)
        return sum(math.prod(shape) for key, (shape, _) in self.layouts.items() if key.startswith(modules))

    @property
    def facts(self) -> AdapterFacts:
        """Return what a card says of the adapter itself."""
        counts = self.parameters, self.lora_parameters, self.head_parameters
        return AdapterFacts(self.config, self.public_base_model, *counts, self.model_class)

    @cached_property
    def weights_sha256(self) -> str:
        """Return the sha256 of the weights, by which measurements of the same weights are known."""
        return hashlib.sha256((self.path / WEIGHTS).read_bytes()).hexdigest()

    @cached_property
    def settings_sha256(self) -> str:
        """Return the sha256 of the settings, which `divide` changes without changing the weights."""
        settings = {name: value for name, value in self.config_content.items() if name not in _NAMES}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @cached_property
    def evaluation(self) -> Json | None:
        """Return the content of eval.json, of whatever weights it is; `None` without the file.

        Raises:
            DataError: it is damaged.
        """
        return read_measurement(self.path / EVALUATION)

    @cached_property
    def training(self) -> Json | None:
        """Return the content of finetune.json, of whatever weights it is; `None` without the file.

        Raises:
            DataError: it is damaged.
        """
        return read_measurement(self.path / TRAINING)

    @cached_property
    def checked_evaluation(self) -> Json | None:
        """Return the content of eval.json, if there is one, once it is known to be of this adapter.

        Raises:
            DataError: it is damaged, or see `check_evaluation`.
        """
        if self.evaluation is not None:
            self.check_evaluation(self.evaluation)
        return self.evaluation

    @cached_property
    def checked_training(self) -> Json | None:
        """Return the content of finetune.json, if there is one, once it is known to be of these weights.

        Raises:
            DataError: it is damaged, or see `check_training`.
        """
        if self.training is not None:
            self.check_training(self.training)
        return self.training

    @cached_property
    def details(self) -> Json | None:
        """Return what only the report shows, of the file that `MethodReport.details_file` names.

        `None` without the file, or where it is of other weights or settings.

        Raises:
            DataError: it is damaged.
        """
        if self.report.details_file is None:
            return None
        content = read_measurement(self.path / self.report.details_file)
        if content is None:
            return None
        noted = {"settings_sha256": self.settings_sha256, **content}  # older files do not name the settings
        hashes = self.note_details({})
        return content if {name: noted.get(name) for name in hashes} == hashes else None

    def note_details(self, details: Json) -> Json:
        """Return details of the report with the hashes of the adapter that they are of."""
        return {**details, _WEIGHTS_OF_DETAILS: self.weights_sha256, "settings_sha256": self.settings_sha256}

    def check_evaluation(self, evaluation: Json) -> None:
        """Check that an eval.json was measured with these settings, and with these weights where it names any.

        Raises:
            DataError: it is one of another method, budget or graph, or of other weights.
        """
        if evaluation.get("weights_sha256", self.weights_sha256) != self.weights_sha256:
            raise DataError(
                f"{EVALUATION} was measured with other weights than {WEIGHTS} holds: measure these, or delete it"
            )
        self.report.check(evaluation, self.config)
        if evaluation.get("settings_sha256", self.settings_sha256) != self.settings_sha256:
            raise DataError(
                f"{EVALUATION} was measured with other settings than {CONFIG} holds (layer_shares, say): measure "
                "again, or delete it"
            )

    def check_training(self, training: Json) -> None:
        """Check that a finetune.json belongs to these weights, where it names any.

        Raises:
            DataError: it tells of other weights.
        """
        if training.get("weights_sha256", self.weights_sha256) != self.weights_sha256:
            raise DataError(
                f"{TRAINING} tells of the training of other weights than {WEIGHTS} holds: train these, or delete it"
            )

    def replaced(self) -> AbstractContextManager[Path]:
        """Give a new folder whose files replace those of this one, without what was measured of this adapter.

        See `hf_sparse.folders.staged`; the weights and finetune.json stay, unless new ones are written.
        """
        return staged(self.path, removed=measurement_files(self.path))

    def write_repo(
        self,
        *,
        evaluation: Json | None = None,
        training: Json | None = None,
        repo_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        form: Form = "adapter",
    ) -> None:
        """Write measurements, the figure and the card of this adapter; see the function `write_repo`."""
        weights = {"weights_sha256": self.weights_sha256}
        if training:
            training = {**weights, **training}
            self.check_training(training)
        else:
            training = self.checked_training
        if evaluation:
            evaluation = {**weights, "settings_sha256": self.settings_sha256, **evaluation}
            self.check_evaluation(evaluation)
        else:
            evaluation = self.checked_evaluation
        if evaluation is not None and self.public_base_model is not None:
            evaluation = {**evaluation, "base_model": self.public_base_model}  # not the folder that it was loaded from
        page = Page(repo_id or self.name, form, metadata)
        card = render(self.facts, page, Measurements(evaluation, training))
        with staged(self.path) as stage:
            if evaluation is not None:
                self.report.draw_figure(evaluation, training, stage / self.report.figure)
            for name, content in ((EVALUATION, evaluation), (TRAINING, training)):
                if content is not None:
                    write_json(stage / name, content)
            write_text(stage / CARD, card)

    def write_card(
        self,
        evaluation: Json | None,
        training: Json | None,
        *,
        repo_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        left_out: Sequence[str] = (),
    ) -> None:
        """Write the card of this adapter alone, with those measurements that are certainly of its weights.

        Args:
            evaluation: content of eval.json; on the card if it names the hash of the weights, and its figure is there.
            training: content of finetune.json; on the card if it names the hash of the weights.
            repo_id: the name under which the card tells readers to load the adapter; by default that of the folder.
            metadata, tags: see `hf_sparse.adapters.card.Page`.
            left_out: names of measurements that may lie where the card goes, and are of nobody knows which weights.

        Raises:
            DataError: a measurement is not what hf-sparse writes.
        """
        unknown = list(left_out)
        if evaluation is not None and evaluation.get("weights_sha256") != self.weights_sha256:
            evaluation, unknown = None, [*unknown, EVALUATION]
        if training is not None and training.get("weights_sha256") != self.weights_sha256:
            training, unknown = None, [*unknown, TRAINING]
        if evaluation is not None:
            self.check_evaluation(evaluation)
            if not (self.path / self.report.figure).is_file():
                evaluation, unknown = None, [*unknown, EVALUATION]
        page = Page(repo_id or self.name, metadata=metadata, tags=tags)
        write_text(self.path / CARD, render(self.facts, page, Measurements(evaluation, training, unknown)))


def write_repo(
    folder: str | Path,
    *,
    evaluation: Json | None = None,
    training: Json | None = None,
    repo_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    form: Form = "adapter",
) -> None:
    """Complete a folder that holds an adapter: measurements, figure and model card. All of them appear, or none.

    The card and the figure are made from the JSON files and replace what is there, so that no number that they show is
    older than its measurement. A measurement that is passed is noted as one of the weights in the folder.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        evaluation: becomes eval.json; by default the one that is there, if there is one.
        training: becomes finetune.json; by default the one that is there, if there is one.
        repo_id: the name under which the card tells readers to load the adapter; by default that of the folder.
        metadata: further entries of the card's metadata, see `hf_sparse.adapters.card.Page`.
        form: how the adapter is going to be published, which the card says.

    Raises:
        HubError: the folder holds no adapter of hf-sparse.
        DataError: a measurement is damaged, or is one of another method, budget, graph or of other weights.
        BusyError: another run holds the folder.
    """
    AdapterFolder(folder).write_repo(
        evaluation=evaluation, training=training, repo_id=repo_id, metadata=metadata, form=form
    )
