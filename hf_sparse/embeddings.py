"""Find embeddings of a base model that its checkpoint does not hold, so that the adapter must bring them."""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_sparse.bundled import BASE_NAME, CHECKPOINT


def embeddings_of(base: PreTrainedModel, prefix: str = "") -> dict[str, Tensor]:
    """Return the parameters of a base model's input and output embeddings by name, those of the input first.

    Those within a module that an adapter trains and saves (`modules_to_save`) are that adapter's and left out.

    Args:
        prefix: prefix of the names.

    Returns:
        Parameters; one that is tied is there under both names.
    """
    layers = [layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None]
    names = {id(module): name for name, module in base.named_modules()}
    return {
        f"{prefix}{names[id(layer)]}.{name}": parameter
        for layer in layers
        if id(layer) in names and ".modules_to_save." not in names[id(layer)]
        for name, parameter in layer.named_parameters(recurse=False)
    }


def has_new_embeddings(base: PreTrainedModel, name: str | None, revision: str | None) -> bool:
    """Tell whether the embeddings of a base model are learning, or have another number of tokens than its checkpoint.

    Args:
        name: of the checkpoint: a folder, or an id on the Hub, whose configuration is in the cache. Without one there
            is nothing to compare with.
    """
    parameters = embeddings_of(base).values()
    if any(parameter.requires_grad for parameter in parameters):
        return True
    # transformers marks parameters that it has loaded; resizing makes new ones without a mark.
    if any(getattr(p, "_is_hf_initialized", False) for p in base.parameters()) and not all(
        getattr(p, "_is_hf_initialized", False) for p in base.get_input_embeddings().parameters(recurse=False)
    ):
        return True
    if not parameters or not name:
        return False
    place = str(CHECKPOINT) if name == BASE_NAME else name
    try:
        stored: Any = AutoConfig.from_pretrained(
            place, revision=revision, local_files_only=True, trust_remote_code=False
        )
        return stored.get_text_config().vocab_size != base.config.get_text_config().vocab_size
    except Exception:  # loading the adapter reports a configuration that cannot be read
        return False
