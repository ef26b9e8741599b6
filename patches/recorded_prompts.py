"""Play what a model reads at once, from the beginning of its texts on, as a CUDA graph: decide when that is done.

Such a prompt comes from `generate`, or from a forward of whole texts. Python and the launches of one that runs take
longer than its kernels on a GPU, up to some thousands of tokens, and some milliseconds beside them for longer ones. So
the backbone of the model is recorded (`prompt_recording`) when about the length of a prompt comes again, once for all
lengths of a bucket: the text is padded on the right, where a causal model sees nothing of it, and a tensor says how
many of the tokens are the text. The cache layers keep what a text of so many tokens keeps (`ModelCall.end`), and the
head reads the hidden states of these. The recording is compared with a prompt that runs before it is used, and it is
used where it is faster: not for a text that is so much shorter than its bucket that the padding takes longer than
Python does.

Recordings live as long as the model is patched. One plays at a time: all share their memory, and what one returns is
copied, for the cache and the hidden states of the call.

Whether the model is as it was recorded takes milliseconds to see, in which the GPU would wait. So the recording that
was played last for such inputs begins before the host has looked at the model, if all that it reads is still in its
place and no token is beyond its embeddings. A replay writes to memory of its own only: of one that turns out to be
another's nothing is copied. The host looks only where that may lead to a replay: not at the first prompt of a bucket,
nor, for a while, after it saw a model that cannot be recorded.
"""

import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import DynamicCache

from hf_sparse._compat import with_cache
from hf_sparse.patches.backbone_class import own_forward
from hf_sparse.patches.cache import is_as_new, layers_to_fill
from hf_sparse.patches.model_state import state_of
from hf_sparse.patches.other_adapters import active_beside
from hf_sparse.patches.prompt_inputs import (
    CACHE,
    bucket_of,
    has_padding,
    is_in_range,
    is_unusual,
    keeps_keys,
    kind_of,
    may_be_played,
)
from hf_sparse.patches.prompt_recording import Layers, Prompt, Recording, agree, new_layers, record_prompt
from hf_sparse.patches.prompt_timing import Timing, Trial
from hf_sparse.patches.recorded_steps import free_memory

_MOST_RECORDINGS, _MOST_TRIALS, _MOST_STATES = 16, 64, 8  # of a model; the one used least recently goes
_ROOM = 4  # times the memory that calls have used for a while: a recording keeps up to twice that of a prompt
_IDLE = 128  # prompts for which a recording was not used before another takes its place
_MOST_FIRSTS = 1024  # buckets and kinds of prompts of which the first is noted; others are never recorded
_MOST_SKIPPED = 64  # prompts after which a model that could not be recorded is looked at again, at most

V = TypeVar("V")

