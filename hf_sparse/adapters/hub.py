"""Adapters on the Hub: load one together with its base model, and publish one in a single commit.

Only safetensors and JSON are read or written, and no code from a repository runs.
"""

import copy
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # httpx's or httpx2's, whichever this huggingface_hub uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel

from hf_sparse.access_tokens import check_token, redact, scrub
from hf_sparse.adapters.folder import CONFIG, EVALUATION, TRAINING, WEIGHTS, check_fit, check_loaded, read_adapter
from hf_sparse.adapters.repo import CARD, is_public, published_files, write_repo
from hf_sparse.atomic_files import read_object
from hf_sparse.base_model import open_base, resolve_base
from hf_sparse.bundled import BASE_NAME
from hf_sparse.core.registry import registered_methods
from hf_sparse.embeddings import embeddings_of
from hf_sparse.environment import is_main_process
from hf_sparse.errors import AdapterMismatchError, HfSparseError, HubError
from hf_sparse.folders import locked
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.attach import check_no_adapters
from hf_sparse.patches.heads import initialised

__all__ = ["from_pretrained", "push_to_hub", "resolve_base", "write_repo"]

# The Hub knows licenses by short names; which ones it tells itself, before anything is created.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")

_LONGEST = 500  # characters of a message that others wrote


def from_pretrained(
    repo_or_dir: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    base_model: str | Path | PreTrainedModel | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Load an adapter and the base model under it.

    Everything is checked before weights of the base are read, and before a base that was passed is changed.

    Args:
        repo_or_dir: id on the Hub, or a folder.
        revision: branch, tag or commit of the adapter on the Hub.
        token: for private or gated repositories; the saved one by default.
        base_model: name or folder of the base model, or the loaded model, which is patched in place. By default the
            adapter says which; the name `"demo"` is the checkpoint that comes with hf-sparse.
        adapter_name: name of the adapter in the returned model.
        is_trainable: leave the adapter's parameters trainable.
        **kwargs: for `from_pretrained` of the base model, which is loaded by the Auto class for what the adapter was
            made on: `dtype`, `device_map`, `cache_dir`, ... `attn_implementation` is for its dense layers, one of
            transformers' own; what the base's config.json says of it is not obeyed.

    Returns:
        A `PeftModel` in `eval` mode.

    Raises:
        HubError: no such repository, no access, files that are missing or damaged, not an adapter of hf-sparse, a
            token that cannot be one.
        AdapterMismatchError: the adapter was made for another base model.
        UnsupportedModelError: the base model has no sparse attention patch.
        ValueError: options that would run code from a repository, fetch kernels or unpickle weights; the base model
            has other adapters.
    """
    base = _check_options(base_model, kwargs)
    if isinstance(token, str):  # the saved one is checked where it is needed
        token = check_token(token)
    places: dict[str, Any] = {key: kwargs[key] for key in ("cache_dir", "local_files_only") if key in kwargs}
    adapter = read_adapter(_fetch(repo_or_dir, revision, token, places), str(repo_or_dir))
    if base is not None:
        with torch.device("meta"):
            skeleton = type(base)(copy.deepcopy(base.config))
        tokens = check_fit(adapter, skeleton, base.name_or_path or type(base).__name__)
        if tokens not in (None, size := _tokens(base)):
            raise AdapterMismatchError(
                f"{adapter.source} brings embeddings of {tokens} tokens, and the base model has {size}: call "
                f"resize_token_embeddings({tokens}) on it first"
            )
        check_loaded(adapter, base, initialised(base))
    else:
        name = str(base_model) if base_model else adapter.base_model
        if name is None:
            raise HubError(f"{adapter.source} does not say which base model it is for; pass base_model=")
        options: dict[str, Any] = {
            "revision": None if base_model else adapter.config.revision,
            "token": token,
            **places,
        }
        with _explained(f"cannot load the base model {name!r} of {adapter.source} (base_model= names another)"):
            head = adapter.head
            if head:
                head |= {key: kwargs[key] for key in ("num_labels", "id2label", "label2id") if key in kwargs}
                kwargs = {"ignore_mismatched_sizes": True, **head, **kwargs}  # the adapter's head takes its place
            opened = open_base(name, **{**options, **kwargs})
            tokens = check_fit(adapter, opened.skeleton(adapter.model_class), name)
            base, missing = opened.load(adapter.model_class)
            check_loaded(adapter, base, missing)
            if tokens not in (None, _tokens(base)):
                base.resize_token_embeddings(tokens, mean_resizing=False)  # the adapter has all of their values
    model = PeftModel.from_pretrained(
        base, adapter.folder, adapter_name=adapter_name, is_trainable=is_trainable, config=adapter.config
    )
    model.eval()
    return model


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

    Returns:
        URL of the repository.

    Raises:
        HubError: the Hub cannot be reached or refuses; the message says what to do, and what was created already.
        AdapterMismatchError: `base_model` is not what the adapter was made for.
        DataError: a measurement is damaged, or is one of another budget.
        TypeError: neither a `PeftModel` with one active adapter of hf-sparse nor a folder.
    """
    name = _active_adapter(model_or_dir)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository id such as 'user/name': {_one_line(error)}") from error
    if license is not None and not _LICENSE.fullmatch(license):
        raise HubError(f"expected the Hub's name of a license, such as 'apache-2.0' or 'other', got {license!r}")
    token = check_token(token)
    if token is False or (token in (None, True) and get_token() is None):
        raise HubError(f"cannot push to {repo_id} without a token: run `hf auth login`, set HF_TOKEN, or pass token=")
    api = HfApi(token=token)
    if "/" not in repo_id:
        with _explained(f"cannot push to {repo_id}"):
            repo_id = f"{api.whoami()['name']}/{repo_id}"
    if not is_main_process():
        return f"{api.endpoint}/{repo_id}"

    with tempfile.TemporaryDirectory(prefix="hf-sparse-") as temporary:
        stage, saved = Path(temporary, "stage"), Path(temporary, "saved")
        if isinstance(model_or_dir, PeftModel):
            model_or_dir.save_pretrained(str(saved), selected_adapters=[name], save_embedding_layers=False)
            folder = saved if name == "default" else saved / name  # PEFT's rule
        else:
            folder = Path(model_or_dir)
        name = _stage(folder, stage, base_model, token)
        with _explained(f"cannot push to {repo_id}"):
            stated = {"license": license} if license else _license_of(api, name)
        write_repo(stage, evaluation=evaluation, training=training, repo_id=repo_id, license=stated)
        return _commit(api, stage, repo_id, private, commit_message, revision)


def _tokens(base: PreTrainedModel) -> int | None:
    """How many tokens the embeddings of a base model have, `None` without embeddings."""
    return next((len(parameter) for parameter in embeddings_of(base).values()), None)


def _check_options(base_model: Any, kwargs: dict[str, Any]) -> PreTrainedModel | None:
    """The base model if it is loaded already, once the options are known to be safe."""
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code=True is refused: hf-sparse runs no code from a repository. If you trust the base "
            "model's code, load that model yourself and pass it as base_model="
        )
    if not kwargs.pop("use_safetensors", True):
        raise ValueError("use_safetensors=False is refused: hf-sparse loads no pickles, which can run code")
    if kwargs.pop("use_kernels", False) or kwargs.pop("kernel_config", None) is not None:
        raise ValueError("use_kernels=True is refused: hf-sparse fetches no kernels, which are code from a repository")
    if kwargs.pop("allow_all_kernels", False):
        raise ValueError("allow_all_kernels=True is refused: hf-sparse fetches no kernels")
    if "config" in kwargs:
        raise TypeError("config= is not taken: load the base model with it, and pass that model as base_model=")
    if base_model is None or isinstance(base_model, str | Path):
        return None
    if not isinstance(base_model, PreTrainedModel):
        raise TypeError(
            f"base_model must be a name or a transformers PreTrainedModel, got {type(base_model).__name__}"
            + (" (what it wraps is get_base_model())" if isinstance(base_model, PeftModel) else "")
        )
    if sparse_layers(base_model):
        raise ValueError("base_model has sparse attention already: hf_sparse.unpatch it first, or load it anew")
    check_no_adapters(base_model)
    if kwargs:
        raise TypeError(f"base_model is loaded already, so these would have no effect: {', '.join(sorted(kwargs))}")
    return base_model


