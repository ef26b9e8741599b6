"""Ask what a small learned memory of evicted keys and values adds to the scorers of an adapter.

    python benchmarks/learning/residual.py ADAPTER --model smollm2-135m-instruct --text TEXT --output residual.json

A key that leaves the slots of a KV head goes into a memory of fixed size, which the queries read in the same softmax as
the slots. Two kinds of memory, each as large as about 8 slots of the head:

- `features`: a state of linear attention. The weight of an evicted key for a query is the product of 16 positive
  features of both, learned (as in LESS, Dong et al. 2024).
- `latent`: 8 latent slots. An evicted key and its value join the means of the slots that a learned gate gives them to,
  and a slot weighs as its mean key says, times what it has taken in (the idea of IndexMem).

Scorers and base are frozen; the memory learns from the KL to dense attention, at 256 and 128 slots in turn. Without a
memory the adapter is measured with 8 more selected keys too, which cost the same bytes. Whole texts without a cache:
what a recurrence would hold at each query is computed from masks of length x length.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse  # noqa: F401  (PEFT then knows the adapter's type)
from hf_sparse.base_model import resolve_base
from hf_sparse.data import pack, read_text, select_chunks
from hf_sparse.environment import describe
from hf_sparse.evaluation import compare
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.evaluation.contenders import at_budget, budget_of
from hf_sparse.methods.sparsek.tokens import token_index
from hf_sparse.ops.selection.thresholds import rank_scores
from hf_sparse.patches import sparse_layers

FEATURES, LATENT = 16, 8  # 16 x (D + 1) numbers and 8 x (2 D + 1) of them: 8 slots of 2 D
Read = tuple[Tensor, Tensor]


class Features(nn.Module):
    """Hold the features of one layer; a memory is the sums over evicted keys of feature x value, and of feature."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(2, heads, dim, FEATURES) * 0.1 / dim**0.5)
        self.offset = nn.Parameter(torch.zeros(2, heads, 1, FEATURES))
        self.is_new = True

    def start(self, level: Tensor) -> None:
        """Begin with the same weight for all keys: that of the mean logit `[Hkv]` of evicted ones."""
        with torch.no_grad():
            self.offset.add_((level - math.log(FEATURES))[:, None, None] / 2)

    def read(self, query: Tensor, key: Tensor, value: Tensor, evicted: Tensor, most: Tensor, scaling: float) -> Read:
        """Return the numerator `[B, H, G, T, D]` and the denominator of what evicted keys add to each query.

        `most` `[B, H, G, T, 1]` is taken off all logits.
        """
        of_query = torch.einsum("bhgtd,hdf->bhgtf", query, self.directions[0]) + self.offset[0, :, None]
        of_key = torch.einsum("bhtd,hdf->bhtf", key, self.directions[1]) + self.offset[1]
        of_query, of_key = (of_query - most).clamp(max=20).exp(), of_key.clamp(max=20).exp()
        weight = torch.einsum("bhgtf,bhjf->bhgtj", of_query, of_key) * evicted[:, :, None]
        return weight @ value[:, :, None], weight.sum(-1, keepdim=True)


