"""Play the decoding steps of an ordinary `generate` as one CUDA graph per token.

An eager step launches about a thousand kernels, and on most models Python takes longer for that than the GPU for the
kernels. In a cache of constant size no shape changes from step to step: `generate` runs the first steps of a call as
ever, the next one is recorded, and the others play it again. The loop around the model stays that of transformers, with
its processors, criteria and streamers.

To record is what torch calls to capture: the launches of a call become a CUDA graph, and to play it is to replay this.
`CapturedDecoding` (`captured.py`) records too, with the choice of the next token inside, in place of the loop.

A cache that grows can do likewise if it has room for more tokens: a recorded step gets all of the room, and a tensor
says where its token goes. When the room is full, the cache grows in a step that runs, and the next one is recorded.
"""

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from operator import is_
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all_modules
from transformers.cache_utils import Cache

from hf_sparse.ops.triton import is_on_gpu

_stream_lock = threading.RLock()  # what another thread launches on the stream would be recorded too
_of_thread = threading.local()  # `last`: a weak reference to what played a step last in this thread
_EAGER = 2  # steps of a call before one is recorded: they compile kernels and allocate what stays
_COLLECTING = "transformers.utils.output_capturing"  # the module whose hooks collect hidden states
_PLAIN = (bool, int, float, str, type(None))  # types of inputs that a recording keeps


def may_record(model: Any, generation_config: Any) -> bool:
    """Tell whether `generate` may record its steps: on one GPU, unless it was told not to compile, or how to."""
    if model.device.type != "cuda" or generation_config.disable_compile or generation_config.compile_config is not None:
        return False
    return len(set(getattr(model, "hf_device_map", {}).values())) <= 1


def played_last() -> "RecordedSteps | None":
    """Return what played a step last in this thread, unless its `generate` is done."""
    reference = getattr(_of_thread, "last", None)
    return None if reference is None else reference()


class Expected(NamedTuple):
    """Hold the inputs of a step that is not there yet, but for its token."""

    arguments: dict[str, Any]  # of which `prepare_inputs_for_generation` made them, by name
    inputs: dict[str, Any]  # what it returned
    added: dict[str, Any]  # what the loop adds


