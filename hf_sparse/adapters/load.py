"""Load an adapter from the Hub or a folder, together with its base model, or a full model that holds both.

Only safetensors and JSON are read, and no code from a repository runs.
"""

import copy
import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel

from hf_sparse.access_tokens import check_token, one_line
from hf_sparse.adapters.files import CONFIG, INDEX, MODEL_CONFIG, SHARDS, SINGLE, WEIGHTS
from hf_sparse.adapters.fit import check_fit, check_loaded
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.full_model import adapter_files, unpack_adapter
from hf_sparse.adapters.hub_errors import explained
from hf_sparse.adapters.read import is_full_model
from hf_sparse.base_model import open_base, resolve_base, usable
from hf_sparse.core.config import SparseConfig
from hf_sparse.embeddings import embeddings_of
from hf_sparse.environment import cuda_of_process
from hf_sparse.errors import AdapterMismatchError, HubError, UnsupportedModelError
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.heads import initialised
from hf_sparse.patches.other_adapters import check_other_adapters
from hf_sparse.patches.targets import targets

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


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
    """Load an adapter and the base model under it, or a full model that holds both.

    Everything is checked before weights of the base are read, and before a base that was passed is changed.

    Args:
        repo_or_dir: id on the Hub, or a folder, of an adapter or of a full model (`push_to_hub(..., form="full")`).
        revision: branch, tag or commit of the adapter on the Hub.
        token: for private or gated repositories; the saved one by default.
        base_model: name or folder of the base model, or the loaded model, which is patched in place. By default the
            adapter says which; the name `"demo"` is the checkpoint that comes with hf-sparse. A full model takes none.
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
    folder = fetch_adapter(repo_or_dir, revision, token, **places)
    if is_full_model(folder):
        if base_model is not None:
            raise ValueError(f"base_model= is of no use: {repo_or_dir} is a full model, which holds its base model")
        if not Path(repo_or_dir).is_dir():
            folder = _fetch_full_model(str(repo_or_dir), folder, token, **places)
        with _adapter_inside(folder, str(repo_or_dir), revision) as adapter:
            options = {key: value for key, value in kwargs.items() if key not in places}
            base = _load_base_of(adapter, str(folder), **options)
            return _attach(adapter, base, adapter_name=adapter_name, is_trainable=is_trainable)
    adapter = AdapterFolder(folder, str(repo_or_dir))
    if base is None:
        base = _load_base_of(adapter, str(base_model) if base_model else None, token=token, **kwargs)
    else:
        _check_loaded_base(adapter, base)
    return _attach(adapter, base, adapter_name=adapter_name, is_trainable=is_trainable)


def load_adapter(
    folder: str | Path | AdapterFolder,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trainable: bool = False,
    placed: bool = True,
) -> tuple[PeftModel, Any]:
    """Load the adapter in a folder on its base model, or a full model, and the base model's tokenizer.

    Args:
        folder: its path, of an adapter or of a full model; or the folder of an adapter as it was opened.
        device: `"auto"` is CUDA where there is a GPU; of processes that were launched together each has one of its own.
        dtype: of the base model. `"auto"` is bfloat16 on CUDA if the checkpoint is bfloat16, and float32 otherwise.
        trainable: leave the adapter's parameters trainable.
        placed: whether the model goes to the device. Otherwise it stays on the CPU for whoever divides it.

    Raises:
        HubError: no such folder; files that are missing or damaged, of the adapter or of its base model.
        AdapterMismatchError: the adapter was made for another base model.
        ValueError: there is no such device.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError("there is no CUDA device, or this torch cannot use it; use --device cpu")
    kind = ("cuda" if cuda else "cpu") if device == "auto" else device
    with nullcontext(folder) if isinstance(folder, AdapterFolder) else adapter_in(folder) as adapter:
        model = _attach(adapter, _load_base_of(adapter, dtype=dtype), is_trainable=trainable)
    if dtype == "auto" and not (kind == "cuda" and model.dtype == torch.bfloat16):
        model.float()
    config = model.active_peft_config
    try:
        with usable("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                resolve_base(config.base_model_name_or_path), revision=config.revision, trust_remote_code=False
            )
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(
            f"no tokenizer for the base model {config.base_model_name_or_path!r}: {one_line(error)}"
        ) from error
    if placed:
        model = model.to(cuda_of_process() if kind == "cuda" else kind)
    return model, tokenizer


def load_base(name: str, config: SparseConfig, *, dtype: Dtype = "auto") -> PreTrainedModel:
    """Load a base model by the name that adapters use for it, on the CPU, if `config` can patch it.

    Raises:
        HubError: there is none of this name, it is an adapter, or its files are damaged.
        UnsupportedModelError: there is no sparse attention patch for it.
        ValueError: `config` names layers that it does not have.
    """
    try:
        base = open_base(name, dtype=dtype)
        skeleton = base.skeleton()
    except (HubError, UnsupportedModelError):
        raise
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"the base model {name!r} cannot be read: {one_line(error)}") from error
    targets(skeleton, config)  # before gigabytes are read
    try:
        return base.load()[0]
    except (HTTPError, OSError, ValueError, SafetensorError) as error:
        raise HubError(f"the base model {name!r} cannot be loaded: {one_line(error)}") from error


