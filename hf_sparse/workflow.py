"""The folder of an adapter, from nothing to measured: what the verbs of the command line do."""

import copy
import glob
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from huggingface_hub.errors import HTTPError
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_sparse.access_tokens import redact
from hf_sparse.adapters.folder import CONFIG, EVALUATION, TRAINING, WEIGHTS, read_adapter
from hf_sparse.adapters.hub import from_pretrained
from hf_sparse.adapters.repo import CARD, check_evaluation, check_training, measurements, read_json, write_repo
from hf_sparse.atomic_files import check_writable
from hf_sparse.base_model import open_base, resolve_base, usable
from hf_sparse.core.registry import method_of
from hf_sparse.data import BYTE_ORDER_MARK, context_length, mask_tokens, pack, read_text, select_chunks, tensors
from hf_sparse.environment import cuda_of_process, is_main_process
from hf_sparse.errors import DataError, HubError, UnsupportedModelError
from hf_sparse.evaluation import evaluate, evaluation_of
from hf_sparse.evaluation.settings import settings_from
from hf_sparse.evaluation.tasks import Suite
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.finetune.checkpoint import checkpoints
from hf_sparse.folders import is_empty, locked, settle, staged
from hf_sparse.model_kinds import kind_of
from hf_sparse.overlap import merged, overlap
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.attach import targets

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Act = TypeVar("Act", bound=Callable[..., Any])


def alone(act: Act) -> Act:
    """Let a verb hold the folder that is its first argument, which must take new files if it is there."""

    @wraps(act)
    def held(folder: str | Path, *args: Any, **options: Any) -> Any:
        if not Path(folder).is_dir() or not is_main_process():
            return act(folder, *args, **options)
        check_writable(Path(folder))
        with locked(folder):
            return act(folder, *args, **options)

    return cast(Act, held)


