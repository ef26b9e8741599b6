"""Do what the verbs of the command line do to the folder of an adapter, from nothing to measured."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from hf_sparse.adapters.files import CARD, CONFIG, STEPS, TRAINING, WEIGHTS, measurement_files
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.load import Device, Dtype, load_adapter, load_base
from hf_sparse.adapters.saving import check_free, save_adapter
from hf_sparse.base_model import stored_name
from hf_sparse.chunks import prepared_chunks, prepared_documents, tokens_per_chunk
from hf_sparse.core.config import SparseConfig
from hf_sparse.data import tensors
from hf_sparse.environment import is_main_process
from hf_sparse.errors import DataError
from hf_sparse.evaluation import evaluate, evaluation_of
from hf_sparse.evaluation.settings import settings_from
from hf_sparse.evaluation.tasks import Suite
from hf_sparse.finetune import FinetuneConfig, estimate, finetune
from hf_sparse.finetune.checkpoint import checkpoints
from hf_sparse.finetune.float8 import check_float8
from hf_sparse.finetune.launch import check_devices, check_launch, is_sharded
from hf_sparse.finetune.stages import chunks_read, training_of
from hf_sparse.folders import exclusive, locked, staged
from hf_sparse.model_kinds import kind_of
from hf_sparse.overlap import merged, overlap
from hf_sparse.retrieval import hide_facts
from hf_sparse.texts import Documents

_WITH_FORCE = ", or use --force (in Python force=True)"


def create_adapter(
    model: str,
    config: SparseConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: Dtype = "auto",
    force: bool = False,
) -> PeftModel:
    """Write an untrained adapter for a base model.

    Args:
        model: id on the Hub, a folder, or `"demo"`; the adapter names its base like this, a folder by its whole path.
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
    check_free(folder, force, _WITH_FORCE)
    base = load_base(model, config, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        patched = get_peft_model(base, config)
    patched.active_peft_config.base_model_name_or_path = stored_name(model)
    with locked(folder):
        check_free(folder, force, _WITH_FORCE)  # another run may have been faster
        old: list[str] = []
        if (folder / CONFIG).exists():  # what measured and what resumes another adapter
            old = [*measurement_files(folder), TRAINING, STEPS, CARD, *checkpoints(folder)]
        with staged(folder, first=(CONFIG, WEIGHTS), removed=old) as stage:
            save_adapter(patched, stage)
    return patched


@exclusive
def train_adapter(
    folder: str | Path,
    text: str | Documents,
    config: FinetuneConfig,
    *,
    length: int | None = None,
    chunks: str | None = None,
    separate: bool = False,
    bos: bool | None = None,
    retrieval: float | None = None,
    dataset: Mapping[str, str] | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Train the adapter in a folder and write it back, with finetune.json and a model card.

    Processes that were launched together share the work, and the first of them writes.

    Args:
        folder: holds an adapter; as it was if training fails, but for its checkpoints. No other run may use it
            meanwhile.
        text: training text, see `hf_sparse.data.pack`; or documents, of which as many are read as the run takes.
        config: settings; `output_dir` and `cpu` are set here.
        length: tokens per chunk; by default 2048, or what the model's positions suffice for.
        chunks: train on chunks `START:STOP` of the text only.
        separate: let no chunk hold tokens of two documents.
        bos: whether the chunks of a decoder begin with BOS; by default as its tokenizer begins a text.
        retrieval: share of the chunks in which facts are hidden and asked for, see `hf_sparse.retrieval.hide_facts`; by
            default what the method learns best with.
        dataset: `name`, `split` and `column` on the Hub that the text was read from; noted in finetune.json, and named
            on the card.
        device, dtype: see `load_adapter`.
        dry_run: write nothing, and return what `hf_sparse.finetune.estimate` does.
        command: that does the same run again, for finetune.json and the card.

    Returns:
        The content of finetune.json.

    Raises:
        BusyError: another run holds the folder.
        DataError: chunks that cannot train the model, or `retrieval` for another model than a causal language model.
    """
    adapter = AdapterFolder(folder)
    trained_on = _trained_on(adapter)
    check_launch()
    cpu = device == "cpu" or not torch.cuda.is_available()
    check_devices(cpu=cpu)
    if config.mixed_precision == "fp8":
        check_float8(cpu=cpu)
    model, tokenizer = load_adapter(adapter, device=device, dtype=dtype, trainable=True, placed=not is_sharded())
    if is_sharded() and model.active_peft_config.saves_embeddings:
        raise ValueError("this adapter holds the embeddings, which would be divided: train it with the whole base")
    options: dict[str, Any] = {"bos": bos, "seed": config.seed, "corrupt": True}
    counts: dict[str, int] = {}
    if isinstance(text, str):
        data = prepared_chunks(model, tokenizer, text, length, chunks, **options)
    else:
        most = chunks_read(model, config)
        data, counts = prepared_documents(model, tokenizer, text, length, most=most, separate=separate, **options)
        counts |= {"rows": text.rows, "rows_without_text": text.bad}
    retrieval = _share_with_facts(model, data, config, retrieval)
    if retrieval:
        data = hide_facts(tokenizer, data, retrieval, seed=config.seed)
        if is_main_process() and config.progress:
            print(f"facts are hidden in {retrieval:.0%} of the chunks, and asked for further on", file=sys.stderr)
    config = replace(config, output_dir=str(folder), cpu=cpu)
    if dry_run:
        return estimate(model, data, config)
    metrics = finetune(model, data, config)
    if counts:
        metrics["documents"] = counts
    if command is not None:
        metrics["command"] = command
    if adapter.training is not None:
        metrics["trained_on"] = merged(trained_on, metrics["trained_on"]) if trained_on else None
    if retrieval:
        metrics["settings"]["retrieval"] = retrieval
    if dataset is not None:
        metrics["dataset"] = dict(dataset)
    if is_main_process():
        with adapter.replaced() as stage:
            save_adapter(model, stage)
            trained = AdapterFolder(stage, adapter.source)
            metrics["weights_sha256"] = trained.weights_sha256
            trained.write_repo(training=metrics)
    return metrics


def _share_with_facts(model: PeftModel, data: Any, config: FinetuneConfig, asked: float | None) -> float:
    """Return the share of the training chunks `data` that get facts: what was `asked` for, or what the method wants.

    Raises:
        DataError: facts were asked for, and the model is no causal language model.
    """
    kind = kind_of(model)
    if asked is None:
        return training_of(model, config).retrieval(data) if kind == "causal" else 0.0
    if asked and kind != "causal":
        raise DataError(f"retrieval is for causal language models, got a model of kind {kind!r}")
    return asked


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
    adapter = AdapterFolder(folder)
    training = adapter.checked_training  # the card is made of it, after the work
    model, tokenizer = load_adapter(adapter, device=device, dtype=dtype)
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
