"""Run a language model and compute the logits of its predictions later, a few tokens at a time.

Logits are `[B, T, V]`: for a large vocabulary many times what everything else of a forward takes. All that is needed
of them here are sums over tokens, so the states before the head are kept instead, and the head runs per slice.
"""

import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse._compat import texts_are_whole
from hf_sparse.finetune.sharding import gathered
from hf_sparse.model_kinds import transformers_model

#: Models whose logits were seen to follow from their head alone, and that head: to compare waits for the device.
_known_heads: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Predictions:
    """Hold what a language model predicts for tokens `[B, T]`.

    Attributes:
        states: `[B, T, C]`, what the head reads; the logits themselves if the head does not give them alone.
        logits: maps states of any tokens `[..., C]` to their logits `[..., V]`.
        hidden: the input of every layer and the last output, `[B, T, C]` each, if they were asked for.
    """

    states: Tensor
    logits: Callable[[Tensor], Tensor]
    hidden: tuple[Tensor, ...]


def predict(model: nn.Module, tokens: Tensor, **options: Any) -> Predictions:
    """Run a language model without its head, where that is possible without knowing the family.

    The model runs as it is, but for its head, which gets the last token only. The logits of this token tell whether
    head, final scale and softcap are all that follows the states; otherwise the model runs again, with all logits.
    Where that was so once, it is taken to be so for the same model and head from then on.

    Args:
        model: a language model, maybe wrapped (PEFT, DDP).
        tokens: `[B, T]`.
        **options: for its forward.
    """
    with texts_are_whole():
        return _predict(model, tokens, **options)


def _predict(model: nn.Module, tokens: Tensor, **options: Any) -> Predictions:
    base = transformers_model(model)
    head = base.get_output_embeddings()
    if head is not None:
        seen: list[tuple[Tensor, bool, torch.dtype]] = []
        with _last_token_only(head, seen):
            output = model(input_ids=tokens, **options)
        if len(seen) == 1 and seen[0][0].shape[:2] == tokens.shape:
            states, autocast, dtype = seen[0]
            config = base.config.get_text_config()
            cap = getattr(config, "final_logit_softcapping", None)
            # The names of Cohere and of Granite.
            scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

            def logits(states: Tensor) -> Tensor:
                with torch.autocast(states.device.type, dtype=dtype, enabled=autocast), gathered(head) as project:
                    scores = project(states) if scale == 1 else project(states) * scale
                    return scores if cap is None else torch.tanh(scores / cap) * cap

            known = _known_heads.get(base)
            if known is None or known() is not head:
                if not _agree(logits(states[:, -1:].detach()), output.logits.detach()):
                    return _all_logits(model, tokens, **options)
                _known_heads[base] = weakref.ref(head)
            return Predictions(states, logits, _hidden(output))
    return _all_logits(model, tokens, **options)


def _all_logits(model: nn.Module, tokens: Tensor, **options: Any) -> Predictions:
    """Run the model as it is, with the logits of all tokens."""
    output = model(input_ids=tokens, **options)
    return Predictions(output.logits, _as_they_are, _hidden(output))


@contextmanager
def _last_token_only(head: nn.Module, seen: list[tuple[Tensor, bool, torch.dtype]]) -> Any:
    """Let the head read the last token only, and note in `seen` the states and the autocast that it is called with."""

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *rest = args
        kind = states.device.type
        seen.append((states, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))
        return (states[:, -1:], *rest)

    hook = head.register_forward_pre_hook(keep, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _agree(computed: Tensor, expected: Tensor) -> bool:
    """Tell whether logits are equal but for rounding.

    A scale, a bias or a cap that the model applies after its head, and that is not known here, changes them far more.
    """
    if computed.shape != expected.shape:
        return False
    difference = (computed.float() - expected.float()).abs().max()
    return bool(difference <= 1e-3 * expected.float().abs().max())


def _as_they_are(logits: Tensor) -> Tensor:
    """Return logits for states that are the logits already."""
    return logits


def _hidden(output: Any) -> tuple[Tensor, ...]:
    """Return the hidden states of a model's output, none if they were not asked for."""
    return tuple(getattr(output, "hidden_states", None) or ())