def _fetch(repo_or_dir: str | Path, revision: str | None, token: str | bool | None, places: dict[str, Any]) -> Path:
    """The folder with the adapter's two files, downloaded if need be, both of one commit."""
    if Path(repo_or_dir).is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is of no use: {repo_or_dir} is a folder, which has no revisions")
        return Path(repo_or_dir)
    repo_id = str(repo_or_dir)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id} is neither a folder here nor a repository id: {error}") from error
    token = check_token(token)
    with _explained(f"cannot load the adapter {repo_id}" + (f" at revision {revision}" if revision else "")):
        wanted = [CONFIG, WEIGHTS]
        folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted, **places))
        for name in wanted:
            _check_download(folder / name)
    return folder


def _check_download(path: Path) -> None:
    """Check the content of a file in the cache, which is named by its hash; the client checks the size alone.

    Raises:
        OSError: it is not what the Hub has.
    """
    blob = path.resolve()
    if not blob.is_file() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # a cache without links, or an endpoint that names files by something else
    data = blob.read_bytes()
    if len(blob.name) == 64:
        hashes = [hashlib.sha256(data)]
    else:  # git's, or that of an endpoint that is not the Hub
        hashes = [hashlib.sha1(b"blob %d\0" % len(data) + data), hashlib.sha1(data)]
    if blob.name not in [content.hexdigest() for content in hashes]:
        raise OSError(f"{path.name} is damaged: its hash is not the one that the Hub has; delete {blob} and load again")


