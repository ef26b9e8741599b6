"""A test Hub: one threaded HTTP server on 127.0.0.1 that unmodified Hugging Face clients can push to and pull from.

It speaks both transports, classic LFS (clients run with `HF_HUB_DISABLE_XET=1`) and Xet (`loopback_xet.py` holds its
formats), keeps everything in memory and uses only the standard library. What came by one is given out by both. It holds
models and datasets, with branches and tags; a pull request is a branch `refs/pr/N` that nobody merges. Left out on
purpose: LFS multipart, deduplication among clients, gating, pagination. The card rules are a guess, as the real ones
are not public.

Requests are answered one at a time, so a commit is seen whole or not at all, whatever the clients do in parallel.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_THRESHOLD = 10 * 2**20  # bytes; larger files go to LFS whatever their name
LFS_NAMES = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack|npz|npy|parquet|arrow|zip|gz|png)$")
XET_TOKEN = "xet_test"  # what the Hub's token is exchanged for, for the content store
INVALID_TOKEN = "Invalid credentials in Authorization header"  # clients compare with this exact text


class Request(NamedTuple):
    method: str
    path: str  # still percent-encoded, so that a revision such as refs%2Fheads%2Fx stays one segment
    query: dict[str, list[str]]
    headers: Message  # looks names up whatever their case
    body: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())


class HubError(Exception):
    """An answer other than success; clients choose their exception by the status and by `code` (`X-Error-Code`)."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **body: Any):
        super().__init__(message)
        header = {"X-Error-Message": message.encode("ascii", "replace").decode().replace("\n", " ")}
        header |= {"X-Error-Code": code} if code else {}
        self.response = reply({"error": message, **body}, status, {**header, **(headers or {})})


class Blob:
    """One file of one commit. `oid` is what git would name it: for LFS the hash of the pointer, not of the content."""

    def __init__(self, data: bytes, lfs: bool = False):
        self.data = data
        self.sha256 = hashlib.sha256(data).hexdigest() if lfs else None
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n"
        stored = pointer.encode() if lfs else data
        self.oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        self.lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(data), "pointerSize": len(stored)}
        self.etag = self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    id: str
    parent: "Commit | None"
    title: str
    message: str
    date: str
    files: dict[str, Blob]

    def entry(self, path: str) -> dict[str, Any] | None:
        """Describes a file or a folder as tree and paths-info do; None when the commit has neither."""
        if blob := self.files.get(path):
            entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
            return {**entry, "lfs": blob.lfs} if blob.sha256 else entry
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
        return None


@dataclass
class Repo:
    kind: str  # "models" or "datasets"
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    @property
    def url_path(self) -> str:
        return f"/{self.id}" if self.kind == "models" else f"/{self.kind}/{self.id}"

    def at(self, revision: str) -> Commit:
        """The commit of a branch, of a tag, or of a commit id given by at least 7 digits."""
        if found := self.branches.get(revision) or self.tags.get(revision):
            return found
        for commit_id, commit in self.commits.items():
            if len(revision) >= 7 and commit_id.startswith(revision):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_commit(self, branch: str, files: dict[str, Blob], title: str, message: str = "") -> None:
        """Builds the whole commit, then moves the branch to it."""
        commit_id = secrets.token_hex(20)  # never the same twice, as clients cache by it and repositories are recreated
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        commit = Commit(commit_id, self.branches.get(branch), title, message, date, files)
        self.commits[commit_id] = self.branches[branch] = commit


