"""Run decoding as one CUDA graph per token that holds the whole step, from a token to the next one.

Between two steps of `generate`, compiled or not, the GPU waits for Python: for that of the model, or for masks, lists
and criteria of the loop. In a cache of constant size no shape changes from step to step. So a step can be recorded as
it runs, eager, with the choice of the next token, and played again without Python; the host looks once in several steps
whether all texts have ended. What `generate` does by itself, without the choice of the token, is in
`recorded_steps.py`, which also says what recording is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_sparse._compat import with_cache
from hf_sparse.core.generation import Generation, announced
from hf_sparse.core.settings import check_integer
from hf_sparse.patches.attached import sparse_layers
from hf_sparse.patches.cache import SparseCache
from hf_sparse.patches.compiled_layers import compiled_layers

_WARM_UP = 2  # steps before one is recorded: they compile kernels and allocate what stays
_PIECES = 512  # of a row of logits, at most, that are searched side by side
_PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)  # read no earlier token
_HANDLED = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache", "past_key_values"}


class CapturedDecoding:
    """Take the place of transformers' loop over tokens, for greedy decoding and sampling.

        decode = hf_sparse.CapturedDecoding(model)
        ids = model.generate(prompt, custom_generate=decode, max_new_tokens=200)

    Greedy tokens are those of `generate` without it. The prompt runs eager, as ever. On a GPU the first call records a
    step, and later calls with as many rows and the same settings play it again, whatever the lengths of their texts.
    Elsewhere the steps run one by one. transformers hands no streamer to such a loop.

    Its cache and graph belong to one model and the adapters active in it: another model, or other adapters, have them
    made anew, and so have adapters whose configuration `finetune` has changed. They stay in memory as long as it does.
    Weights that change in place are seen; after any other change of the model, make a new one.

    Args:
        model: a patched model whose layers all keep a cache of constant size, as those with KV slots do.
        steps: tokens between two looks whether all texts have ended.
        compiled: whether the step goes through `torch.compile` before it is recorded: the first call takes longer, and
            each step less.

    Raises:
        ValueError: the cache of the model grows, or nothing in it attends sparsely.
    """

    def __init__(self, model: nn.Module, steps: int = 16, compiled: bool = False) -> None:
        check_integer("steps", steps, least=1)
        self.steps, self.compiled = steps, compiled
        self._loop: _Loop | None = None
        self._settings: Any = None
        _new_cache(model)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Generate `[B, T + new]` tokens, as transformers' `generate` asks of `custom_generate`.

        Raises:
            ValueError: an option that this loop does not know.
        """
        length, end_tokens = _ends(stopping_criteria)
        _refuse_others(logits_processor, generation_config, model_kwargs)
        choose = _sampled(logits_processor) if generation_config.do_sample else _greedy(logits_processor)
        pad = getattr(generation_config, "_pad_token_tensor", None)
        pad = 0 if pad is None else int(pad)
        processors = [(type(one), sorted(vars(one).items())) for one in logits_processor]
        layers = [layer for layer in sparse_layers(model) if layer.is_active]
        adapters = [(*layer.active_adapters, layer.recording_key()) for layer in layers]
        samples, device = generation_config.do_sample, input_ids.device
        settings = (len(input_ids), samples, processors, end_tokens, pad, device, adapters)
        if self._loop is None or self._loop.model is not model or settings != self._settings:
            self._loop = None  # its memory goes before the next one needs some
            self._loop = _Loop(model, len(input_ids), choose, end_tokens, pad, self.steps, self.compiled)
            self._settings = settings
        new = self._loop.generate(
            input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"), length - input_ids.shape[1]
        )
        return torch.cat([input_ids, new], 1)


def _new_cache(model: nn.Module) -> SparseCache:
    """Make a cache of constant size.

    Raises:
        ValueError: a layer of it grows.
    """
    cache = SparseCache(model)
    if grows := next((layer for layer in cache.layers if not layer.is_compileable), None):
        raise ValueError(
            "recorded steps need a cache of constant size in every layer of the model, and a layer has a "
            f"{type(grows).__name__}, which grows: use generate without custom_generate"
        )
    return cache


def _ends(criteria: Any) -> tuple[int, tuple[int, ...]]:
    """Return the greatest length of a text, and the tokens that end it."""
    length, tokens = None, ()
    for one in criteria:
        if type(one) is MaxLengthCriteria:
            length = one.max_length
        elif type(one) is EosTokenCriteria:
            tokens = tuple(one.eos_token_id.tolist())
        else:
            raise ValueError(f"recorded steps know the stopping criteria max_length and eos_token_id, got {one!r}")
    if length is None:
        raise ValueError("recorded steps need max_new_tokens or max_length")
    return length, tokens