def _active_adapter(model: Any) -> str:
    """Name of the adapter to push; empty for a folder."""
    if isinstance(model, str | Path):
        return ""
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"expected a PeftModel or a folder, got {type(model).__name__}; peft.get_peft_model(model, "
            "hf_sparse.SparseKConfig(...)) makes a model that can be pushed"
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
    adapter = read_adapter(folder, str(folder))
    name = base_model or adapter.base_model
    if name is None:
        raise HubError("the adapter does not say which base model it is for; pass base_model='user/name'")
    if not is_public(name):
        raise HubError(
            f"the base model of the adapter is the folder {name!r}, which exists on this machine alone: push that "
            "model to the Hub first, then pass base_model='user/name'"
        )
    revision = None if base_model else adapter.config.revision
    with _explained(f"cannot read the base model {name!r} of the adapter (base_model= names another)"):
        opened = open_base(name, revision=revision, token=token, **adapter.head)
        check_fit(adapter, opened.skeleton(adapter.model_class), name)
    stage.mkdir()
    shutil.copyfile(folder / WEIGHTS, stage / WEIGHTS)
    named = {"base_model_name_or_path": name, "revision": revision}
    config = read_object(folder / CONFIG) | named
    (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
    for measurement in (EVALUATION, TRAINING):
        if (folder / measurement).exists():
            shutil.copyfile(folder / measurement, stage / measurement)
    return name


def _license_of(api: HfApi, base_model: str) -> dict[str, Any]:
    """What the page of a base model on the Hub says of its license."""
    if base_model == BASE_NAME:
        return {}
    try:
        page: Any = api.model_info(base_model).card_data or {}
    except RepositoryNotFoundError:  # or not for this token; what was read of it is in the cache
        return {}
    # Nothing checked what people wrote there: a license may be a list, or what YAML makes of `no`.
    said = {name: page.get(name) for name in ("license", "license_name", "license_link")}
    stated: dict[str, Any] = {name: value for name, value in said.items() if isinstance(value, str) and value}
    several = said["license"]
    if isinstance(several, list) and several and all(isinstance(one, str) for one in several):
        stated["license"] = several
    if (link := stated.get("license_link")) and "://" not in link:  # a file of that repository
        stated["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return stated


def _check_card(api: HfApi, card: str) -> None:
    """Ask the Hub whether it takes a card, before anything is created there.

    Raises:
        HubError: it does not.
        HTTPError: it cannot be asked.
    """
    headers = build_hf_headers(token=api.token)
    body = {"content": card, "repoType": "model"}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body, headers=headers)
    if answer.status_code == 400:
        try:
            reasons = "; ".join(str(error["message"]) for error in answer.json()["errors"])
        except (ValueError, LookupError, TypeError):
            reasons = answer.text
        raise HubError(f"the Hub does not take the card: {_one_line(reasons)}; nothing was created")
    hf_raise_for_status(answer)


def _commit(api: HfApi, stage: Path, repo_id: str, private: bool, message: str, revision: str | None) -> str:
    """Bring the staged files to the Hub and return the repository's URL.

    The commit names as its parent the commit that was looked at, so of two pushes at the same time one is refused.
    """
    created: list[str] = []
    with _explained(f"cannot push to {repo_id}", lambda: _left(created)):
        _check_card(api, (stage / CARD).read_text("utf-8"))
        try:
            seen = api.model_info(repo_id)
            if private and not seen.private:
                raise HubError(f"{repo_id} exists and is public: make it private first, or push without private=True")
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private)
            created.append(f"the empty repository {repo_id}")
            seen = api.model_info(repo_id)
        if revision is not None:
            try:
                seen = api.model_info(repo_id, revision=revision)
            except RevisionNotFoundError:
                api.create_branch(repo_id, branch=revision, revision=seen.sha)
                created.append(f"the branch {revision}")
        held = {file.rfilename for file in seen.siblings or ()}
        staged = {path.name for path in stage.iterdir()}
        operations: list[Any] = [CommitOperationAdd(name, stage / name) for name in sorted(staged)]
        operations += [CommitOperationDelete(name) for name in published_files() if name in held and name not in staged]
    with _explained(f"cannot push to {repo_id}", partial(_after_commit, api, repo_id, revision, seen.sha, created)):
        # Not upload_folder, which makes several commits where Xet is installed.
        api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=seen.sha)
    return f"{api.endpoint}/{repo_id}"


