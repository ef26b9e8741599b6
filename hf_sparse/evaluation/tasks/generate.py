"""Generate greedy answers of a patched model."""

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def answer(model: nn.Module, tokenizer: Any, prompt: list[int], new_tokens: int) -> str:
    """Return what the model says after a prompt, with whichever contender is active.

    Args:
        prompt: its tokens.
        new_tokens: at most so many.
    """
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    generator: Any = model
    output = generator.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        disable_compile=True,  # compiling takes longer than a few tokens
    )
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
