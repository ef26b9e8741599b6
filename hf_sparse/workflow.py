"""Do what the verbs of the command line do to the folder of an adapter, from nothing to measured."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from hf_sparse.adapters.files import CARD, CONFIG, TRAINING, WEIGHTS, measurement_files
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.load import Device, Dtype, load_adapter, load_base
from hf_sparse.adapters.saving import check_free, save_adapter
from hf_sparse.chunks import prepared_chunks, tokens_per_chunk
from hf_sparse.data import tensors
from hf_sparse.environment import is_main_process
from hf_sparse.errors import DataError
from hf_sparse.evaluation import GENERATING, check_selections, divide_layers, evaluate
from hf_sparse.evaluation.tasks import Suite
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.finetune.checkpoint import checkpoints
from hf_sparse.folders import exclusive, locked, staged
from hf_sparse.model_kinds import kind_of
from hf_sparse.overlap import merged, overlap
from hf_sparse.patches import sparse_layers

CHUNKS = 16  # of a text that is measured with all baselines, so that it takes minutes
LOGITS = 2**26  # numbers; 256 MiB in float32
DIVIDING = 4  # of a text on which every layer is measured


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
    check_free(folder, force)
    base = load_base(model, config, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        patched = get_peft_model(base, config)
    config.base_model_name_or_path = model
    with locked(folder):
        check_free(folder, force)  # another run may have been faster
        old: list[str] = []
        if (folder / CONFIG).exists():  # what measured and what resumes another adapter
            old = [*measurement_files(folder), TRAINING, CARD, *checkpoints(folder)]
        with staged(folder, first=(CONFIG, WEIGHTS), removed=old) as stage:
            save_adapter(patched, stage)
    return patched


@exclusive
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
    adapter = AdapterFolder(folder)
    trained_on = _trained_on(adapter)
    model, tokenizer = load_adapter(adapter, device=device, dtype=dtype, trainable=True)
    data = prepared_chunks(model, tokenizer, text, length, chunks, bos=bos, seed=config.seed, corrupt=True)
    metrics = finetune(model, data, replace(config, output_dir=str(folder), cpu=model.device.type == "cpu"))
    if adapter.training is not None:
        metrics["trained_on"] = merged(trained_on, metrics["trained_on"]) if trained_on else None
    if is_main_process():
        with adapter.replaced() as stage:
            save_adapter(model, stage)
            trained = AdapterFolder(stage, adapter.source)
            metrics["weights_sha256"] = trained.weights_sha256
            trained.write_repo(training=metrics)
    return metrics


def _trained_on(adapter: AdapterFolder) -> dict[str, Any] | None:
    """Return the sample of what the weights were trained on before; `None` where that was not recorded.

    Raises:
        DataError: it is damaged: an error now, and not after the training.
    """
    training = adapter.training or {}
    sample: dict[str, Any] | None = training.get("trained_on")
    if sample is None or training.get("weights_sha256") != adapter.weights_sha256:
        return None  # or another loop has trained these weights since
    merged(sample, sample)
    return sample


@exclusive
def divide_adapter(
    folder: str | Path,
    text: str,
    *,
    length: int | None = None,
    chunks: str | None = None,
    batch_size: int = 1,
    bos: bool | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> list[float]:
    """Divide the slots of the adapter in a folder among its layers, by what each layer loses on a text.

    The scorers stay as they are; train them again afterwards.

    Args:
        folder: holds a trained adapter of a causal language model.
        text: text that the adapter was trained on; not the one that it is measured on.
        length: tokens per chunk; by default 2048, or what the model's positions suffice for.
        chunks: use chunks `START:STOP` of the text; by default at most 4, from all over it.
        batch_size: chunks at a time.
        bos: see `train_adapter`.
        device, dtype: see `load_adapter`.

    Returns:
        `layer_shares`, as written to adapter_config.json.

    Raises:
        DataError: a text that cannot be measured, or a model that is no causal language model.
        BusyError: another run holds the folder.
    """
    adapter = AdapterFolder(folder)
    model, tokenizer = load_adapter(adapter, device=device, dtype=dtype)
    training = adapter.checked_training
    method = sparse_layers(model)[0]
    if not method.has_slots:
        raise DataError(f"slots are divided among layers, and {folder} holds a {method.label} adapter, which has none")
    if kind_of(model) != "causal":
        raise DataError("slots are divided among the layers of causal language models, and this model is none")
    data = prepared_chunks(model, tokenizer, text, length, chunks, bos=bos, limit=DIVIDING)
    shares, _ = divide_layers(model, data, batch_size=batch_size)
    model.active_peft_config.layer_shares = shares
    with adapter.replaced() as stage:
        save_adapter(model, stage)
        shutil.copyfile(adapter.path / WEIGHTS, stage / WEIGHTS)  # not those that were loaded, perhaps in another dtype
        AdapterFolder(stage, adapter.source).write_repo(training=training)
        for name in (WEIGHTS, TRAINING):  # they stay
            (stage / name).unlink(missing_ok=True)
    return shares


@exclusive
def evaluate_adapter(
    folder: str | Path,
    text: str | None,
    name: str,
    *,
    length: int | None = None,
    chunks: str | None = None,
    batch_size: int | None = None,
    selections: Sequence[str] | None = None,
    slots: Sequence[int] = (),
    sparsities: Sequence[float] | None = None,
    seed: int | None = None,
    stride: int | None = None,
    suite: Suite | None = None,
    note: str | None = None,
    bos: bool | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> dict[str, Any]:
    """Measure the adapter in a folder, and write eval.json, its figure and the model card there.

    Args:
        folder: holds an adapter.
        text: see `hf_sparse.data.pack`; `None` adds the suite's tasks to the eval.json that is there.
        name: what the text is called in the result.
        length: tokens per chunk; by default 2048, for Sparsefinder the `length` of its settings, or what the model's
            positions suffice for.
        chunks: measure chunks `START:STOP` of the text; by default at most 16, for Sparsefinder 4, from all over it.
            `":"` is all.
        batch_size: chunks at a time; by default one, and of a causal language model with SparseK up to 8, as long as
            their logits are few: to decide token by token what to keep costs little more for 8 chunks than for one.
        selections: what to compare, of `hf_sparse.evaluation.selections_of(model)`, for Sparsefinder of `PATTERNS`;
            all by default. The suite is answered by those that can generate.
        slots: further budgets of SparseK to measure the text at.
        stride: let the chunks overlap, and count the last `stride` tokens of each only, which all have a long context.
        sparsities: of Sparsefinder, shares of the pairs of tiles that are left out; `SPARSITIES` by default.
        seed: of Sparsefinder, see `hf_sparse.evaluation.analyse`.
        suite: tasks that are scored by generation; without `lengths` of its own, prompts are as long as a chunk and
            half as long, where that is more than the slots.
        note: a sentence for the card, where the name of the base model does not tell all: quantised weights, say.
        bos: see `train_adapter`. Prompts of tasks begin as the tokenizer begins them.
        device, dtype: see `load_adapter`.

    Returns:
        The content of eval.json.

    Raises:
        DataError: a text or tasks that cannot be measured; tasks alone without an eval.json of this adapter to add them
            to.
        ValueError: options out of range.
        BusyError: another run holds the folder.
    """
    adapter = AdapterFolder(folder)
    training = adapter.checked_training  # the card is made of it, after the work
    model, tokenizer = load_adapter(adapter, device=device, dtype=dtype)
    method, results = sparse_layers(model)[0], adapter.report
    if suite is not None and not method.has_slots:
        raise DataError(
            f"tasks are answered at a number of slots, and {folder} holds a {method.label} adapter, which has none: "
            "measure a text"
        )
    if selections is not None:
        check_selections(selections, results.selections(model))
    if suite is not None:
        if selections is not None:
            suite = replace(suite, selections=[chosen for chosen in selections if chosen in GENERATING])
        if not suite.lengths:
            whole, least = tokens_per_chunk(model, length), suite.budget(model).slots
            suite = replace(suite, lengths=[own for own in (whole // 2, whole) if own > least] or [whole])
        suite.check(model)
    if text is not None:
        limit = results.chunks or CHUNKS
        data = prepared_chunks(model, tokenizer, text, length, chunks, bos=bos, limit=limit, stride=stride)
        label = f"{name} (chunks {chunks})" if chunks else name
        if batch_size is None:
            batch_size = _batch(model, data.shape[1]) if method.has_slots and kind_of(model) == "causal" else 1
        result = evaluate(
            model,
            data,
            selections=selections,
            slots=slots,
            sparsities=sparsities,
            stride=stride,
            batch_size=batch_size,
            seed=seed,
            text_name=label,
        )
        read = (training or {}).get("trained_on")
        result["text"]["trained_on"] = overlap(read, *tensors(model, data)) if read else None
    elif suite is None:
        raise DataError("nothing to measure: expected a text or tasks")
    elif adapter.checked_evaluation is None:
        raise DataError(f"tasks are added to an eval.json, and {folder} holds none: measure a text first")
    else:
        result = adapter.checked_evaluation
    if suite is not None:
        result["tasks"] = {**result.get("tasks", {}), **suite.run(model, tokenizer)}
    if note:
        result["note"] = note
    result |= {"weights_sha256": adapter.weights_sha256, "settings_sha256": adapter.settings_sha256}
    adapter.write_repo(evaluation=result)
    return result


def _batch(model: PeftModel, length: int) -> int:
    vocabulary = model.config.get_text_config().vocab_size
    return max(1, min(8, LOGITS // (length * vocabulary)))
