"""Leave layers dense whose attention is not sparse: the verb `unpatch`, which only Sparsefinder has."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from hf_sparse.adapters.files import CONFIG, WEIGHTS, measurement_files
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.adapters.load import Device, Dtype, load_adapter
from hf_sparse.adapters.saving import save_adapter
from hf_sparse.chunks import prepared_chunks
from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.core.overrides import override
from hf_sparse.errors import DataError
from hf_sparse.folders import exclusive, staged
from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention
from hf_sparse.methods.sparsefinder.density import layer_densities
from hf_sparse.patches import sparse_layers

_CHUNKS = 4  # of a text on which every layer is measured


@exclusive
def unpatch_adapter(
    folder: str | Path,
    text: str,
    *,
    above: float,
    length: int | None = None,
    chunks: str | None = None,
    bos: bool | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> dict[int, float]:
    """Take the layers out of the adapter in a folder in which queries give weight to too many keys.

    These layers attend as in the base model from then on, by softmax and without LoRA: the adapter loses what it has
    learned for them, and `layers` of its configuration names the others. Nothing is written where no layer is above.

    Args:
        folder: holds a Sparsefinder adapter, its scales trained.
        text: text that the adapter was trained on; not the one that it is measured on.
        above: a layer goes whose share of the allowed pairs of a query and a key with weight is larger, with entmax
            over all keys in every layer.
        length: tokens per chunk; by default 2048, or what the model's positions suffice for.
        chunks: use chunks `START:STOP` of the text; by default at most 4, from all over it.
        bos: see `train_adapter`.
        device, dtype: see `load_adapter`.

    Returns:
        The share of every layer that was patched, by its index.

    Raises:
        DataError: a text that cannot be measured, an adapter of another method or on a checkpoint that was trained with
            entmax, or one of which no layer would be left.
        ValueError: `above` is not above 0 and below 1.
        BusyError: another run holds the folder.
    """
    if not 0 < above < 1:
        raise ValueError(f"above must be a share above 0 and below 1, got {above}")
    adapter = AdapterFolder(folder)
    model, tokenizer = load_adapter(adapter, device=device, dtype=dtype)
    training = adapter.checked_training
    _check_adapter(sparse_layers(model)[0], folder)
    data = prepared_chunks(model, tokenizer, text, length, chunks, bos=bos, limit=_CHUNKS)
    densities = layer_densities(model, data)
    dense = {number for number, density in densities.items() if density > above}
    if dense == set(densities):
        raise DataError(
            f"no layer would be left: in each of {len(densities)} layers more than {above:.0%} of the keys have "
            f"weight, at least {min(densities.values()):.0%}; train the scales first, or choose a larger share"
        )
    if not dense:
        return densities
    places = [name for name, module in model.named_modules() if _is_among(module, dense)]
    with (
        override([model.active_peft_config], layers=sorted(set(densities) - dense)),
        staged(adapter.path, first=(CONFIG, WEIGHTS), removed=measurement_files(adapter.path)) as stage,
    ):
        save_adapter(model, stage)
        # Not the weights that were loaded, perhaps in another dtype.
        with safe_open(adapter.path / WEIGHTS, "pt") as weights:
            kept = {name: weights.get_tensor(name) for name in weights.keys() if not _belongs(name, places)}  # noqa: SIM118
            save_file(kept, stage / WEIGHTS, metadata=weights.metadata())
        left = AdapterFolder(stage, adapter.source)
        # What is left was trained as finetune.json tells.
        left.write_repo(training=None if training is None else training | {"weights_sha256": left.weights_sha256})
    return densities


def _check_adapter(layer: SparseAttentionLayer, folder: str | Path) -> None:
    """Raise `DataError` for an adapter, one of whose layers this is, of which no layer can be left dense."""
    if not isinstance(layer, SparsefinderAttention):
        raise DataError(
            f"layers are left dense by how many keys have weight, and {folder} holds a {layer.label} adapter, where "
            "all that are attended to have some"
        )
    if layer.config.entmax_native is not None:
        raise DataError(
            f"layers that are left dense attend by softmax, and the checkpoint under {folder} was trained with entmax "
            "(entmax_native): all its layers stay"
        )


def _is_among(module: object, layers: set[int]) -> bool:
    return isinstance(module, SparsefinderAttention) and module.layer in layers


def _belongs(tensor: str, places: list[str]) -> bool:
    return any(tensor.startswith(f"{place}.") for place in places)
