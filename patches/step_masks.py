"""Make the attention masks of a decoding step as transformers does, without what it asks of every other mask.

Before each step of a cache of constant size `generate` makes masks of all kinds that a model may need, which takes the
host longer than what is left of the step, and the GPU waits. A step of sparse attention in all layers needs one: which
of the newest tokens are real.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from hf_sparse.patches.masks import padding_mask

_OF_OTHERS = ("or_mask_function", "and_mask_function", "block_sequence_ids")
_FULL = "full_attention"


def step_masks(arguments: dict[str, Any]) -> Any:
    """Return what `transformers.masking_utils.create_masks_for_generate` returns for a step; the model attends by ours.

    Args:
        arguments: of that function, by name: the config of the model, `inputs_embeds`, of which shape and device are
            read, `attention_mask` `[B, columns]` with one column for each token so far, the cache, and others.

    Returns:
        A mask or `None`, or masks by the kind of layers; `NotImplemented` for what is no step of one token, and for
        models that need masks of other kinds.
    """
    tokens, mask = arguments["inputs_embeds"], arguments["attention_mask"]
    cache = arguments.get("cache", arguments.get("past_key_values"))
    is_step = tokens.shape[1] == 1 and isinstance(mask, Tensor) and mask.ndim == 2 and mask.device == tokens.device
    if not is_step or not isinstance(cache, Cache) or any(arguments.get(name) is not None for name in _OF_OTHERS):
        return NotImplemented
    config = arguments["config"]
    config = config.get_text_config() if config.sub_configs else config
    kinds = getattr(config, "layer_types", ())
    has_windows = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if (has_windows and not kinds) or kinds is None or any(kind != _FULL for kind in kinds):
        return NotImplemented
    mask = padding_mask(q_length=1, kv_length=cache.get_mask_sizes(1, 0)[0], attention_mask=mask)
    return {_FULL: mask} if kinds else mask