def apply_operation(files: dict[str, Blob], objects: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
    """Applies one line of a commit body to `files`, the caller's copy, so an error leaves the repository alone."""
    path = value["path"].rstrip("/")
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        data = objects.get(value["oid"])
        if data is None or value.get("size", len(data)) != len(data):
            raise HubError(400, f"LFS object {value['oid']} of {path} was not uploaded, or has another size")
        files[path] = Blob(data, lfs=True)
    else:
        folder = {"deletedFile": None, "deletedFolder": f"{path}/"}[key]
        doomed = [name for name in files if (name.startswith(folder) if folder else name == path)]
        if not doomed:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in doomed:
            del files[name]


def file_response(request: Request, blob: Blob, headers: dict[str, str]) -> Response:
    """The content, or the part of it that the Range header asks for."""
    size = len(blob.data)
    headers = {**headers, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if wanted is None:
        return Response(200, headers, blob.data)
    start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
    if start >= stop:
        raise HubError(416, "range past the end", headers={"Content-Range": f"bytes */{size}"})
    return Response(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, blob.data[start:stop])


def card_errors(card: Any) -> list[str]:
    """An approximation of the Hub's rules for the metadata of a card."""
    if not isinstance(card, dict):
        return ["the metadata must be a mapping"]
    errors = []
    for key, kind in {"library_name": str, "pipeline_tag": str, "tags": list, "model-index": list}.items():
        if not isinstance(card.get(key, kind()), kind):
            errors.append(f"{key!r} must be a {kind.__name__}")
    for key in ("base_model", "datasets"):
        names = card.get(key, [])
        for name in names if isinstance(names, list) else [names]:
            if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)):
                errors.append(f"{key!r} holds {name!r}, which is not a repository id")
    if card.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append("'base_model_relation' must be one of adapter, finetune, merge, quantized")
    if not re.fullmatch(r"[a-z0-9.-]+", str(card.get("license", "mit"))):
        errors.append("'license' must be a lower-case identifier")
    if any(not {"name", "results"} <= set(entry) for entry in card.get("model-index") or []):
        errors.append("each entry of 'model-index' needs 'name' and 'results'")
    return errors


_PARTS = {
    "{api}": "/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)",
    "{site}": "/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)",  # outside /api models have no prefix
    "{rev}": "(?P<rev>[^/]+)",
    "{path}": "(?P<path>.+)",
}
_ROUTES: list[tuple[list[str], re.Pattern[str], bool, Callable[..., Response]]] = []


def route(methods: str, template: str, write: bool = False) -> Callable:
    """Registers a method of `LoopbackHub`. It gets the parts of the path as arguments, `repo` as a checked `Repo`."""
    for part, pattern in _PARTS.items():
        template = template.replace(part, pattern)

    def register(answer: Callable[..., Response]) -> Callable[..., Response]:
        _ROUTES.append((methods.split(), re.compile(template), write, answer))
        return answer

    return register


