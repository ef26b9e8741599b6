"""Run a function of kernels again by its launches alone, for tensors of the same layout.

On short texts a call of several kernels takes longer in Python than on the GPU: each launch asks Triton for its binary
by the values of forty arguments, and each buffer is an allocation of its own. All of that depends on the layout of the
tensors alone. So the first call of a layout notes which binaries were launched with which arguments, and later ones
launch them directly: buffers that nobody gets to see share one allocation, and addresses are sums.

A function that can run again allocates by `empty`, `empty_like` and `zeros`, launches by `launch.launch`, calls nothing
else that computes, and returns tensors that it has allocated.
"""

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hf_sparse.ops.stacked import ALIGNMENT

_MOST_PROGRAMS = 512  # that are remembered; one has some kilobytes
_DIRECT = "3.6."  # the version of Triton whose launcher for CUDA takes the arguments of `direct_launch`

_programs: dict[Hashable, "Program | None"] = {}


class _State(threading.local):
    recorder: "_Recorder | None" = None


_state = _State()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a contiguous tensor that a kernel will write."""
    return _noted(torch.empty(tuple(shape), dtype=dtype, device=device), False)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate as `torch.empty_like`, with the strides of the tensor."""
    return _noted(torch.empty_like(tensor, dtype=dtype), False)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a contiguous tensor of zeros."""
    return _noted(torch.zeros(tuple(shape), dtype=dtype, device=device), True)


def note_launch(kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: Any, constants: dict[str, Any]) -> None:
    """Note a launch, if this thread records."""
    if _state.recorder is not None:
        _state.recorder.launches.append((kernel, compiled, grid, arguments, constants))


def replayed(
    function: Callable[..., tuple[Tensor | None, ...]], tensors: tuple[Tensor | None, ...], *settings: Hashable
) -> tuple[Tensor | None, ...]:
    """Return `function(*tensors, *settings)`, by its launches alone if it ran before with this layout and settings.

    Args:
        function: as the docstring of this module says; what it launches depends on `settings` and on the shapes,
            strides, dtypes and 16-byte alignment of the tensors.
        tensors: on CUDA's current device; elsewhere the function is called.
        *settings: its other arguments.
    """
    first = tensors[0]
    # What runs within another one is noted there.
    if first is None or not first.is_cuda or _state.recorder is not None:
        return function(*tensors, *settings)
    key = _key(function, tensors, settings)
    if key in _programs:
        program = _programs[key]
        return function(*tensors, *settings) if program is None else program.run(tensors)
    recorder = _state.recorder = _Recorder(tensors)
    try:
        results = function(*tensors, *settings)
    finally:
        _state.recorder = None
    if len(_programs) >= _MOST_PROGRAMS:
        _programs.pop(next(iter(_programs)), None)
    _programs[key] = recorder.program(results, first.device)
    return results


def program_of(
    function: Callable[..., tuple[Tensor | None, ...]], tensors: tuple[Tensor | None, ...], *settings: Hashable
) -> "Program | None":
    """Return what `replayed(function, tensors, *settings)` noted, to be run without a look at the layout.

    Returns:
        `None` if nothing was noted, or if the launches are for tensors whose addresses are not multiples of 16.
    """
    if any(tensor is not None and tensor.data_ptr() % 16 for tensor in tensors):
        return None
    return _programs.get(_key(function, tensors, settings))


def _key(function: Any, tensors: tuple[Tensor | None, ...], settings: tuple[Hashable, ...]) -> Hashable:
    """Return all that the launches of a function depend on."""
    layouts = [
        None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16)
        for tensor in tensors
    ]
    # Launches of a call in which two inputs are one tensor would read the same one in all later calls.
    same: tuple[int, ...] = ()
    given = [id(tensor) for tensor in tensors if tensor is not None]
    if len(set(given)) < len(given):
        same = tuple([next(i for i, other in enumerate(tensors) if other is tensor) for tensor in tensors])
    assert tensors[0] is not None
    return (function, tensors[0].device.index, settings, same, *layouts)


def _noted(tensor: Tensor, zero: bool) -> Tensor:
    if _state.recorder is not None:
        _state.recorder.buffers.append((tensor, zero))
    return tensor


class _Made(NamedTuple):
    """Describe a tensor of its own that a call allocates."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    zero: bool


