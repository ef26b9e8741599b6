"""Play the prompt of an ordinary `generate` as a CUDA graph.

Python and the launches of an eager prompt take longer than its kernels on a GPU, up to some thousands of tokens, and
some milliseconds beside them for longer ones. So a prompt is recorded when its length comes again, once for all lengths
of a bucket: the text is padded on the right, where a causal model sees nothing of it, and a tensor says how many of the
tokens are the text. The head reads the last of these, and the cache layers keep what a text of so many tokens keeps
(`ModelCall.end`). The recording is compared with a prompt that runs before it is used, and it is used where it is
faster: not for a text that is so much shorter than its bucket that the padding takes longer than Python does.

Recordings live as long as the model is patched. One plays at a time: all share their memory, and what one returns is
copied, for the cache and the logits of the call.

Whether the model is as it was recorded takes milliseconds to see, in which the GPU would wait. So the recording that
was played last for such inputs begins before the host has looked at the model, if all that it reads is still in its
place and no token is beyond its embeddings. A replay writes to memory of its own only: of one that turns out to be
another's nothing is copied.
"""

import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_sparse._compat import cache_of, with_cache
from hf_sparse.core.cache import RecordableCacheLayer
from hf_sparse.core.layer import SparseAttentionLayer
from hf_sparse.patches.cache import SparseCache, is_unused, make_layers
from hf_sparse.patches.model_state import ReadMemory, state_of
from hf_sparse.patches.other_adapters import active_beside
from hf_sparse.patches.prompt_inputs import CACHE, has_padding, is_in_range, kind_of, may_be_played
from hf_sparse.patches.prompt_timing import Timing, Trial
from hf_sparse.patches.recorded_steps import free_memory, record, run_beside

_MOST_TOKENS = 16384  # of all rows of a recorded prompt; beyond, Python is a small part of it, and memory a large one
_STEP = 64  # between buckets; above eight times as many tokens an eighth of the power of two below
_MOST_RECORDINGS, _MOST_TRIALS, _MOST_STATES = 16, 64, 8  # of a model; the one used least recently goes
_LOGITS_APART, _KEYS_APART = 0.1, 0.5  # of the norm, that rounding may make of a prompt in half precision
_ROOM = 4  # times the memory that calls have used for a while: a recording keeps up to twice that of a prompt
_IDLE = 128  # prompts for which a recording was not used before another takes its place

V = TypeVar("V")


class PromptCaller:
    """Take the place of a model where `generate` reads a prompt, and play a recorded one if there is one.

    Args:
        model: a patched model.
        modules: its patched attention modules.
        prompts: its recordings.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], prompts: "RecordedPrompts") -> None:
        self._model, self._modules, self._prompts = model, modules, prompts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._prompts.read(self._model, self._modules, inputs)


class _Layers(list[RecordableCacheLayer]):
    """List the cache layers that recordings fill, one recording at a time; a list that can be referred to weakly."""


class _Prompt(NamedTuple):
    """Hold what is known of a prompt before it is read.

    Attributes:
        cache: of transformers, without a token.
        layers: its layers if they are to hold the prompt; empty if those are yet to be made.
        modules, attentions: the attention module of each of them, and the sparse attention of that.
        length: tokens of its bucket, padding included.
        key: what has to be the same in a replay, beside the length.
    """

    cache: Any
    layers: list[RecordableCacheLayer]
    modules: Sequence[nn.Module]
    attentions: list[SparseAttentionLayer]
    length: int
    key: Hashable


@dataclass
class _Recording:
    """Hold a recorded prompt.

    Attributes:
        inputs: the tensors that it reads: `input_ids` `[B, L]` and, if the model gets them, `position_ids`.
        end: `[1]` int64, tokens of the text.
        output: its logits, `[B, 1, V]`, by name, and the class that they are returned in.
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
    output: dict[str, Any]
    layers: _Layers
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


class _Expected(NamedTuple):
    """Hold what was played last for inputs of a kind.

    Attributes:
        reference: to the recording; `None` if the one that had begun was not that of the model.
        is_sure: whether the same was played the time before.
    """

    reference: weakref.ref[_Recording] | None
    is_sure: bool

    @property
    def recording(self) -> _Recording | None:
        """Return the recording; `None` if there is none, or it was dropped."""
        return None if self.reference is None else self.reference()


