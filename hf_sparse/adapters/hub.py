"""Publish an adapter on the Hub in a single commit. Only safetensors and JSON are read or written."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel

from hf_sparse.access_tokens import check_token
from hf_sparse.adapters.files import CONFIG, EVALUATION, TRAINING, WEIGHTS
from hf_sparse.adapters.fit import check_fit
from hf_sparse.adapters.folder import AdapterFolder, write_repo
from hf_sparse.adapters.hub_errors import explained, short_line
from hf_sparse.adapters.push_plan import PushPlan, carry_out, plan_of
from hf_sparse.base_model import is_public, open_base
from hf_sparse.bundled import BASE_NAME
from hf_sparse.core.registry import registered_methods
from hf_sparse.environment import is_main_process
from hf_sparse.errors import HubError
from hf_sparse.folders import locked

# The Hub knows licenses by short names; which ones it tells itself, before anything is created.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


def push_to_hub(
    model_or_dir: PeftModel | str | Path,
    repo_id: str,
    *,
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
    """Publish an adapter with its card, measurements and figure: one commit, or none.

    Of two pushes to one repository at the same time one fails, and the repository holds all files of the other.

    The adapter is first checked against the configuration of its base model, so that what is pushed can be loaded.
    The card is written anew by every push. Files of an earlier push that this one does not have (an eval.json, say)
    are removed in the same commit; files that are not hf-sparse's stay. Of processes that were launched together the
    first one pushes.

    Args:
        model_or_dir: a `PeftModel`, of which the active adapter is pushed; or a folder with an adapter, of which
            nothing but the adapter, eval.json and finetune.json is taken.
        repo_id: `"user/name"`, or `"name"` for a repository of your own; created if it does not exist.
        base_model: id of the base model on the Hub. Needed if the base was loaded from a folder, whose path would mean
            nothing elsewhere: push that model first. The checkpoint that comes with hf-sparse is `"demo"` and needs
            no push.
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
    """
    prepared = _prepared(model_or_dir, repo_id, token, base_model, evaluation, training, license)
    with prepared as (api, stage, repo_id):
        if not is_main_process():
            return f"{api.endpoint}/{repo_id}"
        plan = plan_of(api, stage, repo_id, private, revision, create_pr)
        return carry_out(api, stage, plan, private, commit_message)


def plan_push(
    model_or_dir: PeftModel | str | Path,
    repo_id: str,
    *,
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

    The arguments and errors are those of `push_to_hub`. The Hub is asked, so a token is needed here too.
    """
    prepared = _prepared(model_or_dir, repo_id, token, base_model, evaluation, training, license)
    with prepared as (api, stage, repo_id):
        return plan_of(api, stage, repo_id, private, revision, create_pr)


@contextmanager
def _prepared(
    model_or_dir: PeftModel | str | Path,
    repo_id: str,
    token: str | bool | None,
    base_model: str | None,
    evaluation: dict[str, Any] | None,
    training: dict[str, Any] | None,
    license: str | None,
) -> Iterator[tuple[HfApi, Path, str]]:
    """Check a push and lay its files out: yield the client, the folder with the files, and the full name of the repo.

    Processes that were launched beside the main one get an empty folder.
    """
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
        stage, saved = Path(temporary, "stage"), Path(temporary, "saved")
        if is_main_process():
            if isinstance(model_or_dir, PeftModel):
                model_or_dir.save_pretrained(str(saved), selected_adapters=[name], save_embedding_layers=False)
                folder = saved if name == "default" else saved / name  # PEFT's rule
            else:
                folder = Path(model_or_dir)
            base = _stage(folder, stage, base_model, token)
            with explained(f"cannot push to {repo_id}"):
                metadata = _metadata_of(api, base)
            if license:  # with the name and link of the base's license left out
                metadata = {name: value for name, value in metadata.items() if not name.startswith("license")}
                metadata["license"] = license
            write_repo(stage, evaluation=evaluation, training=training, repo_id=repo_id, metadata=metadata)
        yield api, stage, repo_id


def _active_adapter(model: Any) -> str:
    """Return the name of the adapter to push; empty for a folder."""
    if isinstance(model, str | Path):
        return ""
    if not isinstance(model, PeftModel):
        configs = " or a ".join(method.config.__name__ for method in registered_methods().values())
        raise TypeError(
            f"expected a PeftModel or a folder, got {type(model).__name__}; peft.get_peft_model(model, config) with a "
            f"{configs} makes a model that can be pushed"
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


def _stage(folder: Path, stage: Path, base_model: str | None, token: str | bool | None) -> str:
    """Copy an adapter and its measurements to a new folder; return the name of its base model, which holds everywhere.

    Raises:
        BusyError: another run holds the folder.
    """
    if not folder.is_dir():
        raise HubError(f"{folder} is not a folder, so there is no adapter to push")
    # Nobody replaces files between the reads; what takes no files is not replaced.
    with locked(folder) if os.access(folder, os.W_OK) else nullcontext():
        return _copy(folder, stage, base_model, token)


def _copy(folder: Path, stage: Path, base_model: str | None, token: str | bool | None) -> str:
    """Do what `_stage` does, in a folder that nobody changes meanwhile."""
    adapter = AdapterFolder(folder)
    name = base_model or adapter.base_model
    if name is None:
        raise HubError("the adapter does not say which base model it is for; pass base_model='user/name'")
    if not is_public(name):
        raise HubError(
            f"the base model of the adapter is the folder {name!r}, which exists on this machine alone: push that "
            "model to the Hub first, then pass base_model='user/name'"
        )
    revision = None if base_model else adapter.config.revision
    with explained(f"cannot read the base model {name!r} of the adapter (base_model= names another)"):
        opened = open_base(name, revision=revision, token=token, **adapter.head)
        check_fit(adapter, opened.skeleton(adapter.model_class), name)
    stage.mkdir()
    shutil.copyfile(folder / WEIGHTS, stage / WEIGHTS)
    config = adapter.config_content | {"base_model_name_or_path": name, "revision": revision}
    (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
    for measurement in (EVALUATION, TRAINING):
        if (folder / measurement).exists():
            shutil.copyfile(folder / measurement, stage / measurement)
    return name


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
