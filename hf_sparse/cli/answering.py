"""Let a decoder continue a text and show it as it is made: what `generate` and `chat` have in common."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse.cli.common import load_workflow, model_options
from hf_sparse.cli.options import at_least, option

ANSWERING = [
    option("max_new_tokens", int, 256, "The most tokens of an answer.", callback=at_least(1, "max_new_tokens")),
    option("temperature", float, 0.0, "Temperature of sampling; 0 takes the likeliest token each time."),
    option("top_p", float, 1.0, "Sample from the likeliest tokens that have this probability together."),
    option("seed", int, 0, "Seed of sampling."),
    *model_options(),
]


@dataclass(frozen=True)
class Answer:
    """Hold what a model said, and what it took.

    Attributes:
        ids: the tokens of the prompt and of the answer.
        text: the answer without special tokens.
        tokens: how many tokens the answer has.
        first: seconds until its first token.
        rest: seconds from there to its last.
        kv_bytes: bytes of keys and values in the cache at the end.
        dense_bytes: bytes that dense attention would have there.
        positions: how many tokens the model reads, if the answer ended because it has no more; otherwise `None`.
    """

    ids: list[int]
    text: str
    tokens: int
    first: float
    rest: float
    kv_bytes: int
    dense_bytes: int
    positions: int | None

    def summary(self) -> str:
        """Return one line on time and memory."""
        from hf_sparse.evaluation.show import readable_bytes

        speed = f", {(self.tokens - 1) / self.rest:.1f} tokens/s after it" if self.tokens > 1 and self.rest else ""
        end = f"; the model has {self.positions:,} positions and stops there" if self.positions else ""
        return (
            f"{self.tokens} tokens, the first after {self.first:.2f} s{speed}; KV cache "
            f"{readable_bytes(self.kv_bytes)}, of dense attention {readable_bytes(self.dense_bytes)}{end}"
        )


class Answerer:
    """Hold a decoder with its adapter, and the cache of the text that it goes on with."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Load the adapter in a folder.

        Args:
            folder: of the adapter.
            settings: the values of `ANSWERING` by name.

        Raises:
            ValueError: settings out of range, or a model that does not generate.
        """
        temperature, top_p = settings["temperature"], settings["top_p"]
        if not 0 <= temperature <= 100:
            raise ValueError(f"temperature must be from 0 to 100, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        load_workflow()
        import torch

        from hf_sparse.adapters.load import load_adapter
        from hf_sparse.model_kinds import kind_of

        self.model, self.tokenizer = load_adapter(folder, device=settings["device"], dtype=settings["dtype"])
        if kind_of(self.model) != "causal":
            raise ValueError(f"{type(self.model.get_base_model()).__name__} is no decoder, and cannot continue a text")
        self.most = settings["max_new_tokens"]
        self.sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            self.sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(settings["seed"])
        self._token_bytes = _dense_bytes_of_a_token(self.model)
        self._cache: Any = None
        self._seen: list[int] = []

    def answer(self, ids: Sequence[int]) -> Answer:
        """Continue a text and print what comes on stdout, token by token.

        Where the text begins with all that was read and said before, the cache goes on too; otherwise it is read anew.

        Args:
            ids: the tokens of the text.

        Raises:
            ValueError: no token, or more than the model has positions for.
        """
        import torch
        from transformers import TextStreamer

        from hf_sparse._compat import with_cache
        from hf_sparse.data import context_length
        from hf_sparse.patches import SparseCache

        ids, limit = list(ids), context_length(self.model)
        if not ids:
            raise ValueError("there is no text to continue: the prompt has no token")
        if limit is not None and len(ids) >= limit:
            raise ValueError(f"the text has {len(ids)} tokens, and the model reads {limit} with what it says")
        if self._cache is None or ids[: len(self._seen)] != self._seen or len(ids) == len(self._seen):
            self._cache = SparseCache(self.model)
        clock = _Clock(TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True))
        prompt = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.most if limit is None else min(self.most, limit - len(ids)),
                streamer=clock,
                disable_compile=True,  # compiling takes longer than most answers
                **self.sampling,
                **with_cache(self._cache),
            )
        self._seen = output[0].tolist()
        new = self._seen[len(ids) :]
        first, rest = clock.times
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        positions = limit if len(self._seen) == limit and len(new) < self.most else None
        return Answer(self._seen, text, len(new), first, rest, self._cache.nbytes, self._dense_bytes(), positions)

    def _dense_bytes(self) -> int:
        """Count the bytes of the keys and values that dense attention would keep of the tokens in the cache."""
        tokens = len(self._seen) - 1
        return sum(size * (tokens if most is None else min(tokens, most)) for size, most in self._token_bytes)


def _dense_bytes_of_a_token(model: Any) -> list[tuple[int, int | None]]:
    """Return the bytes of one token in the dense KV cache of each layer, and the most tokens that the layer keeps.

    The dense model says it, since the cache of a method may hold keys and values in any shape.

    Args:
        model: a `PeftModel` of a decoder.
    """
    import torch

    from hf_sparse._compat import cache_of

    with torch.no_grad(), model.disable_adapter():
        cache = cache_of(model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True))
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    sizes = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    return [(size, window and window - 1) for size, window in zip(sizes, windows, strict=True)]


class _Clock:
    """Give tokens to a streamer of transformers, and note when they come."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.came = streamer, [time.perf_counter()]

    def put(self, value: Any) -> None:
        """Take the prompt, and then each token."""
        self.streamer.put(value)
        self.came.append(time.perf_counter())

    def end(self) -> None:
        """Print what is left of the last word."""
        self.streamer.end()

    @property
    def times(self) -> tuple[float, float]:
        """Return the seconds until the first token, and from there to the last; the prompt came before them."""
        start, _, *tokens = self.came
        return (tokens[0] - start, tokens[-1] - tokens[0]) if tokens else (0.0, 0.0)