_all_run: ContextVar[bool] = ContextVar("all_run", default=False)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Let patched models run eagerly in a `with` block, in this thread, where they would replay a CUDA graph of a text.

    A replay calls no Python of the model: a change of anything but its tensors, plain attributes, configurations,
    hooks, adapters and classes goes unnoticed, such as of a list that a forward reads. It may pad the text, which in
    half precision changes the results as another batch size does; an eager forward gives the same bits each time. For
    decoding steps of `generate` there is `disable_compile=True`.
    """
    token = _all_run.set(True)
    try:
        yield
    finally:
        _all_run.reset(token)


class _Expected(NamedTuple):
    """Hold what was played last for inputs of a kind.

    Attributes:
        reference: to the recording; `None` if the one that had begun was not that of the model.
        is_sure: whether the same was played the time before.
    """

    reference: weakref.ref[Recording] | None
    is_sure: bool

    @property
    def recording(self) -> Recording | None:
        """Return the recording; `None` if there is none, or it was dropped."""
        return None if self.reference is None else self.reference()


@dataclass
class _Memory:
    """Hold all recordings of a model, what is counted until there is one, and what they share.

    Attributes:
        recordings, trials: by the key and the length of the bucket.
        layers: what recordings fill, by the key and the tokens that there is room for, 0 where that is all the same.
        states: a number for each state of the model, which `model_state.state_of` returns.
        firsts: tokens of the first prompt of each bucket and kind, until it stands in a trial; then 0.
        prompts: how many might have been played.
        refusals: how many times in a row the state of the model was one that cannot be recorded.
        skipped: how many prompts are still to run before that is looked at again; twice as many after each refusal.
        edges: `SparseAttentionLayer.prompt_edge` of each attention, at the last look: buckets end there.
        expected: what was played last, by the length of the bucket and the kind of inputs.
        pool: the memory of the recordings.
        last: an event that is reached when the last replay is over, and what is used of it has been copied.
    """

    recordings: OrderedDict[tuple[Hashable, int], Recording] = field(default_factory=OrderedDict)
    trials: OrderedDict[Hashable, Trial] = field(default_factory=OrderedDict)
    layers: WeakValueDictionary[Hashable, Layers] = field(default_factory=WeakValueDictionary)
    states: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)
    firsts: dict[Hashable, int] = field(default_factory=dict)
    prompts: int = 0
    refusals: int = 0
    skipped: int = 0
    edges: Sequence[int] = ()
    expected: dict[Hashable, _Expected] = field(default_factory=dict)
    pool: Any = None
    last: torch.cuda.Event | None = None


class RecordedPrompts:
    """Read the prompts of a patched model, and record those that wait for Python.

    What runs as ever: padding, inputs other than tokens and their positions, a cache that holds something or has layers
    that are not the method's, autocast, gradients, outputs other than the last hidden states, quantised models, what
    `model_state` refuses, methods whose layers have no `prompt_edge`, and all within `unrecorded`.

    Attributes:
        played: how many prompts were played.
    """

    def __init__(self) -> None:
        self.played = 0
        self._lock = threading.Lock()
        self._numbers = count()  # of states; none is used twice
        self._arrived = 0.0  # when the prompt came that has the lock
        self._has_trained = False
        self.clear()

    def clear(self) -> None:
        """Forget all recordings, and give their memory back."""
        self._memory = _Memory()
        self._unrecorded: set[tuple[int, int]] = set()  # rows and lengths of buckets that are not recorded
        self._is_refused = False

    def read(self, model: nn.Module, modules: Callable[[], Sequence[nn.Module]], inputs: dict[str, Any]) -> Any:
        """Return what the forward of the backbone returns for the first tokens of texts.

        Where memory does not suffice, that of all recordings is given back, and a prompt in a new cache runs once more.

        Args:
            model: the backbone of a patched model.
            modules: lists the patched attention modules.
            inputs: of the forward, by name.
        """
        if not self._has_trained and model.training and torch.is_grad_enabled():
            self._has_trained = True  # from now on the peak of memory, which `_has_room` knows, is that of training
            self.clear()
        if self._is_refused or _all_run.get() or not may_be_played(inputs):
            return own_forward(model, inputs)
        cache: Any = inputs.get(CACHE)
        layers = list(getattr(cache, "layers", ()))
        try:
            return self._read(model, modules, inputs)
        except torch.OutOfMemoryError:
            if not self._memory.recordings:
                raise
            self.clear()
            if cache is not None and not is_as_new(cache, layers):
                raise
        return own_forward(model, inputs)  # here, for the error holds what the failed forward had allocated

    def _read(self, model: nn.Module, modules: Callable[[], Sequence[nn.Module]], inputs: dict[str, Any]) -> Any:
        """Return what `read` returns, if memory suffices."""
        arrived, ids = time.perf_counter(), inputs["input_ids"]
        first = bucket_of(model, len(ids), ids.shape[1], ()), kind_of(inputs)
        if first[0] is None:
            return own_forward(model, inputs)
        prompt = recording = None
        with self._lock:
            memory, self._arrived = self._memory, arrived
            memory.prompts += 1
            is_first = first not in memory.firsts
            if not is_first and self._is_worth_a_look(model, inputs):
                begun = self._begin(model, inputs)
                prompt = self._prompt(model, modules(), inputs, begun is not None)
                recording = None if prompt is None else self._recording(model, prompt, inputs)
                self._expect(inputs, begun, recording)
                if prompt is not None and recording is not None and recording.is_compared:
                    self.played += 1
                    return (self._finish if recording is begun else self._play)(recording, prompt, inputs)
            trial = None if prompt is None else self._trial(model, prompt, first)
        if prompt is not None and trial is not None:
            return self._try(model, prompt, recording, trial, inputs)
        output = own_forward(model, inputs)
        if is_first and len(memory.firsts) < _MOST_FIRSTS:
            memory.firsts[first] = ids.shape[1]
        return output

    def _try(
        self, model: nn.Module, prompt: Prompt, recording: Recording | None, trial: Trial, inputs: dict[str, Any]
    ) -> Any:
        """Run a prompt, note how long it takes, and compare it with a recording of it that is new."""
        timing = Timing() if trial.lengths and not trial.is_over else None
        if recording is not None and prompt.cache is None:  # what layers keep is compared too
            cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
            output = own_forward(model, inputs | {"use_cache": True} | with_cache(cache))
        else:
            output = own_forward(model, inputs)
        trial.note(inputs["input_ids"].shape[1], timing)
        if recording is None:
            return output
        with self._lock:
            try:
                self._compare(recording, prompt, inputs, output)
            except Exception as error:
                self._give_up(prompt, error)
        return output if prompt.cache is not None else type(output)(last_hidden_state=output.last_hidden_state)

    def _give_up(self, prompt: Prompt, error: Exception) -> None:
        """Record no more prompts of a bucket; none of the model at all where the first recording failed."""
        self._unrecorded.add((prompt.rows, prompt.length))
        self._memory.recordings.pop((prompt.key, prompt.length), None)
        if not isinstance(error, torch.OutOfMemoryError) and not self.played:
            self.clear()
            self._is_refused = True

    def _is_worth_a_look(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Tell whether a look at the model may lead to a replay, or to a recording."""
        memory, ids = self._memory, inputs["input_ids"]
        if memory.skipped:
            memory.skipped -= 1
            return False
        length = bucket_of(model, len(ids), ids.shape[1], memory.edges)
        if (len(ids), length) in self._unrecorded:
            return False
        if len(memory.recordings) < _MOST_RECORDINGS or not self._is_used(next(iter(memory.recordings))):
            return True
        return any([of_one == length for _, of_one in memory.recordings])

    def _is_used(self, key: tuple[Hashable, int]) -> bool:
        """Tell whether a recording was used not long ago."""
        return self._memory.prompts - self._memory.recordings[key].used < _IDLE

    def _trial(self, model: nn.Module, prompt: Prompt, first: Hashable) -> Trial:
        """Return what is counted of prompts like one; the first of all counts in the trial that comes first."""
        memory, length = self._memory, prompt.length
        trial = _entry(memory.trials, (prompt.key, length), Trial, _MOST_TRIALS)
        tokens = memory.firsts.get(first, 0)
        if tokens and bucket_of(model, prompt.rows, tokens, memory.edges) == length:
            trial.lengths.add(tokens)
        memory.firsts[first] = 0
        return trial

    def _begin(self, model: nn.Module, inputs: dict[str, Any]) -> Recording | None:
        """Launch the replay that is expected for a prompt, before the host has looked at the model.

        Returns:
            `None` if nothing is expected, or it might read what is not there: tensors that are not in their place, or
            rows behind the last one of embeddings; or if there is padding.
        """
        memory, ids = self._memory, inputs["input_ids"]
        length = bucket_of(model, len(ids), ids.shape[1], memory.edges) if memory.expected else None
        found = memory.expected.get((length, kind_of(inputs)))
        expected = found.recording if found is not None and found.is_sure else None
        if expected is None or not expected.is_compared or not expected.is_faster(ids.shape[1]):
            return None
        if not expected.reads.are_there() or not is_in_range(inputs, expected.vocabulary, expected.length):
            return None
        self._launch(expected, inputs)
        return expected

    def _expect(self, inputs: dict[str, Any], begun: Recording | None, found: Recording | None) -> None:
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
    ) -> Prompt | None:
        """Return what is to be known of a prompt and the model; `None` if it has to run.

        Args:
            model, modules, inputs: see `read`.
            is_begun: whether a replay was launched, so that there is no padding.
        """
        ids, cache = inputs["input_ids"], inputs.get(CACHE)
        if not is_begun and has_padding(inputs):
            return None
        if cache is None and keeps_keys(model, inputs):
            cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
        count = _number_of_layers(model) if cache is None else len(getattr(cache, "layers", ()))
        if not count or [module.layer_idx for module in modules] != list(range(count)):
            return None
        attentions: list[Any] = [module._modules["sparse_attention"] for module in modules]
        if not all([one.is_active and one.causal and not one.dense_window for one in attentions]):
            return None
        if any([one.longest_prompt is not None and one.longest_prompt < ids.shape[1] for one in attentions]):
            return None
        layers = [] if cache is None else layers_to_fill(cache, attentions)
        if layers is None:
            return None
        if attentions[0].is_managed() and any([active_beside(*pair) for pair in zip(modules, attentions, strict=True)]):
            return None
        edges, keys = [one.prompt_edge for one in attentions], [one.recording_key() for one in attentions]
        length = None if None in edges or None in keys else bucket_of(model, len(ids), ids.shape[1], edges)
        if length is None or (len(ids), length) in self._unrecorded or is_unusual(model):
            return None
        memory = self._memory
        state = state_of(model, ids.device, {hook.id for attention in attentions for hook in attention.hooks})
        if state is None:
            memory.skipped = min(1 << memory.refusals, _MOST_SKIPPED)
            memory.refusals += 1
            return None
        memory.edges, memory.refusals = edges, 0
        number = _entry(memory.states, state, lambda: next(self._numbers), _MOST_STATES)
        return Prompt(cache, layers, modules, attentions, len(ids), length, (number, kind_of(inputs), *edges, *keys))

    def _recording(self, model: nn.Module, prompt: Prompt, inputs: dict[str, Any]) -> Recording | None:
        """Return the recording for a prompt, made now if it is time; `None` if the prompt has to run."""
        memory, key, bucket = self._memory, (prompt.key, prompt.length), (len(inputs["input_ids"]), prompt.length)
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
            if self._is_used(oldest):
                return None
            del memory.recordings[oldest]
        try:
            recording = self._record(model, prompt, inputs, ms_per_token)
        except Exception as error:  # where it is no matter of the recording, the prompt that runs raises it too
            self._give_up(prompt, error)
            return None
        memory.recordings[key] = recording
        return recording

    def _record(self, model: nn.Module, prompt: Prompt, inputs: dict[str, Any], ms_per_token: float) -> Recording:
        """Record a prompt of the length of its bucket, without playing it."""
        memory, device, room = self._memory, inputs["input_ids"].device, prompt.room
        layers = memory.layers.get((prompt.key, room))
        if layers is None:
            layers = memory.layers[prompt.key, room] = Layers(new_layers(prompt.attentions))
        if not memory.recordings:  # a pool goes with the last recording in it
            memory.pool = _new_pool(device)
        self._wait_for_copies(device)  # from the same layers
        return record_prompt(model, prompt, inputs, layers, memory.pool, ms_per_token)

    def _compare(self, recording: Recording, prompt: Prompt, inputs: dict[str, Any], ran: Any) -> None:
        """Play a new recording beside the prompt that ran; where they differ, no prompt of the model is played."""
        layers = new_layers(prompt.attentions)
        played = self._play(recording, prompt._replace(cache=DynamicCache(), layers=layers), inputs)
        recording.is_compared = agree(played.last_hidden_state, layers, ran)
        if not recording.is_compared:
            message = "a forward that was recorded as a CUDA graph differs from one that ran, so all of the model run"
            warnings.warn(message, stacklevel=2)
            self.clear()
            self._is_refused = True

    def _play(self, recording: Recording, prompt: Prompt, inputs: dict[str, Any]) -> Any:
        """Play a recording for a prompt: fill its cache, and return what the forward returns."""
        self._launch(recording, inputs)
        return self._finish(recording, prompt, inputs)

    def _launch(self, recording: Recording, inputs: dict[str, Any]) -> None:
        """Launch a replay, of which nothing is used yet."""
        device = inputs["input_ids"].device
        self._wait_for_copies(device)
        if recording.replays == 1:
            recording.launched, recording.wait_ms = Timing(), 1e3 * (time.perf_counter() - self._arrived)
        recording.launch(inputs)
        self._note_last(device)

    def _finish(self, recording: Recording, prompt: Prompt, inputs: dict[str, Any]) -> Any:
        """Fill the cache of a prompt with what a replay computes for it, and return what the forward returns."""
        ids, tokens = inputs["input_ids"], inputs["input_ids"].shape[1]
        recording.replays += 1
        recording.used = self._memory.prompts
        layers = prompt.layers or ([] if prompt.cache is None else new_layers(prompt.attentions))
        states = recording.copy_to(layers, tokens)
        if recording.replays == 2 and recording.launched is not None:
            recording.launched.stop()
            recording.timing, recording.launched = recording.launched, None
        self._note_last(ids.device)
        for layer in layers:
            layer.note_tokens(tokens)
        if prompt.cache is not None:
            prompt.cache.layers[:] = layers
        return recording.kind(last_hidden_state=states, **with_cache(prompt.cache))

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


def _number_of_layers(model: nn.Module) -> int:
    """Count the layers of a model of transformers."""
    config: Any = model.config
    return config.get_text_config().num_hidden_layers


def _has_room(device: torch.device) -> bool:
    """Tell whether a GPU has so much memory left that a recording does not take it from what runs as ever."""
    if device.type != "cuda":
        return True
    for_a_while = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return free_memory(device) > _ROOM * for_a_while


def _new_pool(device: torch.device) -> Any:
    """Return a name for the memory of recordings."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