def _refuse_others(processors: Any, config: Any, model_kwargs: dict[str, Any]) -> None:
    """Refuse options that would be ignored, or that the host has to act on after every token."""
    if config.num_beams > 1 or config.return_dict_in_generate or getattr(config, "assistant_model", None):
        raise ValueError(
            "recorded steps return tokens only, and know no beams: num_beams=1, no return_dict_in_generate"
        )
    if other := next((one for one in processors if type(one) not in _PROCESSORS), None):
        known = ", ".join(kind.__name__ for kind in _PROCESSORS)
        raise ValueError(f"recorded steps know the logits processors {known}, got {type(other).__name__}")
    if unknown := sorted(name for name in model_kwargs.keys() - _HANDLED if model_kwargs[name] is not None):
        raise ValueError(f"recorded steps hand on {', '.join(sorted(_HANDLED))} only, got {', '.join(unknown)}")
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    if cache is not None and (isinstance(cache, SparseCache) or cache.get_seq_length() > 0):
        raise ValueError("recorded steps have a cache of their own, and cannot go on with the one that was given")


def _greedy(processors: Any) -> Callable[[Tensor], Tensor]:
    """Return what chooses the likeliest token of each row of logits `[B, V]`."""

    def choose(logits: Tensor) -> Tensor:
        return argmax(processors(None, logits))

    return choose


def argmax(numbers: Tensor) -> Tensor:
    """Return the place of the largest number of each row of `[B, V]`, of equal ones the first.

    On a GPU one program reads a whole row in torch's `argmax`, which takes as long as the weights of half a layer.
    """
    rows, count = numbers.shape
    pieces = next(number for number in range(min(_PIECES, count), 0, -1) if count % number == 0)
    values, places = numbers.view(rows, pieces, -1).max(-1)
    piece = values.argmax(-1, keepdim=True)
    return (piece * (count // pieces) + places.gather(1, piece)).squeeze(1)


def _sampled(processors: Any) -> Callable[[Tensor], Tensor]:
    """Return what draws a token for each row of logits `[B, V]`."""

    def choose(logits: Tensor) -> Tensor:
        weights = processors(None, logits).softmax(-1)
        # What torch.multinomial does, without its look at the weights on the host.
        return (weights / torch.empty_like(weights).exponential_(1)).argmax(-1)

    return choose


class _Loop:
    """Hold what a recorded step reads and writes: the cache, the newest token of each row and the ones before it."""

    def __init__(
        self,
        model: Any,
        rows: int,
        choose: Callable[[Tensor], Tensor],
        end_tokens: tuple[int, ...],
        pad: int,
        steps: int,
        compiled: bool,
    ) -> None:
        device = model.device
        self.model, self.choose, self.pad, self.steps = model, choose, pad, steps
        self.run: Any = model
        if compiled:
            self.run = compiled_layers(model) or torch.compile(model.__call__, fullgraph=True, dynamic=False)
        self.cache = _new_cache(model)
        self.end_tokens = torch.tensor(end_tokens, device=device) if end_tokens else None
        self.token = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.token)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.tokens = torch.zeros((rows, steps), dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.warm = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None

    def generate(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, most: int) -> Tensor:
        """Return the tokens `[B, n]` that follow a prompt, at most `most`."""
        self.cache.reset()
        self.ended.zero_()
        if positions is None:
            real = torch.ones_like(ids) if mask is None else mask.long()
            positions = (real.cumsum(-1) - 1).clamp(min=0)
        generation = (
            None if self.warm or self.stream is None else Generation(sparse_layers(self.model), most > 1, False)
        )
        with announced(generation):
            output = self.model(
                ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **with_cache(self.cache)
            )
        self.position.copy_(positions[:, -1:])
        blocks = [self._next(output.logits).clone()[:, None]]
        del output
        left = most - 1
        while left > 0 and not (self.end_tokens is not None and bool(self.ended.all())):
            count = min(left, self.steps)
            self.place.zero_()
            for _ in range(count):
                self._take()
            blocks.append(self.tokens[:, :count].clone())
            left -= count
        tokens = torch.cat(blocks, 1)
        if self.end_tokens is None:
            return tokens
        # The loop of transformers stops with the last text that ends.
        is_end = torch.isin(tokens, self.end_tokens)
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
        return tokens[:, : int(lengths.max())]

    def _next(self, logits: Tensor) -> Tensor:
        """Choose the next token of each row, `[B]`, and make it the newest one."""
        token = self.choose(logits[:, -1].float())
        if self.end_tokens is not None:
            token = torch.where(self.ended, self.pad, token)
            self.ended.logical_or_(torch.isin(token, self.end_tokens))
        self.token.copy_(token[:, None])
        self.position.add_(1)
        return token

    def _step(self) -> None:
        """Run the model on the newest tokens, and note those that follow."""
        output = self.run(self.token, position_ids=self.position, **with_cache(self.cache))
        self.tokens.index_copy_(1, self.place, self._next(output.logits)[:, None])
        self.place.add_(1)

    def _take(self) -> None:
        """Take a step: the recorded one, or on the way there one that runs."""
        if self.stream is None:
            self._step()
        elif self.graph is not None:
            self.graph.replay()
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._step()
            torch.cuda.current_stream().wait_stream(self.stream)
            self.warm += 1
            if self.warm == _WARM_UP:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream):
                    self._step()
                self.graph = graph