class LoopbackHub:
    """The server and its state; it runs from construction until `close`.

    `parse_yaml` reads the metadata of cards; without it they go unread, as the standard library has no YAML parser.
    `xet` is a `XetStore` of `loopback_xet.py`; without it only the classic transport works.
    """

    def __init__(
        self,
        user: str = "tester",
        token: str = "hf_test",
        parse_yaml: Callable[[str], Any] | None = None,
        xet: Any = None,
    ):
        self.user, self.token, self._parse_yaml = user, token, parse_yaml
        self.requests: list[tuple[str, str]] = []  # (method, decoded path without the query), in order of arrival
        self._repos: dict[tuple[str, str], Repo] = {}
        self._objects: dict[str, bytes] = {}  # LFS content by sha256
        self._xet = xet
        self._failures: list[tuple[re.Pattern[str], HubError]] = []  # one entry per request that is to fail
        self._faults: list[tuple[str, str, re.Pattern[str], Callable[..., Any]]] = []  # (when, method, path, what)
        self.override: dict[str, Any] = {}  # by pattern of the path, an answer in place of the real one
        self.is_cut = False  # whether the connection is lost for good
        self.licenses: set[str] | None = None  # the only ones that cards may have
        self._lock = threading.Lock()
        self._server = Server(("127.0.0.1", 0), partial(Handler, self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Clients follow a redirect to the Hub's own origin and then miss X-Repo-Commit, which only the redirect
        # carries. The other name of this machine is another origin, as the real Hub's storage is.
        self.storage = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, name="loopback-hub", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail_next(self, path_regex: str, status: int, times: int = 1, code: str = "", message: str = "") -> None:
        """Answers the next `times` requests whose path matches (`re.search`) with `status`; they have no effect.

        Clients repeat preupload, LFS batch and LFS upload on 5xx, up to 5 times with growing pauses, so `times=1` only
        delays those. They do not repeat create, commit and resolve.
        """
        usual = INVALID_TOKEN if (status, code) == (401, "") else f"failure injected by the test ({status})"
        self._failures += [(re.compile(path_regex), HubError(status, message or usual, code))] * times

    def before_next(self, method: str, path_regex: str, action: Callable[[], Any]) -> None:
        """Calls `action` when the next such request has come, before it is answered: another client may act in it."""
        self._faults.append(("before", method, re.compile(path_regex), action))

    def cut_next(self, method: str, path_regex: str, *, answered: bool = False, times: int = 1) -> None:
        """Closes the connection of the next such requests without an answer.

        With `answered` they have had their effect, and half of the answer was sent. Clients repeat most requests.
        """
        when = "after" if answered else "before"
        self._faults += [(when, method, re.compile(path_regex), _cut)] * times

    def cut_from_next(self, method: str, path_regex: str, *, skipped: int = 0) -> None:
        """Closes the connection of one such request and of all that follow, unanswered; a few may come before it."""

        def lose() -> None:
            self.is_cut = True
            _cut()

        for action in (*[lambda: None] * skipped, lose):
            self.before_next(method, path_regex, action)

    def damage_next(self, path_regex: str, change: Callable[[bytes], bytes]) -> None:
        """Changes the content of the next file that is sent; the headers tell its old hash."""
        self._faults.append(("content", "GET", re.compile(path_regex), change))

    def take_fault(self, when: str, request: Request) -> Callable[..., Any] | None:
        for index, (moment, method, pattern, action) in enumerate(self._faults):
            if (moment, method) == (when, request.method) and pattern.search(unquote(request.path)):
                del self._faults[index]
                return action
        return None

    def count(self, method: str, path_regex: str) -> int:
        """How many recorded requests match, for example `count("POST", "/commit/")`."""
        return sum(m == method and re.search(path_regex, path) is not None for m, path in self.requests)

    def reset_trace(self) -> None:
        """Forgets the recorded requests and the failures still waiting; the repositories stay."""
        self.requests.clear()
        self._failures.clear()
        self._faults.clear()
        self.is_cut = False

    def handle(self, request: Request) -> Response:
        with self._lock:
            path = unquote(request.path)
            self.requests.append((request.method, path))
            try:
                self._raise_injected(path)
                for pattern, answer in self.override.items():
                    if re.search(pattern, path):
                        return reply(answer)
                return self._dispatch(request)
            except HubError as error:
                return error.response
            except Exception as error:  # a malformed request or a bug here: shown in the test's captured stderr
                traceback.print_exc()
                return HubError(501, f"loopback Hub failed: {error!r}").response  # clients would repeat a 500

    def _raise_injected(self, path: str) -> None:
        for index, (pattern, error) in enumerate(self._failures):
            if pattern.search(path):
                del self._failures[index]
                raise error

    def _dispatch(self, request: Request) -> Response:
        for methods, pattern, write, answer in _ROUTES:
            if request.method in methods and (match := pattern.fullmatch(request.path)):
                parts: dict[str, Any] = {name: unquote(part) for name, part in match.groupdict().items() if part}
                if write:
                    self._authenticate(request)
                if "repo" in parts:
                    parts["repo"] = self._find_repo(request, parts.pop("kind", "models"), parts["repo"], write)
                return answer(self, request, **parts)
        raise HubError(404, f"the loopback Hub has no route {request.method} {request.path}")

    def _is_known(self, request: Request) -> bool:
        return request.headers.get("Authorization") == f"Bearer {self.token}"

    def _authenticate(self, request: Request) -> None:
        if not self._is_known(request):
            raise HubError(401, INVALID_TOKEN)

    def _check_owner(self, repo_id: str) -> None:
        if not repo_id.startswith(f"{self.user}/"):
            raise HubError(403, f"You don't have the rights to write to {repo_id}")

    def _find_repo(self, request: Request, kind: str, repo_id: str, write: bool) -> Repo:
        if write:
            self._check_owner(repo_id)
        repo = self._repos.get((kind, repo_id))
        if repo is None or (repo.private and not self._is_known(request)):
            raise HubError(401 if repo else 404, "Repository not found", "RepoNotFound")
        return repo

    def _read_card(self, text: str) -> dict[str, Any] | None:
        """The metadata of a card, None when it has none; raises when the Hub would refuse the card."""
        block = re.match(r"\s*---[ \t]*\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
        if block is None or self._parse_yaml is None:
            return None
        try:
            card = self._parse_yaml(block[1])
            errors = card_errors(card)
            if self.licenses is not None and isinstance(card, dict) and card.get("license") not in self.licenses:
                errors.append(f"'license' must be one of {', '.join(sorted(self.licenses))}")
        except Exception as error:  # the type belongs to the parser
            card, errors = None, [f"broken YAML: {error}"]
        if errors:
            messages = [{"message": message} for message in errors]
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}", errors=messages, warnings=[])
        return card

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Response:
        self._authenticate(request)
        return reply({"type": "user", "name": self.user, "orgs": [], "auth": {}})

    @route("POST DELETE", "/api/repos/(create|delete)", write=True)
    def _create_or_delete(self, request: Request) -> Response:
        body = request.json()
        repo_id = f"{body.get('organization') or self.user}/{body['name']}"
        repo = Repo(f"{body.get('type') or 'model'}s", repo_id, body.get("visibility") == "private")
        self._check_owner(repo_id)
        if request.method == "DELETE":
            self._find_repo(request, repo.kind, repo_id, write=True)
            del self._repos[repo.kind, repo_id]
            return reply({})
        url = f"{self.endpoint}{repo.url_path}"
        if (repo.kind, repo_id) in self._repos:  # exist_ok=True swallows the 409, then reads the url from it
            raise HubError(409, "You already created this repository", url=url)
        repo.add_commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs -text\n")}, "initial commit")
        self._repos[repo.kind, repo_id] = repo
        return reply({"url": url, "name": repo_id, "id": repo_id})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Response:
        card = self._read_card(request.json()["content"])
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if card is None else []
        return reply({"errors": [], "warnings": warnings})

    @route("GET", "{api}(?:/revision/{rev})?")
    def _info(self, request: Request, repo: Repo, rev: str = "main") -> Response:
        commit = repo.at(rev)
        readme = commit.files.get("README.md", Blob(b""))
        try:
            card = self._read_card(readme.data.decode()) or {}
        except HubError:  # the rules were others when it was committed
            card = {}
        siblings = [
            {"rfilename": path, "size": len(blob.data), "blobId": blob.oid, "lfs": blob.lfs if blob.sha256 else None}
            for path, blob in commit.files.items()
        ]
        named = {key: card[key] for key in ("library_name", "pipeline_tag", "tags") if key in card}
        state = {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        info = {"id": repo.id, "sha": commit.id, "lastModified": commit.date, "siblings": siblings, "cardData": card}
        return reply({**state, **info, **named})

    @route("GET", "{api}/tree/{rev}(?:/{path})?")
    def _tree(self, request: Request, repo: Repo, rev: str, path: str = "") -> Response:
        commit, prefix = repo.at(rev), f"{path}/" if path else ""
        recursive = request.query.get("recursive", [""])[0].lower() == "true"
        entries: dict[str, Any] = {}
        for name in commit.files:
            if name.startswith(prefix):
                parts = name.removeprefix(prefix).split("/")
                for depth in range(len(parts) if recursive else 1):
                    entry = prefix + "/".join(parts[: depth + 1])
                    entries[entry] = commit.entry(entry)
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        return reply([entries[name] for name in sorted(entries)])

    @route("POST", "{api}/paths-info/{rev}")
    def _paths_info(self, request: Request, repo: Repo, rev: str) -> Response:
        commit, paths = repo.at(rev), parse_qs(request.body.decode()).get("paths", [])
        return reply([entry for path in paths if (entry := commit.entry(path))])

    @route("GET", "{api}/refs")
    def _refs(self, request: Request, repo: Repo) -> Response:
        def describe(refs: dict[str, Commit], folder: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.id} for n, c in refs.items()]

        return reply(
            {"branches": describe(repo.branches, "heads"), "tags": describe(repo.tags, "tags"), "converts": []}
        )

    @route("POST", "{api}/(?P<what>branch|tag)/{rev}", write=True)
    def _add_ref(self, request: Request, repo: Repo, what: str, rev: str) -> Response:
        """A branch is named in the path and a tag in the body; the path then holds the tagged revision."""
        body = request.json()
        name, start = (rev, body.get("startingPoint", "main")) if what == "branch" else (body["tag"], rev)
        refs = repo.branches if what == "branch" else repo.tags
        if name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        refs[name] = repo.at(start)
        return reply({})

    @route("GET", "{api}/commits/{rev}")
    def _commits(self, request: Request, repo: Repo, rev: str) -> Response:
        history = []
        commit: Commit | None = repo.at(rev)
        while commit:
            entry = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
            history.append({**entry, "authors": [{"user": self.user}]})
            commit = commit.parent
        return reply(history)

    @route("POST", "{api}/preupload/{rev}", write=True)
    def _preupload(self, request: Request, repo: Repo, rev: str) -> Response:
        """Chooses the transport of each file, and tells what is held already so that clients skip unchanged files."""
        held, answers = repo.at(rev).files, []
        for file in request.json()["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if binary or file["size"] > LFS_THRESHOLD or LFS_NAMES.search(path) else "regular"
            oid = held[path].etag if path in held else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return reply({"files": answers})

    @route("POST", r"{site}\.git/info/lfs/objects/batch", write=True)
    def _lfs_batch(self, request: Request, repo: Repo) -> Response:
        verify = {"href": f"{self.endpoint}{repo.url_path}.git/info/lfs/objects/verify"}
        answers = []
        for item in request.json()["objects"]:
            actions = {"upload": {"href": f"{self.storage}/lfs/{item['oid']}"}, "verify": verify}
            answers.append({**item, **({} if item["oid"] in self._objects else {"actions": actions})})
        return reply({"transfer": "basic", "objects": answers})

    @route("POST", r"{site}\.git/info/lfs/objects/verify", write=True)
    def _lfs_verify(self, request: Request, repo: Repo) -> Response:
        body = request.json()
        if len(self._objects.get(body["oid"], b"")) != body["size"]:
            raise HubError(404, f"LFS object {body['oid']} is absent or has another size")
        return reply({})

    @route("PUT GET HEAD", "/lfs/{path}")
    def _lfs_object(self, request: Request, path: str) -> Response:
        """The storage takes no token: its real addresses are signed."""
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != path:
                raise HubError(400, f"the content is not that of LFS object {path}")
            self._objects[path] = request.body
            return reply({})
        if path not in self._objects:
            raise HubError(404, f"no LFS object {path}")
        return file_response(request, Blob(self._objects[path], lfs=True), {})

    @route("POST", "{api}/commit/{rev}", write=True)
    def _commit(self, request: Request, repo: Repo, rev: str) -> Response:
        head = repo.at(rev)
        if rev not in repo.branches:
            raise HubError(400, "the loopback Hub commits to branches only")
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        if not head.id.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        self._take_over_from_xet([line["value"]["oid"] for line in lines[1:] if line["key"] == "lfsFile"])
        for line in lines[1:]:
            apply_operation(files, self._objects, line["key"], line["value"])
        if "README.md" in files:
            self._read_card(files["README.md"].data.decode())
        answer = {"success": True}
        if "create_pr" in request.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
            rev = f"refs/pr/{number}"
            repo.branches[rev] = head
            answer["pullRequestUrl"] = f"{self.endpoint}{repo.url_path}/discussions/{number}"
        repo.add_commit(rev, files, header["summary"], header.get("description", ""))
        oid = repo.branches[rev].id
        return reply({**answer, "commitOid": oid, "commitUrl": f"{self.endpoint}{repo.url_path}/commit/{oid}"})

    @route("GET HEAD", "{site}/(?:resolve|raw)/{rev}/{path}")
    def _resolve(self, request: Request, repo: Repo, rev: str, path: str) -> Response:
        commit = repo.at(rev)
        headers = {"X-Repo-Commit": commit.id}
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if blob.sha256 is None:
            return file_response(request, blob, headers)
        headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        if self._xet and (name := self._xet.files_of.get(blob.sha256)):
            token = f"{self.endpoint}/api/{repo.kind}/{repo.id}/xet-read-token/{commit.id}"
            headers |= {"X-Xet-Hash": name, "Link": f'<{token}>; rel="xet-auth"'}
        return Response(302, {**headers, "Location": f"{self.storage}/lfs/{blob.sha256}"}, b"")

    @route("GET", "{api}/xet-(?P<what>read|write)-token/{rev}")
    def _xet_token(self, request: Request, repo: Repo, what: str, rev: str) -> Response:
        if self._xet is None:
            raise HubError(404, "this loopback Hub has no Xet")
        if what == "write":
            self._authenticate(request)
            self._check_owner(repo.id)
        repo.at(rev)
        answer = {"accessToken": XET_TOKEN, "exp": int(datetime.now(UTC).timestamp()) + 3600, "casUrl": self.storage}
        names = {"accessToken": "Access-Token", "exp": "Token-Expiration", "casUrl": "Cas-Url"}
        return reply(answer, headers={f"X-Xet-{names[key]}": str(value) for key, value in answer.items()})

    @route("POST", "/v1/(?P<what>xorbs/default/[0-9a-f]{64}|shards)")
    def _xet_upload(self, request: Request, what: str) -> Response:
        self._authenticate_xet(request)
        try:
            if what == "shards":
                self._xet.add_shard(request.body)
                return reply({"result": 1})
            return reply({"was_inserted": self._xet.add_xorb(what.rpartition("/")[2], request.body)})
        except (ValueError, LookupError) as error:
            raise HubError(400, str(error)) from error

    @route("GET", "/v1/reconstructions/(?P<name>[0-9a-f]{64})")
    def _xet_reconstruction(self, request: Request, name: str) -> Response:
        self._authenticate_xet(request)
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "bytes=0-"))
        if name not in self._xet.files or part is None:
            raise HubError(404, f"no Xet file {name}")
        last = int(part[2]) if part[2] else None
        try:
            return reply(self._xet.reconstruction(name, int(part[1]), last, f"{self.storage}/xorbs"))
        except IndexError:
            raise HubError(416, "range past the end") from None

    @route("GET", "/xorbs/(?P<name>[0-9a-f]{64})")
    def _xorb(self, request: Request, name: str) -> Response:
        """The storage takes no token: its real addresses are signed."""
        if name not in self._xet.xorbs:
            raise HubError(404, f"no xorb {name}")
        return file_response(request, Blob(self._xet.xorbs[name].data), {})

    def _authenticate_xet(self, request: Request) -> None:
        if request.headers.get("Authorization") != f"Bearer {XET_TOKEN}":
            raise HubError(401, INVALID_TOKEN)

    def _take_over_from_xet(self, hashes: list[str]) -> None:
        """Puts files together that a commit names by sha256 and that came by Xet, so that LFS has them too."""
        for sha256 in hashes if self._xet else ():
            if sha256 not in self._objects and (name := self._xet.files_of.get(sha256)):
                data = self._xet.content(name)
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise HubError(400, f"the content of Xet file {name} is not that of LFS object {sha256}")
                self._objects[sha256] = data


def _cut() -> None:
    raise ConnectionAbortedError


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # with the default of 5 parallel clients wait for a second


class Handler(BaseHTTPRequestHandler):
    """HTTP alone. It reads every body to its end, also before an error, so that keep-alive stays in step."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # small answers would wait for a delayed acknowledgement
    wbufsize = -1  # one packet for the headers and a small body

    def __init__(self, hub: LoopbackHub, *args: Any):
        self.hub = hub
        super().__init__(*args)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, self._read_body())
        try:
            if self.hub.is_cut:
                _cut()
            if before := self.hub.take_fault("before", request):
                before()
            response = self.hub.handle(request)
            if damage := self.hub.take_fault("content", request):
                response = response._replace(body=damage(response.body))
            cut = self.hub.take_fault("after", request)
        except ConnectionAbortedError:
            self.close_connection = True
            return
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if cut else response.body)
        if cut:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: `LoopbackHub.requests` is the log."""
