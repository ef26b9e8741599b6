"""Compile kernels for GPUs that the machine does not have, as far as Triton comes without NVIDIA's tools.

Triton's interpreter is Python, and runs kernels that its compiler refuses. Here every launch compiles the kernel for
its arguments and returns: from Python to MLIR, and through the passes for the GPU until shared memory is given out.
LLVM and NVIDIA's assembler, which come after that, are not asked.

Run as `python compile_kernels.py CALLS REPORT [--full]`, each time in a process of its own, which a fault of a pass may
end. CALLS is a file with `CALLS`, functions without arguments that launch kernels on tensors of the CPU, `MORE` of them
for `--full`, and `MODULES`, the modules whose kernels are to be compiled. Results of the kernels are zeros. REPORT is
the JSON that is written, see `Compiler.report`.
"""

import ast
import functools
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from triton._C.libtriton import ir, passes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource
from triton.compiler.code_generator import CodeGenerator
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

GPUS = {80: 163 << 10, 90: 227 << 10}  # compute capability -> bytes of shared memory that a program may have
PTX = 86  # the version of PTX that Triton would ask the assembler for


class Compiler:
    """Compile what is launched, once for each choice of types and constants, and note what became of it."""

    def __init__(self) -> None:
        self.backends = [nvidia.CUDABackend(GPUTarget("cuda", gpu, 32)) for gpu in GPUS]
        self.binders: dict[JITFunction, Any] = {}
        self.seen: set[Any] = set()
        self.faults: dict[str, str] = {}
        self.shared: dict[str, int] = {}
        self.statements: dict[JITFunction, set[tuple[int, int]]] = {}  # that were compiled: line and column

    def launch(self, kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Take the place of `JITFunction.run`; returns `None` as Triton's interpreter does."""
        options |= {"debug": False, "instrumentation_mode": "", "ptx_version": PTX}
        for backend in self.backends:
            if kernel not in self.binders:
                self.binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
            bound, specialization, _ = self.binders[kernel](*arguments, **options)
            key = (kernel, backend.target.arch, compute_cache_key({}, specialization, options))
            if key in self.seen:
                continue
            self.seen.add(key)
            name = f"{kernel.fn.__module__}.{kernel.fn.__name__} sm_{backend.target.arch}"
            print(name, file=sys.stderr, flush=True)  # stands last where the process ends here
            options_of, *rest = kernel._pack_args(backend, dict(options), bound, specialization, options)
            types, constants, _ = rest
            called = f"{name} {types} {constants}"
            try:
                needed = self.compile(kernel, backend, options_of, *rest)
            except Exception as error:
                self.faults[called] = "\n".join(_chain(error))
                continue
            self.shared[name] = max(needed, self.shared.get(name, 0))
            if needed > GPUS[backend.target.arch]:
                self.faults[called] = f"{needed} bytes of shared memory, of {GPUS[backend.target.arch]}"

    def compile(
        self, kernel: JITFunction, backend: Any, options: Any, signature: Any, constants: Any, attributes: Any
    ) -> int:
        """Compile a kernel; returns the bytes of shared memory that a program needs."""
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(kernel, signature, constants, attributes)
        helpers = backend.get_codegen_implementation(options), backend.get_module_map()
        module: Any = source.make_ir(backend.target, options, *helpers, context)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, source.language)
        metadata: dict[str, Any] = {}
        for stage in ("ttir", "ttgir"):
            module = stages[stage](module, metadata)
        # The next stage begins by these passes; to write LLVM's language would take as long again as all before it.
        manager = ir.pass_manager(context)
        passes.ttgpuir.add_combine_tensor_select_and_if(manager)
        passes.ttgpuir.add_allocate_warp_groups(manager)
        passes.convert.add_scf_to_cf(manager)
        passes.gluon.add_inliner(manager)
        nvidia.nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, backend.target.arch, PTX)
        manager.run(module, "share out memory")
        return module.get_int_attr("ttg.shared")

    def note_statements(self) -> None:
        """Note from now on which statements of kernels, and of functions that they call, are compiled."""
        visit = CodeGenerator.visit

        @functools.wraps(visit)
        def noting(generator: Any, node: Any) -> Any:
            if isinstance(node, ast.stmt) and hasattr(node, "lineno"):  # the front end makes some by itself
                self.statements.setdefault(generator.jit_fn, set()).add((node.lineno, node.col_offset))
            return visit(generator, node)

        CodeGenerator.visit = noting

    def report(self, modules: list[ModuleType]) -> dict[str, Any]:
        """Return what is to be known.

        Returns:
            `faults`: error by kernel and GPU; `left_out`: statements of kernels in the modules, and of functions for
            kernels, that no launch compiled, as FILE:LINE; `shared`: most bytes of shared memory by kernel and GPU;
            `compilations`: how many.
        """
        left_out = []
        for module in modules:
            for function in vars(module).values():
                if isinstance(function, JITFunction) and function.fn.__module__ == module.__name__:
                    left_out += self._left_out(function)
        return {
            "faults": self.faults, "left_out": left_out, "shared": self.shared, "compilations": len(self.seen),
        }  # fmt: skip

    def _left_out(self, function: JITFunction) -> list[str]:
        name = f"{Path(inspect.getsourcefile(function.fn) or '').name}:"
        compiled = self.statements.get(function)
        if compiled is None:
            return [f"{name}{function.starting_line_number} {function.fn.__name__}"]
        statements = [node for node in ast.walk(function.parse().body[0]) if isinstance(node, ast.stmt)]
        return [
            f"{name}{function.starting_line_number + node.lineno - 1} {function.fn.__name__}: {ast.unparse(node)}"
            for node in statements
            if (node.lineno, node.col_offset) not in compiled
        ]


def _chain(error: BaseException | None) -> list[str]:
    """Return the messages of an error and of what caused it: of a function, and of the function that calls it."""
    return [] if error is None else [f"{type(error).__name__}: {error}", *_chain(error.__cause__)]


def main(calls: str, report: str, full: str = "") -> None:
    torch.set_num_threads(1)
    compiler = Compiler()
    compiler.note_statements()
    JITFunction.run = lambda kernel, *arguments, **options: compiler.launch(kernel, *arguments, **options)
    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, _zeroed(getattr(torch, name)))
    given = _imported(calls)
    # All kernels are defined by now, and not for the interpreter. This tells the library that they run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    for call in [*given.CALLS, *(given.MORE if full else ())]:
        call()
    Path(report).write_text(json.dumps(compiler.report(given.MODULES)))


def _imported(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _zeroed(make: Any) -> Any:
    return lambda *arguments, **options: make(*arguments, **options).zero_()


if __name__ == "__main__":
    main(*sys.argv[1:])