class _Recorder:
    """Note what a function allocates and launches."""

    def __init__(self, inputs: tuple[Tensor | None, ...]) -> None:
        self.inputs = inputs
        self.buffers: list[tuple[Tensor, bool]] = []
        self.launches: list[tuple[Any, ...]] = []

    def program(self, results: tuple[Tensor | None, ...], device: torch.device) -> "Program | None":
        """Return the program of the launches; `None` if they read or the function returned what is not known."""
        made: list[_Made] = []
        place: dict[int, tuple[int, int]] = {}  # of each buffer, by its storage: number of its base, offset
        number_of: dict[int, int] = {}  # of each result, by its identity
        returned = {id(result) for result in results if result is not None}
        count, used = len(self.inputs), 0
        for tensor, zero in self.buffers:
            address = tensor.untyped_storage().data_ptr()
            if zero or id(tensor) in returned:
                number_of[id(tensor)] = len(made)
                place[address] = (count + 1 + len(made), 0)
                made.append(_Made(tuple(tensor.shape), tensor.stride(), tensor.dtype, zero))
            elif tensor.numel():
                place[address] = (count, used)
                used += math.ceil(tensor.untyped_storage().nbytes() / ALIGNMENT) * ALIGNMENT
        if not returned <= number_of.keys():
            return None
        steps = []
        for kernel, compiled, grid, arguments, constants in self.launches:
            names = kernel.arg_names[len(arguments) :]
            template = [*arguments, *(constants[name] for name in names)]
            pointers = []
            for index, value in enumerate(template):
                if isinstance(value, Tensor):
                    base = self._base(value, place)
                    if base is None:
                        return None
                    pointers.append((index, *base))
                    template[index] = 0
            launch, setting = direct_launch(compiled)
            steps.append((launch, (*grid, 1, 1)[:3], setting, template, tuple(pointers)))
        order = tuple(None if result is None else number_of[id(result)] for result in results)
        return Program(device, used, tuple(made), order, tuple(steps))

    def _base(self, value: Tensor, place: dict[int, tuple[int, int]]) -> tuple[int, int] | None:
        """Return where an argument lies: the number of a base, inputs first, and its offset in bytes."""
        for number, tensor in enumerate(self.inputs):
            if tensor is value:
                return number, 0
        if not value.numel():
            return len(self.inputs), 0  # never read
        storage = value.untyped_storage().data_ptr()
        if storage in place:
            number, offset = place[storage]
            return number, offset + value.data_ptr() - storage
        return None


def direct_launch(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return what launches a binary, and what it takes between the stream and the kernel's arguments.

    It is called with the three numbers of a grid, the stream, these, and the arguments, of which addresses are numbers.
    That is the function which Triton's launcher calls in the end. No hooks of a profiler are called. A binary that
    needs scratch memory of its own, or is of another backend or version of Triton, goes through the launcher.
    """
    launcher: Any = getattr(compiled, "run", None)
    sizes = [getattr(launcher, f"{name}_scratch_size", 1) for name in ("global", "profile")]
    names = ("launch", "launch_cooperative_grid", "launch_pdl")
    known = triton.__version__.startswith(_DIRECT) and all(hasattr(launcher, name) for name in names)
    if any(sizes) or not known:
        return lambda x, y, z, stream, *arguments: compiled[x, y, z](*arguments, stream=stream), ()
    after = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None)
    return launcher.launch, (*after, compiled.packed_metadata, None, None, None)


class Program:
    """Hold the launches of a function for one layout of its tensors.

    Bases, to whose addresses offsets are added, are the inputs, the memory of all other buffers, and what is made.
    A run puts the addresses, each once, and all constants into one list, from which a launch picks its arguments.

    Args:
        device: of the tensors.
        used: bytes of the buffers that nobody gets to see.
        made: the tensors to allocate.
        order: for each result the number of the one that it is.
        steps: for each launch the function, the grid, what stands between the stream and the arguments, the arguments,
            and which of these are addresses: position, number of the base, offset.
    """

    def __init__(
        self,
        device: torch.device,
        used: int,
        made: tuple[_Made, ...],
        order: tuple[int | None, ...],
        steps: tuple[tuple[Any, ...], ...],
    ) -> None:
        self.device, self.used, self.made, self.order = device, used, made, order
        constants: list[Any] = []
        numbers: dict[tuple[int, int], int] = {}  # of addresses
        picked: list[tuple[Any, list[tuple[str, int]]]] = []
        for launch, grid, setting, template, pointers in steps:
            of_base = {index: (base, offset) for index, base, offset in pointers}
            picks = []
            for index, value in enumerate((*grid, None, *setting, *template)):
                argument = index - len(grid) - 1 - len(setting)
                if index == len(grid):
                    picks.append(("stream", 0))
                elif argument in of_base:
                    picks.append(("address", numbers.setdefault(of_base[argument], len(numbers))))
                else:
                    picks.append(("constant", len(constants)))
                    constants.append(value)
            picked.append((launch, picks))
        begin = {"stream": 0, "address": 1, "constant": 1 + len(numbers)}
        self.addresses, self.constants = tuple(numbers), constants
        self.launches = [
            (launch, itemgetter(*[begin[kind] + number for kind, number in picks])) for launch, picks in picked
        ]

    def run(self, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Launch all for these tensors, and return the results."""
        return self.launch([0 if tensor is None else tensor.data_ptr() for tensor in tensors], self.memory())

    def memory(self) -> Tensor | None:
        """Allocate what the launches of a run use and nobody gets to see; runs one after another can share it."""
        return torch.empty(self.used, dtype=torch.uint8, device=self.device) if self.used else None

    def launch(self, bases: list[int], memory: Tensor | None) -> tuple[Tensor | None, ...]:
        """Launch all, and return the results.

        Args:
            bases: the addresses of the tensors, 0 for `None`; the list is used up.
            memory: see `memory`.
        """
        device = self.device
        bases.append(0 if memory is None else memory.data_ptr())
        made = []
        for shape, stride, dtype, zero in self.made:
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            made.append(tensor.zero_() if zero else tensor)
            bases.append(tensor.data_ptr())
        values = [torch._C._cuda_getCurrentRawStream(device.index)]
        values += [bases[base] + offset for base, offset in self.addresses]
        values += self.constants
        for launch, arguments in self.launches:
            launch(*arguments(values))
        return tuple([None if number is None else made[number] for number in self.order])
