"""How fast a pool of rows decodes many requests at a time, in CUDA graphs: a decoder of the shape of Llama-3.1-8B.

    python benchmarks/serving_pool.py --output serving_pool.json

One step takes a token of every request: embedding, 32 layers with the kernel that finds its rows in the pool, the
logits, and the next token. Weights are random. So are the states, which are those of requests that have read
`--context` tokens: all rows are full, and positions lie between 0 and the context, so that a step does exactly the
work that it does after a prompt of this length. Prompts themselves are not measured. Rows are taken in a random order
from a pool with as many rows as are measured at most.

The roofline of a step adds up the weights (read once, or multiplied with at the speed of a large product, whichever
takes longer) and the rows of its requests, read once, at the bandwidth of a large copy in the same run. First, on one
layer, a graph gives what gathered rows give; without agreement nothing is measured. The JSON is written after each
number of requests.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import copy_bandwidth, current_commit  # beside this file
from torch import Tensor

from hf_sparse import SparseKConfig
from hf_sparse.atomic_files import write_json
from hf_sparse.core.layer import AttentionShape, SparseAttentionLayer
from hf_sparse.core.new_tokens import PackedTokens
from hf_sparse.core.request_state import StateRows
from hf_sparse.environment import describe
from hf_sparse.methods.sparsek import SparseKAttention, rows
from hf_sparse.serving.pool import Batch, RowPool

REPLAYS = 30
WEIGHT_NAMES = ("qkv", "o", "up", "down")


class Decoder:
    """A Llama with random weights, whose attention is that of a pool."""

    def __init__(self, args: argparse.Namespace, device: str, dtype: torch.dtype) -> None:
        self.heads, self.groups, self.dim = args.heads, args.kv_heads, args.head_dim
        hidden, width = args.hidden, (args.heads + 2 * args.kv_heads) * args.head_dim
        self.config = SparseKConfig(k=args.slots - args.window - args.sinks, window=args.window, sinks=args.sinks)

        def weights(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype) * shape[-1] ** -0.5

        self.layers = [
            {
                "qkv": weights(width, hidden),
                "o": weights(hidden, self.heads * self.dim),
                "up": weights(2 * args.intermediate, hidden),
                "down": weights(hidden, args.intermediate),
                "norms": torch.ones(2, hidden, device=device, dtype=dtype),
            }
            for _ in range(args.layers)
        ]
        self.embedding, self.head = weights(args.vocabulary, hidden), weights(args.vocabulary, hidden)
        self.attentions: list[SparseAttentionLayer] = []
        for layer in range(args.layers):
            shape = AttentionShape(hidden, self.heads, self.groups, self.dim, layer)
            attention = SparseKAttention.for_shape(shape)
            attention.add_adapter("default", self.config)
            self.attentions.append(attention.to(device).eval().requires_grad_(False))
        half = self.dim // 2
        self.frequencies = 5e5 ** (-torch.arange(half, device=device) / half)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        tensors = [self.head, *(layer[name] for layer in self.layers for name in WEIGHT_NAMES)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def weight_flops(self) -> int:
        """Floating-point operations of a token with the weights."""
        return 2 * self.weight_bytes // self.head.element_size()

    def step(self, tokens: Tensor, positions: Tensor, pool: RowPool, batch: Batch) -> Tensor:
        """The next tokens `[N]` after `tokens` `[N]`, which stand at `positions` `[N]`."""
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos().to(self.head.dtype), angles.sin().to(self.head.dtype)
        residual = F.embedding(tokens, self.embedding)
        for number, layer in enumerate(self.layers):
            states, query, key, value = before(
                residual, layer["norms"][0], layer["qkv"], cos, sin, self.heads, self.groups, self.dim
            )
            attended = pool.attend(number, batch, query, key, value, states, self.dim**-0.5)
            residual = after(residual, attended, layer["norms"][1], layer["o"], layer["up"], layer["down"])
        last = F.rms_norm(residual, residual.shape[-1:], eps=1e-5)
        return (last @ self.head.T).argmax(-1)


def _before(
    residual: Tensor, norm: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input of the attention, and queries, keys with positions, and values `[N, H, D]`."""
    states = F.rms_norm(residual, residual.shape[-1:], norm, 1e-5)
    split = (states @ qkv.T).view(len(states), heads + 2 * groups, dim)
    first, second = split[:, : heads + groups].chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return states, turned[:, :heads], turned[:, heads:], split[:, heads + groups :]