@dataclass
class _Memory:
    """Hold all recordings of a model, what is counted until there is one, and what they share.

    Attributes:
        recordings, trials: by the key and the length of the prompt.
        layers: what recordings fill, by the key and the tokens that there is room for, 0 where that is all the same.
        states: a number for each state of the model.
        prompts: how many have been looked at.
        edges: of the attention modules, at the last look.
        expected: what was played last, by the length of the bucket and the kind of inputs.
        pool: the memory of the recordings.
        last: is reached when the last replay is over, and what is used of it has been copied.
    """

    recordings: OrderedDict[Hashable, _Recording] = field(default_factory=OrderedDict)
    trials: OrderedDict[Hashable, Trial] = field(default_factory=OrderedDict)
    layers: WeakValueDictionary[Hashable, _Layers] = field(default_factory=WeakValueDictionary)
    states: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)
    prompts: int = 0
    edges: Sequence[int] = ()
    expected: dict[Hashable, _Expected] = field(default_factory=dict)
    pool: Any = None
    last: torch.cuda.Event | None = None


class RecordedPrompts:
    """Read the prompts of a patched model in `generate`, and record those that wait for Python.

    What runs as ever: padding, inputs other than tokens and their positions, a cache that holds something or has layers
    that are not the method's, autocast, gradients, outputs other than logits, quantised models, what `model_state`
    refuses, and methods whose layers have no `prompt_edge`.

    Attributes:
        played: how many prompts were played.
    """

    def __init__(self) -> None:
        self.played = 0
        self._lock = threading.Lock()
        self._numbers = count()  # of states; none is used twice
        self._arrived = 0.0  # when the prompt came that has the lock
        self.clear()

    def clear(self) -> None:
        """Forget all recordings, and give their memory back."""
        self._memory = _Memory()
        self._unrecorded: set[tuple[int, int]] = set()  # rows and lengths of buckets that are not recorded
        self._is_refused = False

    def read(self, model: nn.Module, modules: Sequence[nn.Module], inputs: dict[str, Any]) -> Any:
        """Return what the forward of the model returns for the first tokens of texts.

        Where memory does not suffice, that of all recordings is given back, and a prompt in a new cache runs once more.

        Args:
            model: a patched model.
            modules: its patched attention modules.
            inputs: of the forward, by name.
        """
        cache: Any = inputs.get(CACHE)
        layers = list(getattr(cache, "layers", ()))
        try:
            return self._read(model, modules, inputs)
        except torch.OutOfMemoryError:
            if not self._memory.recordings:
                raise
            self.clear()
            if not _is_as_new(cache, layers):
                raise
        return model(**inputs)  # here, for the error holds what the failed forward had allocated

    def _read(self, model: nn.Module, modules: Sequence[nn.Module], inputs: dict[str, Any]) -> Any:
        """Return what `read` returns, if memory suffices."""
        arrived = time.perf_counter()
        if self._is_refused or not may_be_played(modules, inputs):
            return model(**inputs)
        with self._lock:
            self._arrived = arrived
            begun = self._begin(model, inputs)
            prompt = self._prompt(model, modules, inputs, begun is not None)
            recording = None if prompt is None else self._recording(model, prompt, inputs)
            self._expect(inputs, begun, recording)
            if prompt is not None and recording is not None and recording.is_compared:
                self.played += 1
                return (self._finish if recording is begun else self._play)(recording, prompt, inputs)
            if prompt is not None:
                trial = _entry(self._memory.trials, (prompt.key, prompt.length), Trial, _MOST_TRIALS)
        if prompt is None:
            return model(**inputs)
        timing = Timing() if trial.lengths and not trial.is_over else None
        output = model(**inputs)
        trial.note(inputs["input_ids"].shape[1], timing)
        if recording is not None:
            with self._lock:
                try:
                    self._compare(recording, prompt, inputs, output)
                except torch.OutOfMemoryError:
                    self._unrecorded.add((len(inputs["input_ids"]), prompt.length))
                    self._memory.recordings.pop((prompt.key, prompt.length), None)
        return output

    def _begin(self, model: nn.Module, inputs: dict[str, Any]) -> _Recording | None:
        """Launch the replay that is expected for a prompt, before the host has looked at the model.

        Returns:
            `None` if nothing is expected, or it might read what is not there: tensors that are not in their place, or
            rows behind the last one of embeddings; or if there is padding.
        """
        memory, ids = self._memory, inputs["input_ids"]
        length = _bucket(model, len(ids), ids.shape[1], memory.edges) if memory.expected else None
        found = memory.expected.get((length, kind_of(inputs)))
        expected = found.recording if found is not None and found.is_sure else None
        if expected is None or not expected.is_compared or not expected.is_faster(ids.shape[1]):
            return None
        if not expected.reads.are_there() or not is_in_range(inputs, expected.vocabulary, expected.length):
            return None
        self._launch(expected, inputs)
        return expected

    def _expect(self, inputs: dict[str, Any], begun: _Recording | None, found: _Recording | None) -> None:
        """Note what was found for a prompt, to expect it of the next one like it if it was the same the last time.

        Args:
            inputs: of the prompt.
            begun: what was launched before the look at the model, which may have found another recording, or none.
            found: what is played for the prompt, or is going to be.
        """
        expected, kind = self._memory.expected, kind_of(inputs)
        if begun is not None and begun is not found:
            expected[begun.length, kind] = _Expected(None, is_sure=False)
        if found is not None:
            before = expected.get((found.length, kind))
            is_sure = before is None or before.recording is found
            expected[found.length, kind] = _Expected(weakref.ref(found), is_sure)

    def _prompt(
        self, model: nn.Module, modules: Sequence[nn.Module], inputs: dict[str, Any], is_begun: bool
    ) -> _Prompt | None:
        """Return what is to be known of a prompt and the model; `None` if it has to run.

        Args:
            model, modules, inputs: see `read`.
            is_begun: whether a replay was launched, so that there is no padding.
        """
        ids, cache = inputs["input_ids"], inputs[CACHE]
        attentions: list[Any] = [module._modules["sparse_attention"] for module in modules]
        if not all([attention.is_active for attention in attentions]):
            return None
        layers = _layers_to_fill(cache, attentions)
        if layers is None:
            return None
        if attentions[0].is_managed() and any([active_beside(*pair) for pair in zip(modules, attentions, strict=True)]):
            return None
        edges, keys = [one.prompt_edge for one in attentions], [one.recording_key() for one in attentions]
        length = None if None in edges or None in keys else _bucket(model, len(ids), ids.shape[1], edges)
        if length is None or (len(ids), length) in self._unrecorded or _is_unusual(model):
            return None
        if not is_begun and has_padding(inputs):
            return None
        state = state_of(model, ids.device, {hook.id for attention in attentions for hook in attention.hooks})
        if state is None:
            return None
        self._memory.edges = edges
        number = _entry(self._memory.states, state, lambda: next(self._numbers), _MOST_STATES)
        return _Prompt(cache, layers, modules, attentions, length, (number, kind_of(inputs), *edges, *keys))

    def _recording(self, model: nn.Module, prompt: _Prompt, inputs: dict[str, Any]) -> _Recording | None:
        """Return the recording for a prompt, made now if it is time; `None` if the prompt has to run."""
        memory, key, bucket = self._memory, (prompt.key, prompt.length), (len(inputs["input_ids"]), prompt.length)
        memory.prompts += 1
        recording = memory.recordings.get(key)
        if recording is not None:
            memory.recordings.move_to_end(key)
            if recording.timing is not None and (ms := recording.timing.ms()) is not None:
                recording.timing, recording.ms = None, ms + recording.wait_ms
                if not recording.is_faster(prompt.length):
                    self._unrecorded.add(bucket)
                    del memory.recordings[key]
                    return None
            return recording if recording.is_faster(inputs["input_ids"].shape[1]) else None
        trial = memory.trials.get(key)
        ms_per_token = None if trial is None else trial.ms_per_token()
        if ms_per_token is None or not _has_room(inputs["input_ids"].device):
            return None
        if len(memory.recordings) >= _MOST_RECORDINGS:
            oldest = next(iter(memory.recordings))
            if memory.prompts - memory.recordings[oldest].used < _IDLE:
                return None
            del memory.recordings[oldest]
        try:
            recording = self._record(model, prompt, inputs, ms_per_token)
        except Exception as error:  # where it is no matter of the recording, the prompt that runs raises it too
            if isinstance(error, torch.OutOfMemoryError):
                self._unrecorded.add(bucket)
            else:
                self.clear()
                self._is_refused = True
            return None
        memory.recordings[key] = recording
        return recording

    def _record(self, model: nn.Module, prompt: _Prompt, inputs: dict[str, Any], ms_per_token: float) -> _Recording:
        """Record a prompt of the length of its bucket, without playing it."""
        memory, ids = self._memory, inputs["input_ids"]
        tensors = {name: inputs[name] for name in ("input_ids", "position_ids") if inputs.get(name) is not None}
        with torch.inference_mode(False):
            held = {name: tensor.new_zeros((len(tensor), prompt.length)) for name, tensor in tensors.items()}
            end = torch.full((1,), ids.shape[1], device=ids.device)
        # Recordings of lengths between two powers of 2 share the memory of layers that grow with the text.
        new: Any = prompt.attentions[0].cache_layer()
        room = 0 if new.is_compileable else 1 << (prompt.length - 1).bit_length()
        layers = memory.layers.get((prompt.key, room))
        if layers is None:
            layers = memory.layers[prompt.key, room] = _Layers(_new_layers(prompt.attentions))

        def call() -> dict[str, Any]:
            cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
            make_layers(cache, prompt.modules, end)
            output = model(**held, use_cache=True, return_dict=True, logits_to_keep=end - 1, **with_cache(cache))
            if set(output) != {"logits", CACHE}:
                raise RuntimeError(f"a recorded prompt returns logits and a cache, got {', '.join(output)}")
            layers[0].copy_texts(cache.layers, layers, prompt.length, room)
            return {"logits": output.logits, "kind": type(output)}

        if not memory.recordings:  # a pool goes with the last recording in it
            memory.pool = _new_pool(ids.device)
        self._wait_for_copies(ids.device)  # from the same layers
        run_beside(call, ids.device)  # compiles and loads kernels
        output, replay = record(call, ids.device, memory.pool)
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        vocabulary = len(embeddings.weight)
        return _Recording(held, end, output, layers, replay, ReadMemory(model), vocabulary, ms_per_token)

    def _compare(self, recording: _Recording, prompt: _Prompt, inputs: dict[str, Any], ran: Any) -> None:
        """Play a new recording beside the prompt that ran; where they differ, no prompt of the model is played."""
        layers = _new_layers(prompt.attentions)
        beside = prompt._replace(cache=DynamicCache(), layers=layers)
        played = self._play(recording, beside, inputs)
        pairs = [(played.logits.float(), ran.logits[:, -1:].float(), _LOGITS_APART)]
        for mine, other in zip(layers, cache_of(ran).layers, strict=True):
            for one, two in ((mine.keys, other.keys), (mine.values, other.values)):
                # Rounding may choose another key here and there, which moves those behind it, but hardly their sum.
                pairs.append((one.sum(-2, dtype=torch.float32), two.sum(-2, dtype=torch.float32), _KEYS_APART))
        pairs = [(one.nan_to_num(), two.nan_to_num(), most) for one, two, most in pairs]
        apart = torch.stack([(one - two).norm() - most * two.norm() for one, two, most in pairs])
        recording.is_compared = bool((apart <= 0).all())
        if not recording.is_compared:
            warnings.warn("a recorded prompt differs from one that ran, so all prompts run", stacklevel=2)
            self.clear()
            self._is_refused = True

    def _play(self, recording: _Recording, prompt: _Prompt, inputs: dict[str, Any]) -> Any:
        """Play a recording for a prompt: fill its cache, and return what the forward returns."""
        self._launch(recording, inputs)
        return self._finish(recording, prompt, inputs)

    def _launch(self, recording: _Recording, inputs: dict[str, Any]) -> None:
        """Launch a replay, of which nothing is used yet."""
        ids, tokens = inputs["input_ids"], inputs["input_ids"].shape[1]
        self._wait_for_copies(ids.device)
        if recording.replays == 1:
            recording.launched, recording.wait_ms = Timing(), 1e3 * (time.perf_counter() - self._arrived)
        for name, held in recording.inputs.items():
            held[:, :tokens].copy_(inputs[name])
            # What an earlier prompt has left behind them may make values of NaN, which no weight of 0 hides.
            held[:, tokens:].copy_(inputs[name][:, -1:])
        recording.end.fill_(tokens)
        recording.replay()
        self._note_last(ids.device)

    def _finish(self, recording: _Recording, prompt: _Prompt, inputs: dict[str, Any]) -> Any:
        """Fill the cache of a prompt with what a replay computes for it, and return what the forward returns."""
        ids, tokens = inputs["input_ids"], inputs["input_ids"].shape[1]
        recording.replays += 1
        recording.used = self._memory.prompts
        layers = prompt.layers or _new_layers(prompt.attentions)
        layers[0].copy_texts(recording.layers, layers, tokens)
        logits = recording.output["logits"].clone()
        if recording.replays == 2 and recording.launched is not None:
            recording.launched.stop()
            recording.timing, recording.launched = recording.launched, None
        self._note_last(ids.device)
        for layer in layers:
            layer.note_tokens(tokens)
        prompt.cache.layers[:] = layers
        return recording.output["kind"](logits=logits, **with_cache(prompt.cache))

    def _note_last(self, device: torch.device) -> None:
        """Note that the memory of recordings is in use up to here."""
        if device.type == "cuda":
            self._memory.last = torch.cuda.Event()
            self._memory.last.record()

    def _wait_for_copies(self, device: torch.device) -> None:
        """Let the current stream, which may be another one, wait until the memory of recordings is in use no more."""
        if self._memory.last is not None:
            torch.cuda.current_stream(device).wait_event(self._memory.last)


