"""Check the tensors of an adapter: names, shapes and dtypes as expected, and every number finite.

The same checks serve a file before anything is loaded from it, and a state dict that is saved or loaded.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from hf_sparse.errors import WeightsError

#: By the names of safetensors, the dtypes that adapters are written in.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Layout(NamedTuple):
    """Hold the shape of a tensor, and its dtype by the name of torch, or of safetensors if it is none of `DTYPES`."""

    shape: tuple[int, ...]
    dtype: str


def layouts(state: Mapping[str, Tensor]) -> dict[str, Layout]:
    """Describe the tensors of a state dict."""
    return {key: Layout(tuple(tensor.shape), _name(tensor.dtype)) for key, tensor in state.items()}


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Layout], Callable[[str], Tensor]]]:
    """Open a safetensors file: what its header says of each tensor, and a function that reads one.

    Raises:
        SafetensorError, OSError: the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        held = {}
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            dtype = part.get_dtype()
            held[key] = Layout(tuple(part.get_shape()), _name(DTYPES[dtype]) if dtype in DTYPES else dtype)
        yield held, file.get_tensor


def check_values(held: Mapping[str, Layout], read: Callable[[str], Tensor], unfitted: Collection[str] = ()) -> None:
    """Check that tensors are of a dtype that adapters are written in, and finite.

    Args:
        held: the tensors that are there.
        read: gives the tensor of a key, called once its dtype is known to be right; one on the meta device has no
            values to check.
        unfitted: names of buffers, the last part of a key, that are NaN all over until they are fitted.

    Raises:
        WeightsError: a tensor is of another dtype, or holds NaN or infinity.
    """
    right = [_name(dtype) for dtype in DTYPES.values()]
    for key, (_, dtype) in held.items():
        if dtype not in right:
            raise WeightsError(f"{key[:200]} must be of type {', '.join(right[:-1])} or {right[-1]}, got {dtype}")
    for key in held:
        tensor = read(key)
        if tensor.is_meta or bool(tensor.isfinite().all()):
            continue
        if key.rpartition(".")[2] in unfitted and bool(tensor.isnan().all()):
            continue
        raise WeightsError(f"{key[:200]} must be finite, got {'NaN' if bool(tensor.isnan().any()) else 'infinity'}")


def check_names(
    held: Mapping[str, Layout], expected: Mapping[str, tuple[int, ...]], embeddings: Mapping[str, Tensor]
) -> int | None:
    """Check that the tensors that are there are those that a model asks for, by name and shape.

    Args:
        held: the tensors that are there.
        expected: shapes of the tensors that the model asks for.
        embeddings: embeddings of the base model, see `hf_sparse.embeddings.embeddings_of`. All of them may be there
            too, a tied one under both names or one, with another number of tokens, the same for all.

    Returns:
        The number of tokens of the embeddings that are there, `None` without embeddings.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape.
    """
    tokens = None
    brought = {key: tensor for key, tensor in embeddings.items() if key in held}
    if brought and {id(tensor) for tensor in brought.values()} == {id(tensor) for tensor in embeddings.values()}:
        tokens = next((held[key].shape[0] for key in brought if held[key].shape), None)
        expected = dict(expected) | {key: (tokens, *tensor.shape[1:]) for key, tensor in brought.items()}
    faults = {
        "missing": sorted(expected.keys() - held.keys()),
        "unexpected": sorted(held.keys() - expected.keys()),
        "of another shape": [key for key, shape in expected.items() if key in held and held[key].shape != shape],
    }
    if any(faults.values()):
        raise WeightsError("; ".join(f"{kind}: {_some(keys)}" for kind, keys in faults.items() if keys))
    return tokens


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _some(keys: list[str]) -> str:
    return ", ".join(key[:200] for key in keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
