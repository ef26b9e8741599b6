"""Look at a repository on the Hub, say what a push changes there, and make the change in one commit."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hf_sparse.adapters.files import CARD, INDEX, MODEL_CONFIG, SHARDS, SINGLE, published_files
from hf_sparse.adapters.hub_errors import explained, short_line
from hf_sparse.atomic_files import read_object
from hf_sparse.errors import HubError
from hf_sparse.patches.saving import INSIDE


@dataclass(frozen=True)
class PushPlan:
    """Describe what a push does to a repository.

    Attributes:
        repo_id: `"user/name"`.
        url: of the repository.
        revision: the branch that is pushed to, or that a pull request is opened against; `None` is the main one.
        creates: what comes into being beside the commit, as texts such as `"the branch v2"`.
        create_pr: the commit opens a pull request.
        uploads: size in bytes of each file, by its name.
        deletes: files of an earlier push that this one does not have.
        parent: the commit that the push adds to; `None` where the repository or the branch is created.
    """

    repo_id: str
    url: str
    revision: str | None
    creates: tuple[str, ...]
    create_pr: bool
    uploads: dict[str, int]
    deletes: tuple[str, ...]
    parent: str | None


def plan_of(api: HfApi, stage: Path, repo_id: str, private: bool, revision: str | None, create_pr: bool) -> PushPlan:
    """Look at a repository and say what a push of the staged files does to it.

    Raises:
        HubError: the Hub cannot be reached, does not take the card, or has nothing that a pull request can change.
    """
    creates: list[str] = []
    seen: Any = None
    with explained(f"cannot push to {repo_id}"):
        _check_card(api, (stage / CARD).read_text("utf-8"))
        try:
            seen = api.model_info(repo_id)
        except RepositoryNotFoundError:
            creates.append(f"the repository {repo_id}")
        if private and seen is not None and not seen.private:
            raise HubError(f"{repo_id} exists and is public: make it private first, or push without private=True")
        if revision is not None and seen is not None:
            try:
                seen = api.model_info(repo_id, revision=revision)
            except RevisionNotFoundError:
                creates.append(f"the branch {revision}")
        elif revision is not None:
            creates.append(f"the branch {revision}")
    if create_pr and creates:
        raise HubError(f"a pull request changes what exists, and {creates[0]} does not: push without create_pr=True")
    held = {file.rfilename for file in seen.siblings or ()} if seen is not None else set()
    uploads = {path.name: path.stat().st_size for path in sorted(stage.iterdir())}
    replaced = [*published_files()]
    if model := [name for name in (MODEL_CONFIG, SINGLE, INDEX) if name in held]:
        with explained(f"cannot push to {repo_id}"):
            is_ours = MODEL_CONFIG in held and _is_full_model(api, repo_id, seen.sha)
        if is_ours:  # maybe saved again by transformers alone, in a single file that would be read before the shards
            replaced += [*model, *(name for name in sorted(held) if fnmatchcase(name, SHARDS))]
        elif MODEL_CONFIG in uploads:
            raise HubError(f"{repo_id} holds another model ({model[0]}): push to a new repository or branch")
    return PushPlan(
        repo_id=repo_id,
        url=f"{api.endpoint}/{repo_id}",
        revision=revision,
        creates=tuple(creates),
        create_pr=create_pr,
        uploads=uploads,
        deletes=tuple(name for name in replaced if name in held and name not in uploads),
        parent=None if creates else seen.sha,
    )


def _is_full_model(api: HfApi, repo_id: str, revision: str) -> bool:
    """Tell whether the model in a repository is a full model that hf-sparse pushed."""
    try:
        return INSIDE in read_object(Path(api.hf_hub_download(repo_id, MODEL_CONFIG, revision=revision)))
    except ValueError:
        return False


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
        raise HubError(f"the Hub does not take the card: {short_line(reasons)}; nothing was created")
    hf_raise_for_status(answer)


def carry_out(api: HfApi, stage: Path, plan: PushPlan, private: bool, message: str) -> str:
    """Bring the staged files to the Hub and return the URL of the repository or of the pull request.

    The commit names as its parent the commit that was looked at, so of two pushes at the same time one is refused.
    """
    repo_id, revision, parent = plan.repo_id, plan.revision, plan.parent
    created: list[str] = []
    with explained(f"cannot push to {repo_id}", lambda: _left(created)):
        if f"the repository {repo_id}" in plan.creates:
            api.create_repo(repo_id, private=private)
            created.append(f"the empty repository {repo_id}")
        if f"the branch {revision}" in plan.creates:
            api.create_branch(repo_id, branch=str(revision), revision=api.model_info(repo_id).sha)
            created.append(f"the branch {revision}")
        if parent is None:
            parent = api.model_info(repo_id, revision=revision).sha
        operations: list[Any] = [CommitOperationAdd(name, stage / name) for name in plan.uploads]
        operations += [CommitOperationDelete(name) for name in plan.deletes]
    with explained(f"cannot push to {repo_id}", partial(_after_commit, api, repo_id, revision, parent, created)):
        # Not upload_folder, which makes several commits where Xet is installed.
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=revision,
            parent_commit=parent,
            create_pr=plan.create_pr,
        )
    if plan.create_pr and commit.pr_url is None:
        raise HubError(f"{repo_id} holds these very files: there is nothing to open a pull request for")
    return commit.pr_url or plan.url


def _left(created: list[str]) -> str:
    """Say what a push that failed had created."""
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