def _entry(entries: OrderedDict[Hashable, V], key: Hashable, make: Callable[[], V], most: int) -> V:
    """Return an entry, made if there is none; where there are more than `most`, the one used least recently goes."""
    last = next(reversed(entries), None)
    if last is not None and last == key:  # before a key of thousands of values is hashed several times
        return entries[last]
    if key not in entries:
        entries[key] = make()
        if len(entries) > most:
            entries.popitem(last=False)
    entries.move_to_end(key)
    return entries[key]


def _new_layers(attentions: Sequence[SparseAttentionLayer]) -> list[RecordableCacheLayer]:
    """Make an empty cache layer for each sparse attention; what has a `prompt_edge` has one that can be recorded."""
    layers: list[Any] = [attention.cache_layer() for attention in attentions]
    return layers


def _layers_to_fill(cache: Any, attentions: Sequence[SparseAttentionLayer]) -> list[Any] | None:
    """Return those layers of an empty cache that are to hold a prompt.

    Returns:
        Those of a `SparseCache` that are as if new; none for a cache that `generate` made, which gets new ones; `None`
        for other caches, which hold something, or layers of another kind or another budget.
    """
    if type(cache) is SparseCache:
        pairs = [(layer, attention.cache_layer()) for layer, attention in zip(cache.layers, attentions, strict=True)]
        is_new = all([type(layer) is type(other) and vars(layer) == vars(other) for layer, other in pairs])
        return list(cache.layers) if is_new else None
    return [] if all([is_unused(cache, index) for index in range(len(attentions))]) else None