class RecordedSteps:
    """Call a model in the loop of one `generate`: steps that are alike are recorded once and played again.

    What runs as ever: several tokens at a time, caches with a layer of transformers, autocast, outputs other than
    logits, models with hooks of others, which a recording would not call, and steps that wait for the device.

    What a call returns is written over by the next one; the loop copies the logits that it keeps.

    Args:
        model: a patched model.
        compiled: takes a step in place of the model, which it may compile, and leaves it to others to count the token.
            It takes the recorded step, and the one before it; `None` for steps of the model.
    """

    def __init__(self, model: nn.Module, compiled: Callable[..., Any] | None = None) -> None:
        self.model, self.compiled = model, compiled
        self.tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self.adapters = self._adapters()  # that `compiled` knows
        self.layout: tuple[Any, ...] = ()
        self.memory: list[Tensor | None] = []  # that layers write to; `None` for one that needs more in this step
        self.place: Tensor | None = None  # `[1]` int64, where a layer that grows writes the token
        self.steps = 0  # of this layout
        self.inputs: dict[str, Any] = {}
        self.output: Any = None
        self.replay: Callable[[], None] | None = None
        self.is_refused: bool | None = None  # not known yet
        self.expected: Expected | None = None

    def __call__(self, **inputs: Any) -> Any:
        """Return what the forward of the model returns."""
        expected, self.expected = self.expected, None
        if expected is not None and self._play_expected(inputs, expected):
            return self.output
        caches = [value for value in inputs.values() if isinstance(value, Cache)]
        layout = None if self.is_refused or len(caches) != 1 else self._layout(inputs, caches[0])
        if layout is None or not self._is_ready(layout, inputs, caches[0]):
            return self.model(**inputs)
        tokens = caches[0].get_seq_length()  # that every layer has had
        if self.replay is not None:
            self._play(inputs, tokens)
            output = self.output
        else:
            assert self.compiled is not None
            output = self.compiled(**inputs)  # compiles what it needs
        _note_tokens(caches[0], tokens + 1)
        return output

    def _layout(self, inputs: dict[str, Any], cache: Any) -> tuple[Any, ...] | None:
        """Return what must be the same for a replay; `None` for what is not a step of constant shape."""
        layout = _layout_of(inputs, cache)
        return None if layout is None else (*layout, self._adapters())

    def _adapters(self) -> list[Any]:
        """List the adapters in use of all layers, LoRA's too, which others may switch between two steps."""
        config: Any = self.model.config
        is_off = [layer._disable_adapters for layer in self.tuned]
        return [config._attn_implementation, is_off, [layer._active_adapter for layer in self.tuned]]

    def _is_ready(self, layout: tuple[Any, ...], inputs: dict[str, Any], cache: Any) -> bool:
        """Tell whether a step is played, or compiled, rather than run; this records it if it is time."""
        is_other = layout != self.layout
        if is_other and layout[-1] != self.adapters:
            self.compiled = None
        if is_other or not self._has_memory(cache):
            if is_other or cache.is_compileable:
                self.steps = 0
            self.layout, self.memory, self.replay = layout, [layer.step_memory() for layer in cache.layers], None
        self.steps += 1
        is_eager = self.compiled is None and self.steps <= _EAGER
        if is_eager or any(part is None for part in self.memory):
            return False
        if self.is_refused is None:
            self.is_refused = not _is_recordable(self.model)
        # The first one: kernels that a prompt has begun to compile are needed in the end of it.
        is_compiled_alone = self.compiled is not None and self.steps == 1
        if not self.is_refused and (is_compiled_alone or self.replay is not None or self._record(inputs, cache)):
            return True
        if self.is_refused:
            self.memory = []  # a cache that grows will have other memory, and give this back
        return False

    def _play(self, inputs: dict[str, Any], tokens: int) -> None:
        """Play the recorded step with these inputs, after so many tokens."""
        self._take(inputs, tokens)
        self._replay()

    def _replay(self) -> None:
        """Play the recorded step with the inputs that it has."""
        assert self.replay is not None
        self.replay()
        _of_thread.last = weakref.ref(self)

    def _take(self, inputs: dict[str, Any], tokens: int) -> None:
        """Copy the inputs of a step after so many tokens to where the recorded one reads them."""
        pairs = zip(_flat(self.inputs).values(), _flat(inputs).values(), strict=True)
        tensors = [(old, new) for old, new in pairs if isinstance(new, Tensor) and new is not old]
        places = [old if old.shape == new.shape else old[:, : new.shape[1]] for old, new in tensors]
        torch._foreach_copy_(places, [new for _, new in tensors])  # in one launch if they are of one type
        if self.place is not None:
            self.place.fill_(tokens)

    def expect(self, prepare: Callable[..., dict[str, Any]], arguments: dict[str, Any], given: dict[str, Any]) -> None:
        """Make and take the inputs of the next step but its token, while the device works on the one that was played.

        When that one is done the loop reads whether it was the last, and the device waits for the host until the next
        one is launched: what is done here need not be done then.

        Args:
            prepare: `prepare_inputs_for_generation` of transformers.
            arguments: what it will get for the next step, by name, beside the token ids.
            given: what others may hold, by name: a tensor of these may still be changed in place, and if the next step
                gets one its inputs are made when it is there.
        """
        ids, cache = self.inputs["input_ids"], self.layout[0]
        inputs = prepare(ids, **arguments)
        added = {name: value for name, value in self.inputs.items() if name not in inputs}  # by the loop
        held, taken = ({id(one) for one in _flat(some).values() if isinstance(one, Tensor)} for some in (given, inputs))
        if held.isdisjoint(taken) and self._layout(inputs | added, cache) == self.layout and self._has_memory(cache):
            self._take(inputs | added | {"input_ids": ids}, cache.get_seq_length())
            self.expected = Expected(dict(arguments), inputs, added)

    def expected_inputs(self, input_ids: Tensor, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Return the inputs of the expected step, or `None` if these are not its arguments.

        Args:
            input_ids: `[B, T]`, of which a step takes the last column.
            arguments: as in `expect`.
        """
        expected = self.expected
        if expected is None or not _are_same(arguments, expected.arguments):
            return None
        return expected.inputs | {"input_ids": input_ids[:, -1:]}

    def _play_expected(self, inputs: dict[str, Any], expected: Expected) -> bool:
        """Play the recorded step if these are the inputs of the expected one, of which it has all but the token."""
        ids, cache = self.inputs["input_ids"], self.layout[0]
        others = expected.inputs | expected.added | {"input_ids": inputs.get("input_ids")}
        if not _are_same(inputs, others) or inputs["input_ids"].shape != ids.shape:
            return False
        if self._adapters() != self.layout[-1] or not self._has_memory(cache):
            return False
        tokens = cache.get_seq_length()
        ids.copy_(inputs["input_ids"])
        self._replay()
        _note_tokens(cache, tokens + 1)
        return True

    def _has_memory(self, cache: Any) -> bool:
        """Tell whether the layers of the cache write to what they wrote to when the step was recorded."""
        memory = [layer.step_memory() for layer in cache.layers]
        return len(memory) == len(self.memory) and all(map(is_, memory, self.memory))

    def _record(self, inputs: dict[str, Any], cache: Any) -> bool:
        """Record the step without taking it; return False, with nothing changed, if it cannot be recorded."""
        layers, device = cache.layers, inputs["input_ids"].device
        tokens = cache.get_seq_length()
        self.inputs = _cloned(inputs)
        grows, is_first = not cache.is_compileable, self.place is None
        self.place = torch.full((1,), tokens, device=device) if grows else None
        mask, memory = inputs.get("attention_mask"), self.memory[0]
        if grows and mask is not None and memory is not None:  # it has a column for every token that there is room for
            self.inputs["attention_mask"] = F.pad(mask, (0, memory.shape[2] - mask.shape[1]))

        sees_room = mask is None and any([getattr(layer, "is_dense", False) for layer in layers])

        def step() -> Any:
            inputs = self.inputs
            if sees_room and self.place is not None and memory is not None:
                seen = torch.arange(memory.shape[2], device=device) <= self.place
                inputs = inputs | {"attention_mask": seen.long().expand(len(inputs["input_ids"]), -1)}
            for layer in layers if grows else ():
                layer.write_at(self.place)
            try:
                return (self.model if self.compiled is None else self.compiled)(**inputs)
            finally:
                for layer in layers if grows else ():
                    layer.write_at(None)

        try:
            if grows and is_first:
                step()  # no step before it was of this kind: it compiles kernels
            self.output, self.replay = record(step, device)
        except RuntimeError:  # it waits for the device, or calls what cannot be recorded
            self.is_refused = True
        _note_tokens(cache, tokens)
        if not self.is_refused and any(not isinstance(value, Tensor | Cache) for value in self.output.values()):
            self.is_refused = True
        if self.is_refused:
            self.inputs, self.output, self.replay = {}, None, None
        return not self.is_refused


def record(call: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[Any, Callable[[], None]]:
    """Record what a call launches, without running it; return what it returned, and what plays it.

    Args:
        call: what to record.
        device: the GPU that it runs on.
        pool: the memory of recordings that are never played at a time with this one, by
            `torch.cuda.graph_pool_handle`; `None` for one of its own.

    Raises:
        RuntimeError: the call did what cannot be recorded.
    """
    with _stream_lock:
        graph, stream = torch.cuda.CUDAGraph(), recording_stream(device)
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        stream.wait_stream(torch.cuda.current_stream(device))
        collects = gc.isenabled()
        gc.disable()  # memory of the device must not be given back meanwhile
        try:
            with torch.cuda.stream(stream):
                # Other threads, such as those of a streamer, may use the device meanwhile.
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    output = call()
                finally:
                    try:
                        graph.capture_end()
                    except RuntimeError:
                        _forget_recording(device, pool)
                        raise
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream(device).wait_stream(stream)
        return output, graph.replay


def run_beside(call: Callable[[], Any], device: torch.device) -> None:
    """Run a call on the stream on which it will be recorded, between what runs on the current one."""
    if device.type != "cuda":
        call()
        return
    with _stream_lock:
        stream, current = recording_stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                call()
        finally:
            current.wait_stream(stream)


def _forget_recording(device: torch.device, pool: Any) -> None:
    """Undo what `capture_end` of torch 2.11 leaves behind where it fails.

    The random generator of the device would refuse to draw, and the memory of the recording would never be given back.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
    with suppress(RuntimeError):  # of a version that ends this itself
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which calls are recorded: one for all, for libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


def _note_tokens(cache: Any, tokens: int) -> None:
    """Tell every layer of a cache how many tokens there are."""
    for layer in cache.layers:
        layer.note_tokens(tokens)


def _layout_of(inputs: dict[str, Any], cache: Any) -> tuple[Any, ...] | None:
    """Return what must be the same for a replay; `None` for what is not a step of constant shape."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 1 or not is_on_gpu(ids):
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type) or cache.offloading:
        return None
    if inputs.get("output_hidden_states") or inputs.get("output_attentions"):
        return None
    if not all([hasattr(layer, "note_tokens") and layer.is_initialized for layer in cache.layers]):
        return None
    layout: list[Any] = [cache]
    columns = None if cache.is_compileable else (len(ids), cache.get_seq_length() + 1)
    for name, value in _flat(inputs).items():
        if name == "attention_mask" and isinstance(value, Tensor) and value.shape == columns:
            layout.append((name, value.dtype, value.device))  # it grows with the text
        elif isinstance(value, Tensor):
            layout.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, _PLAIN):
            layout.append((name, value))
        elif value is not cache:
            return None
    return tuple(layout)


def _are_same(values: dict[str, Any], others: dict[str, Any]) -> bool:
    """Tell whether two dictionaries hold the same objects by the same names."""
    return values.keys() == others.keys() and all([value is others[name] for name, value in values.items()])


def _flat(inputs: dict[str, Any]) -> dict[Any, Any]:
    """Return inputs by name, and those in a dictionary, such as masks for each kind of layer, by two names."""
    flat: dict[Any, Any] = {}
    for name, value in inputs.items():
        flat |= {(name, key): inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _cloned(value: Any) -> Any:
    """Return a tensor cloned, a dictionary with its tensors cloned, and all else as it is."""
    if isinstance(value, dict):
        return {name: _cloned(inner) for name, inner in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that this process could still allocate."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _is_recordable(model: nn.Module) -> bool:
    """Tell whether a step returns logits alone, and all it does is on one device."""
    config: Any = model.config
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return False
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return len(devices) == 1 and calls_nothing_else(model)


def calls_nothing_else(model: nn.Module) -> bool:
    """Tell whether a forward calls what a recording repeats: no hooks of others, no replaced forward, no dropout.

    The hooks of transformers that collect hidden states are no hindrance: what they collect is an output of the forward
    that was asked for it, and otherwise they do nothing. They stay in a model that was asked once.
    """
    if hooks_of_all_modules._global_forward_hooks or hooks_of_all_modules._global_forward_pre_hooks or model.training:
        return False
    modules = list(model.modules())
    ours = {hook.id for module in modules for hook in getattr(module, "hooks", ()) if hasattr(hook, "id")}
    return not any(
        "forward" in vars(module)
        or not ours.issuperset(module._forward_pre_hooks)
        or not all([number in ours or collects_states(hook) for number, hook in module._forward_hooks.items()])
        for module in modules
    )


def collects_states(hook: Any) -> bool:
    """Tell whether a hook is the one with which transformers collects hidden states and attentions."""
    return getattr(hook, "__module__", None) == _COLLECTING
