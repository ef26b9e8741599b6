"""Generate greedy answers of a patched model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def answer(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
    """Return what the model says after each prompt of a batch, with whichever contender is active.

    Args:
        prompts: their tokens; shorter ones are padded on the left.
        new_tokens: at most so many.
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    length, device = max(map(len, prompts)), next(model.parameters()).device
    # A padding token of None is that of a tokenizer without one and without an end; a single prompt needs none.
    rows = [[padding or 0] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    generator: Any = model
    output = generator.generate(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=padding,
        disable_compile=True,  # compiling takes longer than a few tokens
    )
    return [tokenizer.decode(row[length:], skip_special_tokens=True) for row in output]
