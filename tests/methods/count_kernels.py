"""Count the kernels that `generate` launches on a GPU, on a machine without one: `python count_kernels.py REPORT`.

What a launch would compile is told from its arguments (`tests/ops/triton/compile_kernels.py`), and nothing is compiled
or run. Tensors on the CPU pass for tensors on a GPU. REPORT is a JSON list, an entry for each call of CALLS: what was
begun in the background, what was compiled ahead of a prompt, and what launches had to compile beside that; by kernel.
"""

import contextlib
import json
import runpy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from transformers import AutoModelForCausalLM, LlamaConfig
from triton.runtime.jit import JITFunction

Compiler: Any = runpy.run_path(str(Path(__file__).parents[1] / "ops" / "triton" / "compile_kernels.py"))["Compiler"]
#: Shares of the heads of four layers. These have 200, 200, 192 and 208 slots, and their longest heads 132, 100, 119
#: and 159: two kernels for the steps of those with unequal heads, which does not depend on the sums.
UNEQUAL = [[0.5, 1.5], [1.0, 1.0], [1.3, 0.575], [0.2, 1.925]]
#: Shares, tokens of the prompt, new tokens, whether `generate` reads it or a plain forward, and cores.
CALLS = [
    (UNEQUAL, 700, 4, True, 16),
    (UNEQUAL, 700, 1, True, 16),
    (UNEQUAL, 700, 4, False, 16),
    (None, 700, 4, True, 16),
    (UNEQUAL, 20, 4, True, 16),
    (UNEQUAL, 700, 4, True, 2),
]


class Counter(Compiler):
    """Note the kernel and the manner of each launch that needs a binary which none before it needed."""

    def __init__(self) -> None:
        super().__init__()
        del self.backends[1:]
        self.manner = threading.local()
        self.counts: dict[str, dict[str, int]] = {}

    def compile(self, kernel: Any, *arguments: Any) -> int:
        """Take the place of the compiler: count, and need no shared memory."""
        manner = getattr(self.manner, "name", "launched")
        counts = self.counts.setdefault(manner, {})
        counts[kernel.fn.__name__] = counts.get(kernel.fn.__name__, 0) + 1
        return 0

    @contextlib.contextmanager
    def noted_as(self, name: str) -> Any:
        """Note launches of this thread by another name than those of kernels that run."""
        self.manner.name = name
        try:
            yield
        finally:
            del self.manner.name


def count(shares: Any, length: int, new: int, generates: bool, cores: int) -> dict[str, dict[str, int]]:
    """Return the numbers of kernels of one call of a new model, what came first first."""
    compiler, first_calls.cores = Counter(), lambda: cores
    JITFunction.run = lambda kernel, *arguments, **options: compiler.launch(kernel, *arguments, **options)
    launch._seen.clear()

    def run_as(name: str, calls: Any) -> None:
        with compiler.noted_as(name):
            calls()

    launch._compile_launches = lambda loader, calls: run_as("ahead", calls)
    step.begin_compiling = lambda kernel, calls, device: run_as("begun", calls)

    sizes = {"hidden_size": 256, "intermediate_size": 64, "vocab_size": 64, "head_dim": 32, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    patch(model, SparseKConfig(k=64, window=32, sinks=4, head_shares=shares))
    ids = torch.zeros(1, length, dtype=torch.int64)
    if generates:
        model.generate(ids, max_new_tokens=new, do_sample=False)
    else:
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            for _ in range(new - 1):
                model(ids[:, :1], past_key_values=cache)
    assert not compiler.faults, compiler.faults
    return compiler.counts


torch.set_num_threads(1)
torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type == "cpu")
torch.cuda.current_device = lambda: None  # type: ignore[return-value]
torch.cuda.is_current_stream_capturing = lambda: False
for name in ("empty", "empty_like", "empty_strided"):  # what no kernel writes is to be the same always
    made = getattr(torch, name)
    setattr(torch, name, lambda *arguments, made=made, **options: made(*arguments, **options).zero_())

from hf_sparse import SparseKConfig, patch  # noqa: E402
from hf_sparse.methods.sparsek import first_calls  # noqa: E402
from hf_sparse.ops.selection.triton import reading, step  # noqa: E402
from hf_sparse.ops.triton import launch  # noqa: E402
from hf_sparse.patches import switch  # noqa: E402

launch._pool = lambda device: ThreadPoolExecutor(1)
triton.AsyncCompileMode = lambda *arguments, **options: contextlib.nullcontext()
reading.replayed = lambda function, tensors, *settings: function(*tensors, *settings)
# On the CPU the mask of a step that says nothing is left out.
generation_of = switch.Generation
switch.Generation = lambda layers, has_steps, is_masked: generation_of(layers, has_steps, False)
Path(sys.argv[1]).write_text(json.dumps([count(*call) for call in CALLS]))
