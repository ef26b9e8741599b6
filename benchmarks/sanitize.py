"""Call the Triton kernels on odd sizes, for NVIDIA's compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py

Without torch's cache of memory each tensor is an allocation of its own, behind whose end nothing may be read. No length
is a multiple of a tile. Each case runs on its own, so that a failure names it; at the end stand the kernels that were
compiled. With `--only` some cases run. It measures nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from triton import knobs

from hf_sparse import SparsefinderConfig, SparseKConfig
from hf_sparse.methods.sparsefinder import fit_predictors
from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.entmax import entmax_attention, pooled_tiles, support
from hf_sparse.ops.tiles import Tiles
from hf_sparse.patches import sparse_layers_in_use

DEVICE = "cuda"
CASES: dict[str, Callable[[], Any]] = {}


def case(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    CASES[name] = lambda: function(*arguments, **options)


def draw(heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype, batch: int) -> list[Tensor]:
    """Return query, key and value, which want a gradient."""
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, *s, dim, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


def lists(heads: int, keys: int, size: int, rows: int, batch: int) -> Tiles:
    """Return ascending lists of about half of the tiles up to the one of the query tile, filled up with -1."""
    tiles, query_tiles = -(-keys // size), -(-keys // rows)
    own = torch.arange(query_tiles, device=DEVICE) * rows // size
    listed = torch.rand(batch, heads, query_tiles, tiles, device=DEVICE) < 0.5
    number = torch.arange(tiles, device=DEVICE)
    listed = (listed | (number == own[:, None])) & (number <= own[:, None])
    index = torch.where(listed, number, tiles).sort(-1).values
    return Tiles(index.masked_fill(index == tiles, -1), size, rows)


def entmax(
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    alpha: Any = 1.5,
    causal: bool = True,
    padded: bool = False,
    tiles: tuple[int, int] | None = None,
) -> None:
    """Run entmax over all keys or listed tiles, forward and backward."""
    batch, heads, kv_heads = 2, 6, 2
    inputs = draw(heads, kv_heads, queries, keys, dim, dtype, batch)
    scaling = torch.full((heads,), 0.3, device=DEVICE, requires_grad=True)
    if alpha == "heads":
        alpha = torch.linspace(1.2, 1.9, heads, device=DEVICE).requires_grad_()
    valid = None
    if padded:
        position = torch.arange(keys, device=DEVICE)
        valid = torch.stack([position >= keys // 3, position % 3 > 0])
    options: dict[str, Any] = {"alpha": alpha, "scaling": scaling, "causal": causal, "valid": valid}
    if tiles:
        options["tiles"] = lists(heads, keys, *tiles, batch)
    output = entmax_attention(*inputs, **options)
    output.float().square().sum().backward()
    assert torch.isfinite(output).all()
    with torch.no_grad():
        entmax_attention(*inputs, **options)


def step(index: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    """Run a decoding step over all keys, or over a list of tiles of 8 keys."""
    inputs = [tensor.detach() for tensor in draw(6, 2, 1, 331, 64, dtype, 2)]
    tiles = None
    if index:
        number = torch.rand(2, 6, 1, 42, device=DEVICE).argsort(-1)[..., :19].sort(-1).values
        tiles = Tiles(number, 8, 1)
    with torch.no_grad():
        entmax_attention(*inputs, alpha=1.5, scaling=0.3, causal=True, tiles=tiles)


def rows() -> None:
    """Find supports, and list tiles by mean keys."""
    query, key, _ = (tensor.detach() for tensor in draw(6, 2, 333, 333, 40, torch.float32, 2))
    wanted = torch.arange(0, 333, 7, device=DEVICE)
    support(query, key, rows=wanted, alpha=1.5, scaling=0.3, causal=True)
    for size, number in ((64, 64), (32, 16)):
        options: dict[str, Any] = {"size": size, "rows": number, "choices": 3, "pool": 8, "window": 9}
        pooled_tiles(query, key, scaling=0.3, causal=True, **options)


def sparsek(gates: Any, causal: bool, dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Run SparseK's attention, forward and backward."""
    query, key, value = draw(6, 2, 333, 333, dim, dtype, 2)
    scores = torch.randn(2, 2, 333, device=DEVICE, requires_grad=True)
    options: dict[str, Any] = {"k": 21, "window": 17, "sinks": 3, "gates": gates, "causal": causal}
    sparsek_attention(query, key, value, scores, implementation="triton", **options).float().square().sum().backward()


def model(config: Any, length: int) -> None:
    """Train and generate with a small patched model."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    base = LlamaConfig(**shape, intermediate_size=64, vocab_size=97)
    patched: Any = get_peft_model(AutoModelForCausalLM.from_config(base, dtype=torch.bfloat16), config).to(DEVICE)
    ids = torch.randint(97, (2, length), device=DEVICE)
    if isinstance(config, SparsefinderConfig) and config.predictor == "clustering":
        layers: Any = sparse_layers_in_use(patched)
        fit_predictors(layers, lambda: patched(ids, use_cache=False))
    patched.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    # Without torch's cache of memory nothing can be recorded: all steps run.
    patched.eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, disable_compile=True)


SINGLE = torch.float32
case("entmax 333", entmax, 333, 333, 64)
case("entmax, fewer queries, sparsemax", entmax, 77, 331, 40, SINGLE, alpha=2.0)
case("entmax, alphas, padding", entmax, 333, 333, 64, alpha="heads", padded=True)
case("entmax, both directions, size 128", entmax, 259, 259, 128, causal=False, padded=True)
case("entmax, long", entmax, 2059, 2059, 64)
case("lists of queries", entmax, 149, 149, 64, tiles=(8, 1))
case("lists of tiles of 16", entmax, 333, 333, 64, tiles=(16, 16))
case("lists of tiles of 64, alphas, padding", entmax, 333, 333, 40, SINGLE, alpha="heads", tiles=(64, 64), padded=True)
case("a step", step, False)
case("a step over lists", step, True)
case("supports and lists by mean keys", rows)
case("SparseK, hard", sparsek, "hard", True, 64)
case("SparseK, soft", sparsek, "soft", True, 40)
case("SparseK, both directions", sparsek, "soft", False, 64)
case("model of SparseK", model, SparseKConfig(k=11, window=7, sinks=2, learn_slope=True), 67)
case("model of Sparsefinder", model, SparsefinderConfig(tile=8, query_tile=1, tiles_per_query=3, window=7), 67)
case("model of Sparsefinder, all keys", model, SparsefinderConfig(predictor="full"), 67)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="cases to run")
    parser.add_argument("--seconds", type=float, default=600.0, help="after so many, no further case begins")
    options = parser.parse_args()
    compiled: set[str] = set()
    knobs.compilation.listener = lambda *, metadata, **_: compiled.add(metadata["name"])
    failed, begin = [], time.perf_counter()
    for name in options.only or CASES:
        if time.perf_counter() - begin > options.seconds:
            print(f"not run: {name}", flush=True)
            continue
        torch.manual_seed(0)
        try:
            CASES[name]()
            torch.cuda.synchronize()
            print(f"{time.perf_counter() - begin:6.1f} s  {name}", flush=True)
        except Exception as error:
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
    print(f"{len(compiled)} kernels: {' '.join(sorted(compiled))}", flush=True)
    if failed:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    main()
