"""Make Llamas with random weights, of the shapes of published models: weights change neither time nor memory."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128_256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128_256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
TINYLLAMA = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32_000,
}
TINY = {  # of a trial
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
}
SHAPES: dict[str, dict[str, Any]] = {"tinyllama": TINYLLAMA, "smollm2": SMOLLM2, "llama-8b": LLAMA_8B}


def make_llama(
    shape: dict[str, Any], longest: int, *, dtype: torch.dtype, device: str, tiny: bool = False
) -> PreTrainedModel:
    """Return a Llama with random weights, the same in every call, whose text never ends.

    Args:
        shape: settings of its configuration.
        longest: tokens that there are positions for.
        dtype: of its weights.
        device: that they are made on.
        tiny: take the sizes of `TINY`, to try a benchmark out.
    """
    sizes = shape | TINY if tiny else shape
    config = LlamaConfig(**sizes, max_position_embeddings=longest, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def draw_shares(config: LlamaConfig) -> list[list[float]]:
    """Draw a share of the selected keys for each KV head, about as far apart as those of trained adapters."""
    heads: Any = config.num_key_value_heads
    shares = torch.rand(config.num_hidden_layers, heads, dtype=torch.float64) ** 2 + 0.2
    drawn: list[list[float]] = (shares / shares.mean()).tolist()
    return drawn
