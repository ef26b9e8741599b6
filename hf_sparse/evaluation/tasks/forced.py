"""Score which of the right lines after a prompt a model would have written itself."""

from collections.abc import Sequence
from itertools import groupby
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import nn

from hf_sparse._compat import cache_of, with_cache
from hf_sparse.data import prompt_tokens
from hf_sparse.errors import DataError
from hf_sparse.evaluation.switching import evaluating, using
from hf_sparse.evaluation.tasks.traces import Derivation, TraceTask
from hf_sparse.progress import tracked

_PIECE = 512  # tokens that have logits at once


@torch.no_grad()
def right_lines(model: nn.Module, prompts: Sequence[list[int]], answers: Sequence[list[list[int]]]) -> list[list[bool]]:
    """Return for every line of every answer whether each of its tokens is the model's first choice (teacher forcing).

    The prompt enters the KV cache first, and what follows enters it in pieces, as in generation: a selection that
    treats prompts differently does so here too.

    Args:
        prompts: their tokens, of equal numbers.
        answers: the tokens of each line of each answer.
    """
    if len(sizes := set(map(len, prompts))) != 1:
        raise ValueError(f"expected prompts of one length, got {sorted(sizes)}")
    device = next(model.parameters()).device
    flat = [[token for line in lines for token in line] for lines in answers]
    length = max(map(len, flat))
    # What fills a shorter answer comes after all of it and is not scored.
    target = torch.tensor([tokens + tokens[-1:] * (length - len(tokens)) for tokens in flat], device=device)
    output = model(input_ids=torch.tensor(prompts, device=device), use_cache=True, logits_to_keep=1)
    chosen = [output.logits[:, -1:].argmax(-1)]
    for piece in target[:, :-1].split(_PIECE, dim=1):
        output = model(input_ids=piece, **with_cache(cache_of(output)), use_cache=True)
        chosen.append(output.logits.argmax(-1))
    right = (torch.cat(chosen, 1) == target).tolist()
    scores = []
    for row, lines in zip(right, answers, strict=True):
        ends = [sum(map(len, lines[: number + 1])) for number in range(len(lines))]
        scores.append([all(row[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)])
    return scores


def run_trace(
    model: nn.Module,
    tokenizer: Any,
    task: TraceTask,
    contenders: Sequence[str],
    *,
    lengths: Sequence[int],
    samples: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Score a task of long generation for several contenders; see `hf_sparse.evaluation.tasks.run.run_task`."""
    examples = [
        (length, *_example(tokenizer, task.make(Random(f"{seed} {task.name} {length} {sample}")), length))
        for length in lengths
        for sample in range(samples)
    ]
    # Prompts of equal lengths need no padding; with a token for each digit all prompts of a task are equally long.
    examples.sort(key=lambda example: (example[0], len(example[1])))
    groups = [list(group) for _, group in groupby(examples, lambda example: (example[0], len(example[1])))]
    batches = [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    results: dict[str, Any] = {}
    with evaluating(model):
        for contender in contenders:
            right: dict[int, list[float]] = {length: [] for length in lengths}
            with using(model, contender):
                for batch in tracked(batches, f"{task.name}, {contender}") if progress else batches:
                    of_lengths, prompts, answers = zip(*batch, strict=True)
                    for length, lines in zip(of_lengths, right_lines(model, prompts, answers), strict=True):
                        right[length].append(fmean(lines))
            results[contender] = {"lengths": list(lengths), "values": [fmean(right[length]) for length in lengths]}
    return {"metric": "right lines", "settings": {"samples": samples, "seed": seed}, "results": results}


def _example(tokenizer: Any, derivation: Derivation, length: int) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt, and those of as many lines after it as make `length` tokens at most together."""
    start = prompt_tokens(tokenizer, derivation.prompt)
    room, lines = length - len(start), []
    for line in derivation.lines:
        tokens: list[int] = tokenizer(line + "\n", add_special_tokens=False)["input_ids"]
        if len(tokens) > room:
            break
        room -= len(tokens)
        lines.append(tokens)
    if not lines:
        raise DataError(f"expected a prompt with an answer of at most {length} tokens, got {len(start)} without any")
    return start, lines
