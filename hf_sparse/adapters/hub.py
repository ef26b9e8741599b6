"""Publish an adapter, or a full model with it inside, on the Hub in a single commit.

Only safetensors and JSON are read or written.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel

from hf_sparse.access_tokens import check_token
from hf_sparse.adapters.card import Form
from hf_sparse.adapters.files import CONFIG, EVALUATION, TRAINING, WEIGHTS
from hf_sparse.adapters.fit import check_fit
from hf_sparse.adapters.folder import AdapterFolder, write_repo
from hf_sparse.adapters.full_model import check_form
from hf_sparse.adapters.full_model_writing import base_files, write_full_model
from hf_sparse.adapters.hub_errors import explained, short_line
from hf_sparse.adapters.push_plan import PushPlan, carry_out, plan_of
from hf_sparse.adapters.read import check_complete
from hf_sparse.adapters.saving import check_free
from hf_sparse.base_model import is_public, open_base
from hf_sparse.bundled import BASE_NAME
from hf_sparse.core.registry import config_names, registered_methods
from hf_sparse.environment import is_main_process
from hf_sparse.errors import HubError
from hf_sparse.folders import locked, recover, staged

# The Hub knows licenses by short names; which ones it tells itself, before anything is created.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


def push_to_hub(
    model_or_dir: PeftModel | str | Path,
    repo_id: str,
    *,
    form: Form = "adapter",
    base_model: str | None = None,
    evaluation: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    license: str | None = None,
    private: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload sparse attention adapter with hf-sparse",
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Publish an adapter with its card, measurements and figure, alone or in a full model: one commit, or none.

    Of two pushes to one repository at the same time one fails, and the repository holds all files of the other.

    The adapter is first checked against the configuration of its base model, so that what is pushed can be loaded.
    The card is written anew by every push. Files of an earlier push that this one does not have (an eval.json, say)
    are removed in the same commit; files that are not hf-sparse's stay. Of processes that were launched together the
    first one pushes.

    Args:
        model_or_dir: a `PeftModel`, of which the active adapter is pushed; or a folder with an adapter, of which
            nothing but the adapter, eval.json and finetune.json is taken.
        repo_id: `"user/name"`, or `"name"` for a repository of your own; created if it does not exist.
        form: `"adapter"` publishes the adapter alone. `"full"` publishes the base model's files with the adapter
            inside: with hf-sparse the model is sparse, and to transformers alone it is the dense base model.
            `"merged"` is the same with LoRA added to the weights, which transformers alone has then too. See
            `save_full_model`.
        base_model: id of the base model on the Hub. Needed if the base was loaded from a folder, whose path would mean
            nothing elsewhere: push that model first, or publish a full model. The checkpoint that comes with hf-sparse
            is `"demo"` and needs no push.
        evaluation: content of eval.json; by default the folder's.
        training: content of finetune.json; by default the folder's.
        license: the Hub's name of a license, such as `"apache-2.0"`, for the card; by default what the page of the base
            model says, or nothing where that says nothing.
        private: make a new repository private. An existing public one is refused.
        token: a token with write access; the saved one by default.
        commit_message: title of the commit.
        revision: branch to push to, created if it does not exist.
        create_pr: open a pull request against `revision` in place of pushing to it; the repository and the branch have
            to exist, and the token need not be their owner's.

    Returns:
        URL of the repository, or of the pull request.

    Raises:
        HubError: the Hub cannot be reached or refuses; the message says what to do, and what was created already.
        AdapterMismatchError: `base_model` is not what the adapter was made for.
        DataError: a measurement is damaged, or is one of another budget.
        TypeError: neither a `PeftModel` with one active adapter of hf-sparse nor a folder.
        ValueError: `form` is another.
    """
    prepared = _prepared(model_or_dir, repo_id, token, form, base_model, evaluation, training, license)
    with prepared as (api, stage, repo_id):
        if not is_main_process():
            return f"{api.endpoint}/{repo_id}"
        plan = plan_of(api, stage, repo_id, private, revision, create_pr)
        return carry_out(api, stage, plan, private, commit_message)