def _is_as_new(cache: Any, layers: list[Any]) -> bool:
    """Put the layers back that an empty cache had before a forward failed; tell whether none of them holds anything."""
    if type(cache) is DynamicCache:
        cache.layers[:] = layers
    return bool(layers) and all([is_unused(cache, index) for index in range(len(layers))])


def _bucket(model: nn.Module, rows: int, tokens: int, edges: Iterable[int]) -> int | None:
    """Return the length at which a prompt of so many tokens is recorded; `None` if it is too long.

    >>> model = torch.nn.Module()
    >>> model.config = type("Config", (), {"get_text_config": lambda self: self, "max_position_embeddings": 2000})()
    >>> [_bucket(model, 1, tokens, [200, 300]) for tokens in (100, 199, 201, 301, 513, 1025, 1950, 2001)]
    [128, 200, 256, 320, 576, 1152, 2000, None]
    >>> [_bucket(model, 16, tokens, []) for tokens in (1000, 1024, 1025)]
    [1024, 1024, None]
    """
    config: Any = model.config
    longest = _MOST_TOKENS // rows
    most = min(getattr(config.get_text_config(), "max_position_embeddings", None) or longest, longest)
    if tokens > most:
        return None
    step = max(_STEP, 1 << (tokens - 1).bit_length() - 1 >> 3)
    return min(-(-tokens // step) * step, most, *[edge for edge in edges if edge >= tokens])


def _is_unusual(model: nn.Module) -> bool:
    """Tell whether a model is quantised, which may mix tokens, or returns more than logits."""
    config: Any = model.config
    is_quantised = getattr(model, "hf_quantizer", None) or getattr(config, "quantization_config", None)
    asks = getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False)
    return bool(is_quantised or asks)


def _has_room(device: torch.device) -> bool:
    """Tell whether a GPU has so much memory left that a recording does not take it from what runs as ever."""
    if device.type != "cuda":
        return True
    for_a_while = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return free_memory(device) > _ROOM * for_a_while


def _new_pool(device: torch.device) -> Any:
    """Return a name for the memory of recordings."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
