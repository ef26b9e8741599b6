"""Divide the slots of the adapter in a folder among its layers or heads: the verb `divide`, which only SparseK has."""

import shutil
from pathlib import Path
from typing import Any, Literal

from hf_sparse.adapters.files import TRAINING, WEIGHTS
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.load import Device, Dtype, load_adapter
from hf_sparse.adapters.saving import save_adapter
from hf_sparse.chunks import prepared_chunks
from hf_sparse.core.overrides import override
from hf_sparse.errors import DataError
from hf_sparse.folders import exclusive
from hf_sparse.methods.sparsek.attention import SparseKAttention
from hf_sparse.methods.sparsek.evaluation.head_shares import divide_heads
from hf_sparse.methods.sparsek.evaluation.layer_shares import divide_layers
from hf_sparse.model_kinds import kind_of
from hf_sparse.patches import sparse_layers

_CHUNKS = 4  # of a text on which every layer is measured


@exclusive
def divide_adapter(
    folder: str | Path,
    text: str,
    *,
    among: Literal["layers", "heads"] = "layers",
    length: int | None = None,
    chunks: str | None = None,
    batch_size: int = 1,
    bos: bool | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> list[Any]:
    """Divide the slots of the adapter in a folder among its layers or KV heads, by what each of them loses on a text.

    The scorers stay as they are; train them again afterwards.

    Args:
        folder: holds a trained adapter of a causal language model.
        text: text that the adapter was trained on; not the one that it is measured on.
        among: what the slots are divided among. Among heads only `k` is divided, and earlier shares of layers go.
        length: tokens per chunk; by default 2048, or what the model's positions suffice for.
        chunks: use chunks `START:STOP` of the text; by default at most 4, from all over it.
        batch_size: chunks at a time.
        bos: see `train_adapter`.
        device, dtype: see `load_adapter`.

    Returns:
        `layer_shares` or `head_shares`, as written to adapter_config.json; the other of the two is `None` there.

    Raises:
        DataError: a text that cannot be measured, or a model that is no causal language model.
        BusyError: another run holds the folder.
    """
    adapter = AdapterFolder(folder)
    model, tokenizer = load_adapter(adapter, device=device, dtype=dtype)
    training = adapter.checked_training
    layer = sparse_layers(model)[0]
    if not isinstance(layer, SparseKAttention):
        raise DataError(f"slots are divided among {among}, and {folder} holds a {layer.label} adapter, which has none")
    if kind_of(model) != "causal":
        raise DataError(f"slots are divided among the {among} of causal language models, and this model is none")
    data = prepared_chunks(model, tokenizer, text, length, chunks, bos=bos, limit=_CHUNKS)
    shares: list[Any]
    settings: dict[str, Any]
    if among == "heads":
        shares, _ = divide_heads(model, data, batch_size=batch_size)
        settings = {"layer_shares": None, "head_shares": shares}
    else:
        shares, _ = divide_layers(model, data, batch_size=batch_size)
        settings = {"layer_shares": shares, "head_shares": None}
    attached = [model.active_peft_config]
    with override(attached, **settings), adapter.replaced() as stage:
        save_adapter(model, stage)
        shutil.copyfile(adapter.path / WEIGHTS, stage / WEIGHTS)  # not those that were loaded, perhaps in another dtype
        AdapterFolder(stage, adapter.source).write_repo(training=training)
        for name in (WEIGHTS, TRAINING):  # they stay
            (stage / name).unlink(missing_ok=True)
    return shares