def _after(residual: Tensor, attended: Tensor, norm: Tensor, o: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The residual stream after a layer."""
    residual = residual + attended.flatten(1) @ o.T
    gate, wide = (F.rms_norm(residual, residual.shape[-1:], norm, 1e-5) @ up.T).chunk(2, -1)
    return residual + (F.silu(gate) * wide) @ down.T


before: Callable[..., Any] = _before
after: Callable[..., Any] = _after


def fill(pool: RowPool, context: int, window: int, sinks: int) -> None:
    """Fill all rows with states that texts of `context` tokens may leave."""
    for parts, states in zip(pool.state, pool.layers, strict=True):
        for part, state in zip(parts, states, strict=True):
            if part.name == "positions":
                slots = state.shape[-1]
                always = [*range(sinks), *range(context - window, context)]
                middle = torch.linspace(sinks, context - window - 1, slots - len(always)).long().tolist()
                state.copy_(torch.tensor([*always, *middle], device=state.device).expand_as(state))
            elif part.name == "seen":
                state.fill_(context)
            else:
                state.normal_()


def graph_of(run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """A CUDA graph of a function, and what it writes to."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def check(args: argparse.Namespace, device: str, dtype: torch.dtype) -> float:
    """The largest relative difference between a replayed graph and gathered rows, on one layer and other rows."""
    small = argparse.Namespace(**{**vars(args), "layers": 1, "vocabulary": 1000})
    decoder = Decoder(small, device, dtype)
    pool = RowPool(decoder.attentions, args.head_dim, 12, dtype, device)
    fill(pool, args.context, args.window, args.sinks)
    count, worst = 5, 0.0
    query, key, value = (
        torch.randn(count, heads, args.head_dim, device=device, dtype=dtype)
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    states = torch.randn(count, args.hidden, device=device, dtype=dtype)
    index = torch.arange(count, device=device)
    batch = Batch(index, count)

    def run() -> Tensor:
        return pool.attend(0, batch, query, key, value, states, args.head_dim**-0.5)

    gathered: Callable[..., Tensor] = rows.attend_steps
    graph, output = graph_of(run) if device == "cuda" else (None, run())
    for order in ([3, 1, 11, 0, 7], [0, 2, 4, 6, 8]):
        index.copy_(torch.tensor(order))
        kept = [state.clone() for state in pool.layers[0]]
        if graph is None:
            output = run()
        else:
            graph.replay()
        in_rows, rows.step_in_rows = rows.step_in_rows, lambda *arguments: None
        new = PackedTokens(query, key, value, states, args.head_dim**-0.5).first_apart(count)
        expected = gathered(decoder.attentions[0], StateRows(kept, index, index), new)
        expected = expected[:, :, 0]
        rows.step_in_rows = in_rows
        for part, ours, theirs in zip(pool.state[0], pool.layers[0], kept, strict=True):
            if part.name != "scores":
                assert torch.equal(ours, theirs), part.name
        worst = max(worst, float((output.float() - expected.float()).norm() / expected.float().norm()))
    return worst


def product_flops(device: str, dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations per second of a large product."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times = timed(lambda: a @ b, 5)
    return 2 * size**3 / statistics.median(times)


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of calls on the GPU, each by itself."""
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def attention_alone(args: argparse.Namespace, pool: RowPool, batch: Batch) -> Tensor:
    """The attention of all layers, each with the same new tokens."""
    device, dtype = pool.layers[0][-1].device, pool.layers[0][-1].dtype
    query, key, value = (
        torch.zeros(batch.steps, heads, args.head_dim, device=device, dtype=dtype)
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    states = torch.zeros(batch.steps, args.hidden, device=device, dtype=dtype)
    for layer in range(args.layers):
        output = pool.attend(layer, batch, query, key, value, states, args.head_dim**-0.5)
    return output


def measure(args: argparse.Namespace, output: Path) -> None:
    """Measure and write all numbers of requests."""
    global before, after
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    difference = check(args, device, dtype)
    print(f"a graph and gathered rows differ by {difference:.2e}", flush=True)
    if difference > 2e-2:
        raise SystemExit("the kernel and gathered rows disagree: nothing is measured")
    decoder = Decoder(args, device, dtype)
    pool = RowPool(decoder.attentions, args.head_dim, max(args.requests), dtype, device)
    fill(pool, args.context, args.window, args.sinks)
    print(f"{decoder.weight_bytes / 1e9:.1f} GB of weights, {pool.nbytes_of_row / 2**20:.1f} MiB a request", flush=True)
    if device == "cpu":
        tokens, index = torch.arange(3), torch.randperm(max(args.requests))[:3]
        decoder.step(tokens, torch.full((3,), args.context), pool, Batch(index, 3))
        print("a step ran; nothing is measured without a GPU")
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    result: dict[str, Any] = {
        "environment": describe(),
        "commit": args.commit or current_commit(),
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "commit")},
        "difference": difference,
        "weight_bytes": decoder.weight_bytes,
        "bytes_per_request": pool.nbytes_of_row,
        "gpu_bytes": memory,
        "requests_that_fit": int((0.9 * memory - decoder.weight_bytes) / pool.nbytes_of_row),
        "dense_requests_that_fit": int(
            (0.9 * memory - decoder.weight_bytes) / (4 * args.layers * args.kv_heads * args.head_dim * args.context)
        ),
        "copy_bandwidth": copy_bandwidth(device),
        "product_flops": product_flops(device, dtype),
        "steps": [],
    }
    before = torch.compile(_before, dynamic=True)
    after = torch.compile(_after, dynamic=True)
    for count in args.requests:
        index = torch.randperm(max(args.requests), device=device)[:count]
        batch = Batch(index, count)
        tokens = torch.randint(args.vocabulary, (count,), device=device)
        positions = torch.full((count,), args.context, device=device)

        def run() -> Tensor:
            following = decoder.step(tokens, positions, pool, batch)  # noqa: B023
            tokens.copy_(following)  # noqa: B023
            positions.add_(1)  # noqa: B023
            return following

        graph, _ = graph_of(run)
        times = timed(graph.replay, REPLAYS)
        attend, _ = graph_of(lambda: attention_alone(args, pool, batch))  # noqa: B023
        seconds, attention = statistics.median(times), statistics.median(timed(attend.replay, REPLAYS))
        products = max(
            decoder.weight_bytes / result["copy_bandwidth"], count * decoder.weight_flops / result["product_flops"]
        )
        slots = count * pool.nbytes_of_row / result["copy_bandwidth"]
        step = {
            "requests": count,
            "seconds": seconds,
            "tokens_per_second": count / seconds,
            "attention_seconds": attention,
            "roofline_seconds": products + slots,
            "share_of_roofline": (products + slots) / seconds,
            "share_of_roofline_of_attention": slots / attention,
            "times": times,
        }
        result["steps"].append(step)
        print(
            f"{count} requests: {1000 * seconds:.2f} ms a step, {count / seconds:.0f} tokens/s, "
            f"{step['share_of_roofline']:.0%} of the roofline; attention {1000 * attention:.2f} ms, "
            f"{step['share_of_roofline_of_attention']:.0%}",
            flush=True,
        )
        write_json(output, result)


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of a decoder, by default those of Llama-3.1-8B."""
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=128256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="of the code, where there is no git")
    parser.add_argument("--requests", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--sinks", type=int, default=4)
    add_shape_options(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        measure(args, args.output)


if __name__ == "__main__":
    main()
