"""Make Triton's interpreter faster: most of its time it makes the types of intermediate values anew.

What is computed stays Triton's: each of these functions asks Triton's own the first time, and remembers the answer.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


def remember_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let types of blocks with the same shape share their shape, and tensors take theirs from it."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    numpy_type, broadcast = interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
    blocks: dict[tuple[Any, ...], tuple[Any, int, str]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    numpy_types: dict[str, np.dtype[Any]] = {}

    def type_of_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape))
        if key not in blocks:
            make_type(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            make_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def type_in_numpy(tt_dtype: Any) -> np.dtype[Any]:
        name = tt_dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(tt_dtype)
        return numpy_types[name]

    def broadcast_unless_alike(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    monkeypatch.setattr(core.block_type, "__init__", type_of_block)
    monkeypatch.setattr(core.tensor, "__init__", tensor)
    monkeypatch.setattr(interpreter, "_get_np_dtype", type_in_numpy)
    monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_unless_alike)


def call_builtins_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand the semantics to an operation in one call where Triton's takes three and two dictionaries."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    def patch(owner: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
        semantic = TritonSemantic(builder)
        operation = getattr(member, "__wrapped__", member)

        def call(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return operation(*arguments, **named)

        scope.set_attr(owner, name, call)

    monkeypatch.setattr(interpreter, "_patch_attr", patch)
