"""Record one prompt as a CUDA graph, play it for another text, and compare what it computes with one that ran.

Which prompts are recorded, and when a recording is played, is the matter of `recorded_prompts`.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_sparse._compat import cache_of, with_cache
from hf_sparse.core.cache import RecordableCacheLayer
from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.patches.backbone_class import own_forward
from hf_sparse.patches.cache import make_layers
from hf_sparse.patches.model_state import ReadMemory
from hf_sparse.patches.prompt_inputs import CACHE
from hf_sparse.patches.prompt_timing import Timing
from hf_sparse.patches.recorded_steps import record, run_beside

_STATES_APART, _KEYS_APART = 0.1, 0.5  # of the norm, that rounding may make of a prompt in half precision


class Layers(list[RecordableCacheLayer]):
    """List the cache layers that recordings fill, one recording at a time; a list that can be referred to weakly."""


class Prompt(NamedTuple):
    """Hold what is known of a prompt before it is read.

    Attributes:
        cache: of transformers, without a token; `None` if nothing is kept.
        layers: its layers if they are to hold the prompt; empty if those are yet to be made.
        modules, attentions: the attention module of each of them, and the sparse attention of that.
        rows: how many texts there are.
        length: tokens of its bucket, padding included.
        key: what has to be the same in a replay, beside the length: state of the model, layout of the inputs, settings.
    """

    cache: Any
    layers: list[RecordableCacheLayer]
    modules: Sequence[nn.Module]
    attentions: list[SparseAttentionLayer]
    rows: int
    length: int
    key: Hashable

    @property
    def room(self) -> int:
        """Return the tokens that layers which grow have room for, 0 for layers that do not grow.

        Recordings of lengths between two powers of 2 share the memory of such layers.
        """
        new: Any = self.attentions[0].cache_layer()
        return 0 if new.is_compileable else 1 << (self.length - 1).bit_length()


@dataclass
class Recording:
    """Hold a recorded prompt.

    Attributes:
        inputs: the tensors that it reads: `input_ids` `[B, L]` and, if the model gets them, `position_ids`.
        end: `[1]` int64, tokens of the text.
        states: `[B, L, C]`, the last hidden states.
        kind: the class in which the forward returns them.
        layers: cache layers that it fills.
        replay: plays it.
        reads: the tensors of the model that it reads.
        vocabulary: rows of the embeddings that it reads.
        ms_per_token: how long the GPU took for each token of a row in a prompt that ran.
        ms: how long a replay takes, with what comes before it; 0 until it is known.
        is_compared: whether it was compared with a prompt that ran, and agreed.
        replays: how many there were of which something was used.
        used: the number of the prompt that it was played for last.
        timing: of the second replay, until it is looked at.
        launched: the same timing, from the launch of the replay on.
        wait_ms: how long that prompt waited before it, which prompts of buckets that are not recorded are spared.
    """

    inputs: dict[str, Tensor]
    end: Tensor
    states: Tensor
    kind: type
    layers: Layers
    replay: Callable[[], None]
    reads: ReadMemory
    vocabulary: int
    ms_per_token: float
    ms: float = 0.0
    is_compared: bool = False
    replays: int = 0
    used: int = 0
    timing: Timing | None = None
    launched: Timing | None = None
    wait_ms: float = 0.0

    @property
    def length(self) -> int:
        """Return the tokens of its bucket."""
        return self.inputs["input_ids"].shape[1]

    def is_faster(self, tokens: int) -> bool:
        """Tell whether a replay is faster than a text of so many tokens that runs."""
        return self.ms <= tokens * self.ms_per_token

    def launch(self, inputs: dict[str, Any]) -> None:
        """Launch a replay for the inputs of a prompt, of which nothing is used yet."""
        tokens = inputs["input_ids"].shape[1]
        for name, held in self.inputs.items():
            held[:, :tokens].copy_(inputs[name])
            # What an earlier prompt has left behind them may make values of NaN, which no weight of 0 hides.
            held[:, tokens:].copy_(inputs[name][:, -1:])
        self.end.fill_(tokens)
        self.replay()

    def copy_to(self, layers: Sequence[RecordableCacheLayer], tokens: int) -> Tensor:
        """Copy what a replay computed for so many tokens to cache layers, if any, and return a copy of the states."""
        if layers:
            layers[0].copy_texts(self.layers, layers, tokens)
        return self.states[:, :tokens].clone(memory_format=torch.contiguous_format)


def record_prompt(
    model: nn.Module, prompt: Prompt, inputs: dict[str, Any], layers: Layers, pool: Any, ms_per_token: float
) -> Recording:
    """Record a prompt of the length of its bucket, without playing it.

    Args:
        model: the backbone of a patched model.
        prompt: what is known of it.
        inputs: of the forward, by name; what the recording reads is as they are.
        layers: what the recording fills.
        pool: the memory of recordings, see `recorded_steps.record`.
        ms_per_token: how long the GPU takes for each token of a row in a prompt that runs.
    """
    ids = inputs["input_ids"]
    tensors = {name: inputs[name] for name in ("input_ids", "position_ids") if inputs.get(name) is not None}
    with torch.inference_mode(False):
        held = {name: tensor.new_zeros((len(tensor), prompt.length)) for name, tensor in tensors.items()}
        end = torch.full((1,), ids.shape[1], device=ids.device)
    room = prompt.room

    def call() -> tuple[Tensor, type]:
        cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
        make_layers(cache, prompt.modules, end)
        output = own_forward(model, held | {"use_cache": True} | with_cache(cache))
        if set(output) != {"last_hidden_state", CACHE}:
            raise RuntimeError(f"a recorded prompt returns its last hidden states and a cache, got {', '.join(output)}")
        layers[0].copy_texts(cache.layers, layers, prompt.length, room)
        return output.last_hidden_state, type(output)

    run_beside(call, ids.device)  # compiles and loads kernels
    (states, kind), replay = record(call, ids.device, pool)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = len(embeddings.weight)
    return Recording(held, end, states, kind, layers, replay, ReadMemory(model), vocabulary, ms_per_token)


def agree(states: Tensor, layers: Sequence[RecordableCacheLayer], ran: Any) -> bool:
    """Tell whether a prompt that was played is that which ran, but for rounding.

    Args:
        states: `[B, T, C]`, the last hidden states of the prompt that was played.
        layers: cache layers that it filled.
        ran: what the forward of the backbone returned for the same prompt.
    """
    pairs = [(states.float(), ran.last_hidden_state.float(), _STATES_APART)]
    for mine, other in zip(layers, cache_of(ran).layers, strict=True):
        for one, two in ((mine.keys, other.keys), (mine.values, other.values)):
            # Rounding may choose another key here and there, which moves those behind it, but hardly their sum.
            pairs.append((one.sum(-2, dtype=torch.float32), two.sum(-2, dtype=torch.float32), _KEYS_APART))
    pairs = [(one.nan_to_num(), two.nan_to_num(), most) for one, two, most in pairs]
    apart = torch.stack([(one - two).norm() - most * two.norm() for one, two, most in pairs])
    return bool((apart <= 0).all())


def new_layers(attentions: Sequence[SparseAttentionLayer]) -> list[RecordableCacheLayer]:
    """Make an empty cache layer for each sparse attention; what has a `prompt_edge` has one that can be recorded."""
    layers: list[Any] = [attention.cache_layer() for attention in attentions]
    return layers