def create_adapter(
    model: str,
    config: PeftConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: Dtype = "auto",
    force: bool = False,
) -> PeftModel:
    """Write an untrained adapter for a base model.

    Args:
        model: id on the Hub, a folder, or `"demo"`; the adapter names its base exactly like this.
        config: the method and its settings, such as a `SparseKConfig`.
        folder: where the adapter goes; it appears whole or not at all.
        seed: of the first weights of what is learned.
        dtype: of the loaded base model; `"auto"` is the checkpoint's own.
        force: write into a folder that is not empty. An adapter that is there goes, with its measurements.

    Returns:
        The patched model, on the CPU.

    Raises:
        ValueError: the folder is not empty.
        BusyError: another run holds the folder.
        HubError: the base model cannot be loaded.
        UnsupportedModelError: the base model has no sparse attention patch.
    """
    folder = Path(folder)
    _check_free(folder, force)
    base = load_base(model, config, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        patched = get_peft_model(base, config)
    config.base_model_name_or_path = model
    with locked(folder):
        _check_free(folder, force)  # another run may have been faster
        old: list[str] = []
        if (folder / CONFIG).exists():  # what measured and what resumes another adapter
            old = [*measurements(folder), TRAINING, CARD, *checkpoints(folder)]
        with staged(folder, first=(CONFIG, WEIGHTS), removed=old) as stage:
            save_adapter(patched, stage)
    return patched


def _check_free(folder: Path, force: bool) -> None:
    """Raise `ValueError` for a folder that a new adapter must not go to."""
    settle(folder)
    if folder.exists() and not (folder.is_dir() and (force or is_empty(folder))):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another, or use --force")


@alone
def train_adapter(
    folder: str | Path,
    text: str,
    config: FinetuneConfig,
    *,
    length: int | None = None,
    chunks: str | None = None,
    bos: bool | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> dict[str, Any]:
    """Train the adapter in a folder and write it back, with finetune.json and a model card.

    Processes that were launched together share the work, and the first of them writes.

    Args:
        folder: holds an adapter; as it was if training fails, but for its checkpoints. No other run may use it
            meanwhile.
        text: training text, see `hf_sparse.data.pack`.
        config: settings; `output_dir` and `cpu` are set here.
        length: tokens per chunk; by default 2048, or what the model's positions suffice for.
        chunks: train on chunks `START:STOP` of the text only.
        bos: whether the chunks of a decoder begin with BOS; by default as its tokenizer begins a text.
        device, dtype: see `load_adapter`.

    Returns:
        The content of finetune.json.

    Raises:
        BusyError: another run holds the folder.
    """
    folder = Path(folder)
    earlier = read_json(folder / TRAINING)
    if earlier is not None:
        before = earlier.get("trained_on")
        if before is not None and earlier.get("weights_sha256") != read_adapter(folder, str(folder)).weights_sha256:
            before = None  # another loop has trained these weights since
        if before is not None:
            merged(before, before)  # a damaged one is an error now, and not after the training
    model, tokenizer = load_adapter(folder, device=device, dtype=dtype, trainable=True)
    data = prepared_chunks(model, tokenizer, text, length, chunks, bos=bos, seed=config.seed, corrupt=True)
    metrics = finetune(model, data, replace(config, output_dir=str(folder), cpu=model.device.type == "cpu"))
    if earlier is not None:  # what these weights were trained on before; unknown where that was not recorded
        metrics["trained_on"] = merged(before, metrics["trained_on"]) if before else None
    if is_main_process():
        with staged(folder, removed=measurements(folder)) as stage:
            save_adapter(model, stage)
            metrics["weights_sha256"] = read_adapter(stage, str(folder)).weights_sha256
            write_repo(stage, training=metrics, repo_id=folder.resolve().name)
    return metrics


@alone
def evaluate_adapter(
    folder: str | Path,
    text: str | None,
    name: str,
    *,
    length: int | None = None,
    chunks: str | None = None,
    batch_size: int | None = None,
    selections: Sequence[str] | None = None,
    stride: int | None = None,
    suite: Suite | None = None,
    note: str | None = None,
    bos: bool | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Measure the adapter in a folder, and write eval.json, its figure and the model card there.

    Args:
        folder: holds an adapter.
        text: see `hf_sparse.data.pack`; `None` adds the suite's tasks to the eval.json that is there.
        name: what the text is called in the result.
        length: tokens per chunk; by default what the method's `Evaluation` says (2048; of Sparsefinder the `length` of
            its settings), or what the model's positions suffice for.
        chunks: measure chunks `START:STOP` of the text; by default at most as many as the `Evaluation` says (16; of
            Sparsefinder 4), from all over it. `":"` is all.
        batch_size: chunks at a time; by default what the `Evaluation` says (1; of causal models with SparseK up to 8).
        selections: the contenders to compare, of the `contenders` of the `Evaluation`; all by default. The suite is
            answered by those that can generate.
        stride: let the chunks overlap, and count the last `stride` tokens of each only, which all have a long context.
        suite: tasks that are scored by generation; without `lengths` of its own, prompts are as long as a chunk and
            half as long, where that is more than the slots.
        note: a sentence for the card, where the name of the base model does not tell all: quantised weights, say.
        bos: see `train_adapter`. Prompts of tasks begin as the tokenizer begins them.
        device, dtype: see `load_adapter`.
        options: of the method, as for `hf_sparse.evaluation.evaluate`.

    Returns:
        The content of eval.json.

    Raises:
        DataError: a text or tasks that cannot be measured; tasks alone without an eval.json of this adapter to add them
            to.
        ValueError: options out of range, or of another method.
        TypeError: an option that no method has.
        BusyError: another run holds the folder.
    """
    folder = Path(folder)
    model, tokenizer = load_adapter(folder, device=device, dtype=dtype)
    adapter = read_adapter(folder, str(folder))
    if (training := read_json(folder / TRAINING)) is not None:
        check_training(training, adapter)  # the card is made of it, after the work
    evaluation = evaluation_of(model)
    settings_from(evaluation, options)  # which `evaluate` does again, after the tasks were checked
    if suite is not None:
        suite = _suite_of(suite, model, length, selections)
    elif selections is not None:
        evaluation.check_contenders(model, selections)
    if text is not None:
        limit = evaluation.chunks
        data = prepared_chunks(model, tokenizer, text, length, chunks, bos=bos, limit=limit, stride=stride)
        if batch_size is None:
            tokens, _ = tensors(model, data)
            batch_size = evaluation.batch_size(model, tokens.shape[1])
        result = evaluate(
            model,
            data,
            selections=selections,
            stride=stride,
            batch_size=batch_size,
            text_name=f"{name} (chunks {chunks})" if chunks else name,
            **options,
        )
        sample = (training or {}).get("trained_on")
        result["text"]["trained_on"] = overlap(sample, *tensors(model, data)) if sample else None
    elif suite is None:
        raise DataError("nothing to measure: expected a text or tasks")
    elif (earlier := read_json(folder / EVALUATION)) is None:
        raise DataError(f"tasks are added to an eval.json, and {folder} holds none: measure a text first")
    else:
        check_evaluation(earlier, adapter)
        result = earlier
    if suite is not None:
        result["tasks"] = {**result.get("tasks", {}), **suite.run(model, tokenizer)}
    if note:
        result["note"] = note
    result |= {"weights_sha256": adapter.weights_sha256, "settings_sha256": adapter.settings_sha256}
    write_repo(folder, evaluation=result)
    return result


def _suite_of(suite: Suite, model: PeftModel, length: int | None, selections: Sequence[str] | None) -> Suite:
    """Return a suite for the contenders that can generate and, where it has none, with lengths; it was checked."""
    evaluation = evaluation_of(model)
    generating = evaluation.generating(model)
    if selections is not None:
        evaluation.check_contenders(model, selections)
        suite = replace(suite, selections=[name for name in selections if name in generating])
    if not suite.lengths:
        whole, budget = tokens_per_chunk(model, length), suite.budget(model)
        least = 0 if budget is None else budget.slots
        suite = replace(suite, lengths=[size for size in (whole // 2, whole) if size > least] or [whole])
    suite.check(model)
    return suite


def load_base(name: str, config: PeftConfig, *, dtype: Dtype = "auto") -> PreTrainedModel:
    """A base model by the name that adapters use for it, on the CPU, if `config` can patch it.

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
        raise HubError(f"the base model {name!r} cannot be read: {_line(error)}") from error
    targets(skeleton, copy.deepcopy(config))  # before gigabytes are read
    try:
        return base.load()[0]
    except (HTTPError, OSError, ValueError, SafetensorError) as error:
        raise HubError(f"the base model {name!r} cannot be loaded: {_line(error)}") from error


def load_adapter(
    folder: str | Path, *, device: Device = "auto", dtype: Dtype = "auto", trainable: bool = False
) -> tuple[PeftModel, Any]:
    """The adapter in a folder on its base model, and the base model's tokenizer.

    Args:
        device: `"auto"` is CUDA where there is a GPU; of processes that were launched together each has one of its own.
        dtype: of the base model. `"auto"` is bfloat16 on CUDA if the checkpoint is bfloat16, and float32 otherwise.

    Raises:
        HubError: no such folder; files that are missing or damaged, of the adapter or of its base model.
        AdapterMismatchError: the adapter was made for another base model.
        ValueError: there is no such device.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder; `hf-sparse patch MODEL --output {folder}` makes one")
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ValueError("there is no CUDA device, or this torch cannot use it; use --device cpu")
    place = ("cuda" if cuda else "cpu") if device == "auto" else device
    model = from_pretrained(folder, dtype=dtype, is_trainable=trainable)
    if dtype == "auto" and not (place == "cuda" and model.dtype == torch.bfloat16):
        model.float()
    config = model.active_peft_config
    try:
        with usable("its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                resolve_base(config.base_model_name_or_path), revision=config.revision, trust_remote_code=False
            )
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"no tokenizer for the base model {config.base_model_name_or_path!r}: {_line(error)}") from error
    return model.to(cuda_of_process() if place == "cuda" else place), tokenizer


def _line(error: BaseException) -> str:
    return " ".join(redact(str(error)).split())


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, both or none."""
    with staged(folder, first=(CONFIG, WEIGHTS)) as stage:
        model.save_pretrained(str(stage), save_embedding_layers=False)
        (stage / CARD).unlink(missing_ok=True)  # it is written anew from the measurements of the folder
        shutil.copymode(stage / CONFIG, stage / WEIGHTS)  # safetensors lets nobody but the owner read what it writes


def read_texts(paths: Sequence[str | Path]) -> tuple[str, str]:
    """Text files joined by an empty line, and their names.

    Raises:
        DataError: a file that is missing, empty or not UTF-8 text.
    """
    return "\n\n".join(read_text(path) for path in paths), ", ".join(Path(path).name for path in paths)


def read_dataset(name: str, config: str | None = None, split: str = "train", column: str = "text") -> str:
    """The rows of one column of a dataset, joined by an empty line.

    Args:
        name: id on the Hub, a folder, or a file (.jsonl, .csv, .parquet, ...), for `datasets.load_dataset`.
        config: configuration of the dataset, if it has several.
        split: which part; a slice such as `"train[:1%]"` reads less.
        column: holds the text.

    Raises:
        DataError: no such dataset, split or column of text.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(name).absolute()
    source: tuple[str, ...] = (str(path.parent), glob.escape(path.name)) if path.is_file() else (name,)
    try:
        rows = load_dataset(source[0], config, data_files=source[1:] or None, split=split)
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        raise DataError(f"the dataset {name!r} cannot be loaded: {redact(str(error.__cause__ or error))}") from error
    if column not in rows.column_names:
        raise DataError(f"the dataset {name!r} has no column {column!r}, it has {', '.join(rows.column_names)}")
    texts = [row.removeprefix(BYTE_ORDER_MARK) if isinstance(row, str) else row for row in rows[column] if row]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"column {column!r} of the dataset {name!r} holds no text; chats become text by the tokenizer's "
            "apply_chat_template(..., tokenize=False)"
        )
    return "\n\n".join(texts)


def prepared_chunks(
    model: PeftModel,
    tokenizer: Any,
    text: str,
    length: int | None,
    chunks: str | None,
    *,
    bos: bool | None = None,
    limit: int | None = None,
    stride: int | None = None,
    **masking: Any,
) -> Any:
    """Pack a text as the model learns and is measured on it, with hidden tokens for a masked language model.

    Where no `chunks` are named, at most `limit` are taken, at equal distances.

    Raises:
        DataError: a text that cannot be packed, or `bos` for an encoder.
    """
    packed = packed_chunks(model, tokenizer, text, length, bos=bos, stride=stride)
    packed = select_chunks(packed, chunks)
    if chunks is None and limit is not None and len(packed) > limit:
        packed = packed[[i * len(packed) // limit for i in range(limit)]]
    return mask_tokens(tokenizer, packed, **masking) if kind_of(model) == "masked" else packed


def packed_chunks(
    model: PeftModel, tokenizer: Any, text: str, length: int | None, *, bos: bool | None, stride: int | None = None
) -> Tensor:
    """Cut a text into chunks `[N, T]` that begin, and for an encoder end, as the model knows texts.

    Raises:
        DataError: a text that cannot be packed, or `bos` for an encoder.
    """
    encoder = not sparse_layers(model)[0].causal
    if encoder and bos is not None:
        raise DataError("an encoder's chunks begin and end with its special tokens: bos is for decoders")
    return pack(tokenizer, text, tokens_per_chunk(model, length), special_tokens=encoder, stride=stride, bos=bos)


def tokens_per_chunk(model: PeftModel, length: int | None) -> int:
    """The length that was asked for, or that which the settings are meant for, as far as the positions suffice."""
    if length is not None:
        return length
    config = model.active_peft_config
    default: int = method_of(config).evaluation().length(config)
    return min(default, context_length(model) or default)