def _load_base_of(
    adapter: AdapterFolder, base_model: str | None = None, *, token: str | bool | None = None, **options: Any
) -> PreTrainedModel:
    """Load the base model of an adapter, which is checked before weights of the base are read.

    Args:
        adapter: the adapter.
        base_model: name or folder of the base model; by default the adapter says which.
        token: for private or gated repositories.
        **options: for `from_pretrained` of the base model.

    Raises:
        HubError, AdapterMismatchError, UnsupportedModelError: see `from_pretrained`.
    """
    name = base_model or adapter.base_model
    if name is None:
        raise HubError(f"{adapter.source} does not say which base model it is for; pass base_model=")
    another = "base_model=, or base_model_name_or_path in adapter_config.json, names another"
    with explained(f"cannot load the base model {name!r} of {adapter.source} ({another})"):
        head = adapter.head
        if head:
            head |= {key: options[key] for key in ("num_labels", "id2label", "label2id") if key in options}
            options = {"ignore_mismatched_sizes": True, **head, **options}  # the adapter's head takes its place
        revision = None if base_model else adapter.config.revision
        opened = open_base(name, **{"revision": revision, "token": token, **options})
        tokens = check_fit(adapter, opened.skeleton(adapter.model_class), name)
        base, missing = opened.load(adapter.model_class)
        check_loaded(adapter, base, missing)
        if tokens not in (None, _tokens(base)):
            base.resize_token_embeddings(tokens, mean_resizing=False)  # the adapter has all of their values
    return base


def _check_loaded_base(adapter: AdapterFolder, base: PreTrainedModel) -> None:
    """Check an adapter against a base model that is loaded already.

    Raises:
        HubError, AdapterMismatchError, UnsupportedModelError: see `from_pretrained`.
    """
    with torch.device("meta"):
        skeleton = type(base)(copy.deepcopy(base.config))
    tokens = check_fit(adapter, skeleton, base.name_or_path or type(base).__name__)
    if tokens not in (None, size := _tokens(base)):
        raise AdapterMismatchError(
            f"{adapter.source} brings embeddings of {tokens} tokens, and the base model has {size}: call "
            f"resize_token_embeddings({tokens}) on it first"
        )
    check_loaded(adapter, base, initialised(base))


def _attach(
    adapter: AdapterFolder, base: PreTrainedModel, *, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """Put an adapter on a base model that it was checked against; the `PeftModel` is in `eval` mode."""
    config = copy.deepcopy(adapter.config)  # PEFT writes into it
    model = PeftModel.from_pretrained(
        base, adapter.path, adapter_name=adapter_name, is_trainable=is_trainable, config=config
    )
    model.eval()
    return model


def _tokens(base: PreTrainedModel) -> int | None:
    """Count the tokens that the embeddings of a base model have, `None` without embeddings."""
    return next((len(parameter) for parameter in embeddings_of(base).values()), None)


def _check_options(base_model: Any, kwargs: dict[str, Any]) -> PreTrainedModel | None:
    """Return the base model if it is loaded already, once the options are known to be safe."""
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
    check_other_adapters(base_model)
    if kwargs:
        raise TypeError(f"base_model is loaded already, so these would have no effect: {', '.join(sorted(kwargs))}")
    return base_model


@contextmanager
def adapter_in(folder: str | Path) -> Iterator[AdapterFolder]:
    """Give the adapter of a folder, or of the full model in it, for the length of a `with` block.

    Raises:
        HubError: see `AdapterFolder`.
    """
    folder = Path(folder)
    if not is_full_model(folder):
        yield AdapterFolder(folder)
        return
    with _adapter_inside(folder, str(folder)) as adapter:
        yield adapter


@contextmanager
def _adapter_inside(folder: Path, source: str, revision: str | None = None) -> Iterator[AdapterFolder]:
    """Give the adapter of a full model, whose base model is the full model itself, for the length of a block."""
    name = str(folder.resolve()) if folder == Path(source) else source
    with tempfile.TemporaryDirectory(prefix="hf-sparse-") as temporary:
        yield unpack_adapter(folder, Path(temporary), source, name, revision)


def fetch_adapter(
    repo_or_dir: str | Path, revision: str | None = None, token: str | bool | None = None, **places: Any
) -> Path:
    """Return the folder with the adapter's two files, downloaded if need be, both of one commit.

    Of a full model it is the folder with its configuration.

    Args:
        repo_or_dir, revision, token: see `from_pretrained`.
        **places: for `snapshot_download`.
    """
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
    with explained(f"cannot load the adapter {repo_id}" + (f" at revision {revision}" if revision else "")):
        names = [CONFIG, WEIGHTS, MODEL_CONFIG]
        folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=names, **places))
        for name in names:
            _check_download(folder / name)
    return folder


def _fetch_full_model(repo_id: str, folder: Path, token: str | bool | None, **places: Any) -> Path:
    """Bring the weights of a full model into the cache, of the commit that names the folder with its configuration.

    Of the shards only the adapter's are hashed here, for a base model's may be large; so may be one file of all.
    """
    with explained(f"cannot load the full model {repo_id}"):
        names = [MODEL_CONFIG, SINGLE, INDEX, SHARDS, "generation_config.json"]
        folder = Path(snapshot_download(repo_id, revision=folder.name, token=token, allow_patterns=names, **places))
        for name in {INDEX, *adapter_files(folder, repo_id)} - {SINGLE}:
            _check_download(folder / name)
    return folder


def _check_download(path: Path) -> None:
    """Check the content of a file in the cache, which is named by its hash; the client checks the size alone.

    Raises:
        OSError: it is not what the Hub has.
    """
    # One link only: the file that it names may be a link into the store that repositories share, named by another hash.
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if not blob.is_file() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # a cache without links, or an endpoint that names files by something else
    data = blob.read_bytes()
    if len(blob.name) == 64:
        hashes = [hashlib.sha256(data)]
    else:  # git's, or that of an endpoint that is not the Hub
        hashes = [hashlib.sha1(b"blob %d\0" % len(data) + data), hashlib.sha1(data)]
    if blob.name not in [content.hexdigest() for content in hashes]:
        raise OSError(f"{path.name} is damaged: its hash is not the one that the Hub has; delete {blob} and load again")