def _left(created: list[str]) -> str:
    return f" (created before that: {' and '.join(created)}; push again or delete)" if created else ""


def _after_commit(api: HfApi, repo_id: str, revision: str | None, parent: str | None, created: list[str]) -> str:
    """Say what exists after a commit that failed, as the Hub has it: an answer may be lost when the commit is not."""
    try:
        newest = api.model_info(repo_id, revision=revision).sha
    except Exception:
        return f"; whether anything was published is not known{_left(created)}"
    if newest == parent:
        return f"; nothing was published{_left(created)}"
    return f"; the newest commit of {repo_id} is now {str(newest)[:7]}, of this push or of another: look at it first"


@contextmanager
def _explained(what: str, left: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn every failure to reach the Hub or to read from it into one `HubError`: what to do, and what is left.

    Clients and their storages fail with exceptions of many kinds, RuntimeError among them, and new versions add others.
    """
    try:
        yield
    except (HfSparseError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        scrub(error)
        raise HubError(f"{what}: {_advice(error)}{left()}") from error


def _advice(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return f"{_advice(error.__cause__)}; it is not in the cache either"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or this token may not see it (`hf auth login`)"
    if isinstance(error, HfHubHTTPError):
        return _advice_on_status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HTTPError):
        return f"the Hub cannot be reached ({_one_line(error)}): check the network"
    said = _one_line(error).removesuffix(".") or type(error).__name__
    if not isinstance(error, OSError | ValueError) and error.__cause__ is not None:  # says what failed, but not why
        return f"{said}: {_advice(error.__cause__)}"
    return said


def _advice_on_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    # Files lie elsewhere, under addresses that are signed for a while: what it refuses is not the token.
    request = getattr(error.response, "_request", None)  # the property raises where there was none
    at_hub = request is None or str(request.url).startswith(constants.ENDPOINT)
    failed = f"the {'Hub' if at_hub else 'storage of the Hub'} failed ({status}): try again later"
    known = {
        401: "the token is not valid (401): run `hf auth login`, or pass token=",
        403: "this token may not do that (403): check the owner's name and that the token may write",
        404: "the Hub does not find it (404): see that the repository still exists",
        409: "the name is taken, or another change got in between (409): try again",
        412: "another change got in between (412): try again",
    }
    refused = {
        413: "a file is larger than it takes (413)",
        429: "there were too many requests (429): wait, then try again",
    }
    if status >= 500:
        return failed
    if status in refused:
        return refused[status]
    if not at_hub:
        return f"the storage of the Hub refused ({status}): try again"
    return known.get(status, _one_line(error))


def _one_line(error: object) -> str:
    """The message of an exception without line ends and secrets, and not longer than a person reads."""
    text = redact(" ".join(str(error).split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