def plan_push(
    model_or_dir: PeftModel | str | Path,
    repo_id: str,
    *,
    form: Form = "adapter",
    base_model: str | None = None,
    evaluation: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    license: str | None = None,
    private: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> PushPlan:
    """Check everything that `push_to_hub` checks and say what it would do; nothing is created or uploaded.

    The arguments and errors are those of `push_to_hub`. The Hub is asked, so a token is needed here too, and the files
    of a full model are prepared.
    """
    prepared = _prepared(model_or_dir, repo_id, token, form, base_model, evaluation, training, license)
    with prepared as (api, stage, repo_id):
        return plan_of(api, stage, repo_id, private, revision, create_pr)


def save_full_model(
    model_or_dir: PeftModel | str | Path,
    folder: str | Path,
    *,
    form: Form = "full",
    base_model: str | None = None,
    evaluation: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    token: str | bool | None = None,
) -> None:
    """Write a full model into a folder: the files of the base model, and the adapter inside.

    Weights of the base model are those of its checkpoint, file by file; none is loaded as a whole. The key `hf_sparse`
    of config.json holds the adapter's configuration, and the last shard its tensors, by names that begin with
    `hf_sparse.`. `hf_sparse.from_pretrained` loads the folder.

    Args:
        model_or_dir: a `PeftModel`, whose active adapter is taken; or a folder with an adapter.
        folder: a new folder or an empty one; it appears whole or not at all.
        form: `"full"`, or `"merged"`, where LoRA (`lora_rank`) is added to the weights. These keep their dtype, so the
            sums are rounded to it, and what is dense in the model changes too.
        base_model: name or folder of the base model; by default the adapter says which.
        evaluation: content of eval.json; by default the folder's.
        training: content of finetune.json; by default the folder's.
        token: for a private or gated base model; the saved one by default.

    Raises:
        HubError: the base model cannot be read, its weights are not in files of safetensors with the usual names, or
            there is no LoRA to merge.
        AdapterMismatchError: `base_model` is not what the adapter was made for.
        DataError: a measurement is damaged, or is one of another budget.
        TypeError: neither a `PeftModel` with one active adapter of hf-sparse nor a folder.
        ValueError: the folder is not empty, or `form` is another.
    """
    check_form(form, ("full", "merged"))
    name = _active_adapter(model_or_dir)
    folder = Path(folder)
    check_free(folder)
    if isinstance(token, str):  # the saved one is checked where it is needed
        token = check_token(token)
    if not is_main_process():
        return
    with tempfile.TemporaryDirectory(prefix="hf-sparse-") as temporary:
        stage = Path(temporary, "stage")
        source = _stage(_saved(model_or_dir, name, Path(temporary, "saved")), stage, base_model, token, form)
        write_repo(stage, evaluation=evaluation, training=training, repo_id=folder.name, form=form)
        with staged(folder) as output:
            source.write(stage, output, form, link=False)


@dataclass(frozen=True)
class _Source:
    """Hold what a full model is made from beside the adapter: its base model, checked.

    Attributes:
        name: of the base model, as it can be resolved here.
        revision: of the base model on the Hub.
        token: for the Hub.
        skeleton: the base model without weights.
    """

    name: str
    revision: str | None
    token: str | bool | None
    skeleton: PreTrainedModel

    def write(self, stage: Path, output: Path, form: Form, *, link: bool) -> None:
        """Write a full model from the files of an adapter's repository, which it takes over.

        Args:
            stage: holds the adapter, its card and its measurements.
            output, form, link: see `write_full_model`.
        """
        with explained(f"cannot make a full model with the base model {self.name!r}"):
            base = base_files(self.name, self.revision, self.token)
            write_full_model(AdapterFolder(stage, "the adapter"), base, self.skeleton, output, form, link=link)
        for path in sorted(stage.iterdir()):
            if path.name not in (CONFIG, WEIGHTS):
                shutil.copyfile(path, output / path.name)


@contextmanager
def _prepared(
    model_or_dir: PeftModel | str | Path,
    repo_id: str,
    token: str | bool | None,
    form: Form,
    base_model: str | None,
    evaluation: dict[str, Any] | None,
    training: dict[str, Any] | None,
    license: str | None,
) -> Iterator[tuple[HfApi, Path, str]]:
    """Check a push and lay its files out: yield the client, the folder with the files, and the full name of the repo.

    Processes that were launched beside the main one get an empty folder.
    """
    check_form(form, ("adapter", "full", "merged"))
    name = _active_adapter(model_or_dir)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository id such as 'user/name': {short_line(error)}") from error
    if license is not None and not _LICENSE.fullmatch(license):
        raise HubError(f"expected the Hub's name of a license, such as 'apache-2.0' or 'other', got {license!r}")
    token = check_token(token)
    if token is False or (token in (None, True) and get_token() is None):
        raise HubError(f"cannot push to {repo_id} without a token: run `hf auth login`, set HF_TOKEN, or pass token=")
    api = HfApi(token=token)
    if "/" not in repo_id:
        with explained(f"cannot push to {repo_id}"):
            repo_id = f"{api.whoami()['name']}/{repo_id}"
    with tempfile.TemporaryDirectory(prefix="hf-sparse-") as temporary:
        stage = Path(temporary, "stage")
        if is_main_process():
            source = _stage(_saved(model_or_dir, name, Path(temporary, "saved")), stage, base_model, token, form)
            with explained(f"cannot push to {repo_id}"):
                metadata = _metadata_of(api, source.name) if is_public(source.name) else {}
            if license:  # with the name and link of the base's license left out
                metadata = {name: value for name, value in metadata.items() if not name.startswith("license")}
                metadata["license"] = license
            write_repo(stage, evaluation=evaluation, training=training, repo_id=repo_id, metadata=metadata, form=form)
            if form != "adapter":
                stage = Path(temporary, "full")
                stage.mkdir()
                source.write(Path(temporary, "stage"), stage, form, link=True)
        yield api, stage, repo_id


def _active_adapter(model: Any) -> str:
    """Return the name of the adapter to push; empty for a folder, which holds one.

    Raises:
        HubError: there is no such folder, or it holds no whole adapter.
        TypeError: neither a folder nor a model with one active adapter of hf-sparse.
    """
    if isinstance(model, str | Path):
        folder = Path(model)
        if not folder.is_dir():
            raise HubError(f"{folder} is not a folder, so there is no adapter to push")
        recover(folder)
        check_complete(folder, str(folder))
        return ""
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"expected a PeftModel or a folder, got {type(model).__name__}; peft.get_peft_model(model, config) with a "
            f"{config_names()} makes a model that can be pushed"
        )
    active = model.active_adapters
    if len(active) != 1:
        raise TypeError(f"expected a model with one active adapter, got {active}; choose one with set_adapter")
    config: Any = model.peft_config[active[0]]
    if config.peft_type.value not in registered_methods():
        raise TypeError(
            f"expected an active adapter of hf-sparse, but {active[0]!r} is of type {config.peft_type.value}"
        )
    return active[0]


