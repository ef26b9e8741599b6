"""Describe which keys the trained scorers keep of a text, per token and head: the content of selection.json."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse import environment
from hf_sparse._compat import cache_of
from hf_sparse.data import check_chunks, fingerprint
from hf_sparse.errors import DataError
from hf_sparse.evaluation import using
from hf_sparse.methods.sparsek import SparseKAttention, SparseKCacheLayer
from hf_sparse.patches import sparse_layers_in_use

FORMAT = 1

_BINS = 64  # along a text
_BYTES = 4  # bytes of the longest UTF-8 character, so that at most 4 tokens share one


@torch.no_grad()
def kept_keys(model: nn.Module, chunk: Tensor) -> Tensor:
    """Mark the keys of one chunk that each head keeps.

    Args:
        model: a patched model in `eval` mode, with its scorers switched on.
        chunk: `[1, T]` int64.

    Returns:
        `[R, T]` bool with a row for every KV head of every sparse layer. For a causal model, what lies in its slots
        after the text; for an encoder, sinks and selected keys, which all queries read (each has its window besides).
    """
    layers, tokens = sparse_layers_in_use(model, SparseKAttention), chunk.to(next(model.parameters()).device)
    rows = _in_slots(model, tokens) if layers[0].causal else _selected(model, layers, tokens)
    return torch.cat([row.cpu() for row in rows])


def describe_selection(model: Any, tokenizer: Any, chunks: Tensor, *, text_name: str = "") -> dict[str, Any]:
    """Describe which keys of a text the scorers keep.

    Args:
        model: a `PeftModel` or a model patched by `hf_sparse.patch`, in `eval` mode.
        tokenizer: tokenizer of the model.
        chunks: `[N, T]` int64, `T` larger than the slots, see `hf_sparse.data.pack`.
        text_name: name of the text in the result.

    Returns:
        `edges`: positions that bound the bins of a text. `heads`: for every KV head of every sparse layer its `layer`,
        `head` and `kept`, the share of the keys of each bin that it keeps, 0 to 1, a mean over the chunks. `tokens`:
        the pieces of the first chunk in order, each with the number of heads that keep it; a character that several
        tokens form is one piece, with the number of the most kept of them.

    Raises:
        DataError: chunks that the model cannot read, or that are no longer than the slots.
        ValueError: a model without sparse attention, or one in `train` mode.
    """
    if not sparse_layers_in_use(model, SparseKAttention) or model.training:
        got = "one in train mode" if model.training else f"a {type(model).__name__} without"
        raise ValueError(f"expected a model with sparse attention in eval mode, got {got}")
    check_chunks(model, chunks)
    layers, (count, length) = sparse_layers_in_use(model, SparseKAttention), chunks.shape
    config = layers[0].config
    if length <= config.slots:
        raise DataError(
            f"expected chunks of more than the budget's {config.slots} slots, got {length} tokens: nothing is evicted"
        )
    edges = sorted({round(length * i / _BINS) for i in range(_BINS + 1)})
    widths = torch.tensor(edges).diff()
    with using(model, "learned"):
        marks = torch.stack([kept_keys(model, chunk) for chunk in chunks.split(1)])  # [N, R, T]
    shares = torch.stack([part.sum(-1) for part in marks.split(widths.tolist(), -1)], -1).sum(0) / (count * widths)
    names = [(layer.layer, head) for layer in layers for head in range(layer.num_key_value_heads)]
    heads = [
        {"layer": layer, "head": head, "kept": [round(share, 5) for share in row]}
        for (layer, head), row in zip(names, shares.tolist(), strict=True)
    ]
    votes = marks[0].sum(0).tolist()
    return {
        "format": FORMAT,
        "budget": {"k": config.k, "window": config.window, "sinks": config.sinks, "slots": config.slots},
        "causal": layers[0].causal,
        "text": {"name": text_name, "sha256": fingerprint(chunks), "chunks": count, "length": length},
        "edges": edges,
        "heads": heads,
        "tokens": [[text, max(votes[a:b])] for text, a, b in pieces(tokenizer, chunks[0].tolist())],
        **environment.describe(),
    }


def pieces(tokenizer: Any, tokens: list[int]) -> Iterator[tuple[str, int, int]]:
    """Cut a text where its tokens end: `(text, start, stop)`, with spaces where the whole text has them.

    Each piece is decoded after the one before it, because a token alone may lose its space or be part of a character.
    """

    def decode(start: int, stop: int) -> str:
        return tokenizer.decode(tokens[start:stop], clean_up_tokenization_spaces=False)

    before = done = 0
    for stop in range(1, len(tokens) + 1):
        text = decode(before, stop)
        if text.endswith("\ufffd") and stop - done < _BYTES and stop < len(tokens):
            continue  # the next token completes the character
        yield text[len(decode(before, done)) :], done, stop
        before, done = done, stop


def _in_slots(model: nn.Module, tokens: Tensor) -> Iterator[Tensor]:
    """Yield the keys in the cache of each sparse layer after the text, `[Hkv, T]` bool."""
    cache = cache_of(model(input_ids=tokens, use_cache=True))
    for layer in cache.layers:
        if isinstance(layer, SparseKCacheLayer):
            rows = [positions[0] for positions in layer.by_head(layer.positions)]
            yield torch.stack([_marked(row[row >= 0], tokens.shape[1]) for row in rows])


def _selected(model: nn.Module, layers: list[SparseKAttention], tokens: Tensor) -> Iterator[Tensor]:
    """Yield the sinks and the best-scored other keys of each layer of an encoder, `[Hkv, T]` bool."""
    scores_of: dict[SparseKAttention, Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def note(scorer: nn.Module, inputs: Any, scores: Tensor, layer: SparseKAttention = layer) -> None:
                scores_of[layer] = scores[0]

            hooks.callback(layer.sparsek_scorer[layer.active].register_forward_hook(note).remove)
        model(input_ids=tokens)
    for layer in layers:
        budget, scores = layer.budget, scores_of[layer]
        index = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(index < budget.sinks, torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        best = [row[: budget.sinks + k] for row, k in zip(order, budget.per_head(len(order)), strict=True)]
        yield torch.stack([_marked(row, scores.shape[-1]) for row in best])


def _marked(positions: Tensor, length: int) -> Tensor:
    """Mark the given positions of a text of `length` tokens, `[T]` bool."""
    return torch.zeros(length, dtype=torch.bool, device=positions.device).index_fill(0, positions, True)