class Latent(nn.Module):
    """Hold the gates of the latent slots of one layer."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(heads, dim, LATENT) / dim**0.5)
        self.weight = nn.Parameter(torch.zeros(heads, 1, LATENT))  # added to the log of what a slot has taken in
        self.is_new = True

    def start(self, level: Tensor) -> None:
        """Begin as it is."""

    def read(self, query: Tensor, key: Tensor, value: Tensor, evicted: Tensor, most: Tensor, scaling: float) -> Read:
        """Return the numerator and the denominator of what the latent slots add to each query, see `Features`."""
        batch, heads, length, dim = key.shape
        gates = torch.einsum("bhtd,hdm->bhtm", key, self.gate).softmax(-1)
        pairs = torch.cat([key, value, torch.ones_like(key[..., :1])], -1)
        sums = evicted @ (gates[..., None] * pairs[..., None, :]).flatten(3)  # of each query
        sums = sums.view(batch, heads, length, LATENT, 2 * dim + 1)
        count = sums[..., -1].clamp(min=1e-6)
        keys, values = (sums[..., :-1] / count[..., None]).split(dim, -1)
        logits = torch.einsum("bhgtd,bhtmd->bhgtm", query, keys) * scaling + (count.log() + self.weight)[:, :, None]
        weight = (logits - most).clamp(max=20).exp() * (sums[..., -1] > 1e-6)[:, :, None]
        return torch.einsum("bhgtm,bhtmd->bhgtd", weight, values), weight.sum(-1, keepdim=True)


def masks(scores: Tensor, budget: Budget) -> tuple[Tensor, Tensor]:
    """Return which keys the slots hold for each query, and which were evicted, `[B, Hkv, T, T]`; scores are frozen."""
    _, heads, length = scores.shape
    step = torch.arange(length, device=scores.device)
    age, is_sink = step[:, None] - step, step < budget.sinks
    rank = rank_scores(scores)
    better = (rank[..., None] > rank[..., None, :]) & ~is_sink[:, None]
    number = F.pad(better.cumsum(-2, dtype=torch.int32), (0, 0, budget.window, 0))[
        ..., :length, :
    ]  # among the old ones
    k = torch.tensor(budget.per_head(heads), device=scores.device)[:, None, None]
    recent, old = (age >= 0) & (age < budget.window), (age >= budget.window) & ~is_sink
    kept = recent | ((age >= 0) & is_sink) | (old & (number < k))
    return kept, old & ~kept


def attend(
    memory: Any, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, budget: Budget, scaling: float
) -> Any:
    """Return the attention `[B, Hq, T, D]` to the slots and to a memory, if there is one, of what left them."""
    batch, heads, length, dim = key.shape
    q, k, v = query.float().view(batch, heads, -1, length, dim), key.float(), value.float()
    kept, evicted = masks(scores, budget)
    logits = (q @ k[:, :, None].transpose(-1, -2)) * scaling
    if memory is not None and memory.is_new and bool(evicted.any()):
        with torch.no_grad():
            among = evicted[:, :, None].expand_as(logits)
            memory.start(torch.stack([logits[:, n][among[:, n]].mean() for n in range(heads)]).nan_to_num())
        memory.is_new = False
    logits = logits.masked_fill(~kept[:, :, None], -torch.inf)
    most = logits.amax(-1, keepdim=True).detach()
    weight = (logits - most).exp()
    above, below = weight @ v[:, :, None], weight.sum(-1, keepdim=True)
    if memory is not None:
        more, mass = memory.read(q, k, v, evicted.float(), most, scaling)
        above, below = above + more, below + mass
    output: Tensor = (above / below).view(query.shape).to(query.dtype)
    return output


@contextmanager
def remembering(model: Any, kind: type[nn.Module] | None) -> Iterator[list[nn.Parameter]]:
    """Let all layers attend with a memory of a kind for the length of a `with` block, and yield its parameters."""
    layers: Any = sparse_layers(model)
    memories: Any = []
    for layer in layers:
        dim = model.config.hidden_size // model.config.num_attention_heads
        memory = None if kind is None else kind(layer.num_key_value_heads, dim)
        memories += [] if memory is None else [memory.to(next(model.parameters()).device)]
        _replace(layer, memory)
    try:
        yield [parameter for memory in memories for parameter in memory.parameters()]
    finally:
        for layer in layers:
            del layer._attend


def _replace(layer: Any, memory: Any) -> None:
    def attend_remembering(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, *others: Any) -> Tensor:
        with torch.no_grad():
            index = token_index(None, None, len(query), query.shape[2], query.device)
            scores = layer.score(hidden, index)
        arguments = (memory, query, key, value, scores, layer.budget, others[-1])
        if torch.is_grad_enabled():
            output: Tensor = checkpoint(attend, *arguments, use_reentrant=False)
            return output
        return attend(*arguments)

    layer._attend = attend_remembering


def train(model: Any, parameters: list[nn.Parameter], chunks: Tensor, budgets: list[Budget], options: Any) -> Any:
    """Train a memory until its time is over, and return how."""
    torch.set_float32_matmul_precision("high")
    order = torch.randperm(len(chunks) * 100, generator=torch.Generator().manual_seed(options.seed)) % len(chunks)
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    losses: list[float] = []
    began, done = time.perf_counter(), 0.0
    with torch.no_grad():  # `start` of each memory
        model(chunks[order[:1]].to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
    while done < 1 and len(losses) < options.steps:
        chunk = chunks[order[len(losses)]][None].to(next(model.parameters()).device)
        with torch.no_grad(), model.disable_adapter():
            teacher = model(chunk, use_cache=False).logits.float().log_softmax(-1)
        with at_budget(model, budgets[len(losses) % len(budgets)]):
            student = model(chunk, use_cache=False).logits.float().log_softmax(-1)
            loss = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        done = max(len(losses) / options.steps, (time.perf_counter() - began) / options.seconds)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, (len(losses) + 1) / 10) * max(0.02, 1 - done)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.set_float32_matmul_precision("highest")
    last = [sum(losses[-20:][n :: len(budgets)]) / len(losses[-20:][n :: len(budgets)]) for n in range(len(budgets))]
    return {
        "steps": len(losses),
        "seconds": time.perf_counter() - began,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "last_losses": last,
    }


def main() -> None:
    options = _arguments()
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(options.model))
    base = AutoModelForCausalLM.from_pretrained(resolve_base(options.model), dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base.to(options.device), options.adapter).eval()
    model.requires_grad_(False)
    chunks = pack(tokenizer, read_text(options.text), options.length)
    training, held_out = select_chunks(chunks, options.train), select_chunks(chunks, options.held_out)
    whole: Any = budget_of(model)
    budgets = [whole if n == whole.slots else whole.resized(n) for n in options.slots]
    more = [budget._replace(k=budget.k + LATENT) for budget in budgets]
    result: dict[str, Any] = {"adapter": Path(options.adapter).name, "length": options.length, "rows": []}
    result |= {"held_out": len(held_out), "seed": options.seed, "learning_rate": options.learning_rate, **describe()}
    rows: list[Any] = [("none", None, budgets), ("none, 8 more slots", None, more)]
    rows += [("features", Features, budgets), ("latent", Latent, budgets)]
    for name, kind, measured in rows:
        torch.manual_seed(options.seed)
        with remembering(model, kind) as parameters:
            row: dict[str, Any] = {"memory": name}
            if parameters:
                row["training"] = train(model, parameters, training, budgets, options)
            with torch.no_grad():
                runs = [(budget, "learned") for budget in measured]
                losses = compare(model, held_out, runs, batch_size=options.batch_size, progress=False)
        row["quality"] = {
            str(slots): {"perplexity": losses[run].perplexity, "kl": losses[run].mean_divergence}
            for slots, run in zip(options.slots, runs, strict=True)
        }
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder of a trained SparseK adapter")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--train", default="0:110")
    parser.add_argument("--held-out", default="110:130")
    parser.add_argument("--slots", type=lambda text: [int(n) for n in text.split(",")], default=[256, 128])
    parser.add_argument("--seconds", type=float, default=30, help="of training, for each kind of memory")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--batch-size", type=int, default=2, help="of the measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