def _saved(model_or_dir: PeftModel | str | Path, name: str, target: Path) -> Path:
    """Return the folder with an adapter: that of a model is saved into a new one first."""
    if not isinstance(model_or_dir, PeftModel):
        return Path(model_or_dir)
    model_or_dir.save_pretrained(str(target), selected_adapters=[name], save_embedding_layers=False)
    return target if name == "default" else target / name  # PEFT's rule


def _stage(folder: Path, stage: Path, base_model: str | None, token: str | bool | None, form: Form) -> _Source:
    """Copy an adapter and its measurements to a new folder; return its base model.

    An adapter alone names one that others can resolve.

    Raises:
        BusyError: another run holds the folder.
    """
    # Nobody replaces files between the reads; what takes no files is not replaced.
    with locked(folder) if os.access(folder, os.W_OK) else nullcontext():
        return _copy(folder, stage, base_model, token, form)


def _copy(folder: Path, stage: Path, base_model: str | None, token: str | bool | None, form: Form) -> _Source:
    """Do what `_stage` does, in a folder that nobody changes meanwhile."""
    adapter = AdapterFolder(folder)
    name = base_model or adapter.base_model
    if name is None:
        raise HubError("the adapter does not say which base model it is for; pass base_model='user/name'")
    if form == "adapter" and not is_public(name):
        raise HubError(
            f"the base model of the adapter is the folder {name!r}, which exists on this machine alone: push that "
            "model to the Hub first, then pass base_model='user/name'; or push as full, with that model inside"
        )
    if form != "adapter" and (over := dict(adapter.config.base_shape or {}).get("over")):
        raise HubError(
            f"the adapter was made over another PEFT adapter ({', '.join(over)}), which the base model does not have: "
            "merge that into the base model and save it first, or push the two adapters"
        )
    revision = None if base_model else adapter.config.revision
    with explained(f"cannot read the base model {name!r} of the adapter (base_model= names another)"):
        opened = open_base(name, revision=revision, token=token, **adapter.head)
        skeleton = opened.skeleton(adapter.model_class)
        check_fit(adapter, skeleton, name)
    stage.mkdir()
    shutil.copyfile(folder / WEIGHTS, stage / WEIGHTS)
    public = name if is_public(name) else None
    config = adapter.config_content | {"base_model_name_or_path": public, "revision": revision}
    (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
    for measurement in (EVALUATION, TRAINING):
        if (folder / measurement).exists():
            shutil.copyfile(folder / measurement, stage / measurement)
    return _Source(name, revision, token, skeleton)


def _metadata_of(api: HfApi, base_model: str) -> dict[str, Any]:
    """Return what the page of a base model on the Hub says of its license and its languages."""
    if base_model == BASE_NAME:
        return {}
    try:
        page: Any = api.model_info(base_model).card_data or {}
    except RepositoryNotFoundError:  # or not for this token; what was read of it is in the cache
        return {}
    # Nothing checked what people wrote there: a license may be a list, or what YAML makes of `no`.
    named = {name: page.get(name) for name in ("license", "license_name", "license_link", "language")}
    stated: dict[str, Any] = {name: value for name, value in named.items() if isinstance(value, str) and value}
    for name in ("license", "language"):
        several = named[name]
        if isinstance(several, list) and several and all(isinstance(one, str) for one in several):
            stated[name] = several
    if (link := stated.get("license_link")) and "://" not in link:  # a file of that repository
        stated["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return stated
