"""Learn how many keys each KV head selects, beside its scorer, and compare with shares by measured loss.

    python benchmarks/learning/learned_shares.py --model smollm2-135m-instruct --text wiki.test.crlf.raw --output a.json

Two ways. `budget`: the selected keys of each head are a parameter, `k` times a softmax over all heads of the model; the
threshold of SparseK moves with `k` by -1 / (number of free keys), so the budget of a head gets the mean gradient of its
free gates. `layer`: one simplex over the heads of a layer, which select `k` times their number together; the mean sums
of their gates are the shares. Both run in soft selection with every gate written out, `T x T`. The shares are frozen
then, scorers are trained with them as by the library, and measured with hard selection (`scorers.py`).
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from scorers import run  # beside this file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseKConfig
from hf_sparse.base_model import resolve_base
from hf_sparse.data import pack, read_text, select_chunks
from hf_sparse.environment import describe
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.finetune.objectives import distill
from hf_sparse.patches import sparse_layers


def gates(scores: Tensor, eligible: Tensor, k: Tensor, together: bool) -> Tensor:
    """Return the gates of SparseK `[B, H, T, T]` of scores `[B, H, T]`, with a gradient for scores and `k`.

    Args:
        scores: float32.
        eligible: `[T, T]` bool, keys that a query may select.
        k: `[H]` float32, the sum of the gates of each head, or of all heads together.
        together: whether all heads share a threshold.
    """
    z = scores[:, :, None].masked_fill(~eligible, -1e4)  # [B, H, T, T]
    axes = (1, 3) if together else (3,)
    wanted = k.sum().view(1, 1, 1, 1) if together else k.view(1, -1, 1, 1)
    with torch.no_grad():
        count = eligible.sum(-1).view(1, 1, -1, 1) * (scores.shape[1] if together else 1)
        whole = count <= wanted
        high = scores.amax(-1, keepdim=True)[..., None].expand(-1, -1, z.shape[2], 1)
        low = scores.amin(-1, keepdim=True)[..., None].expand(-1, -1, z.shape[2], 1) - 1
        if together:
            high, low = high.amax(1, keepdim=True), low.amin(1, keepdim=True)
        for _ in range(26):
            middle = (low + high) / 2
            enough = (z - middle).clamp(0, 1).sum(axes, keepdim=True) >= wanted
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        tau = low.masked_fill(whole, -1e3)
        free = ((z > tau) & (z - 1 < tau)).to(z.dtype)
        number = free.sum(axes, keepdim=True).clamp(min=1)
    moved = (free * (z - z.detach())).sum(axes, keepdim=True) - (wanted - wanted.detach())
    return (z - (tau + moved / number)).clamp(0, 1) * eligible


def attend(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, k: Tensor, settings: tuple[Any, ...]) -> Any:
    """Attend with soft gates; returns `[B, Hq, T, D]` and the mean sum of gates of each head over late queries."""
    window, sinks, scaling, together = settings
    batch, heads, length, dim = key.shape
    index = torch.arange(length, device=key.device)
    seen = index <= index[:, None]
    always = seen & ((index > index[:, None] - window) | (index < sinks))
    gate = gates(scores, seen & ~always, k, together)
    kept = gate.detach()[:, :, length // 2 :].sum(-1).mean((0, 2))
    bias = torch.where(always, 0.0, gate.clamp(min=1e-7).log()).masked_fill(~always & (gate == 0), -torch.inf)
    grouped = query.view(batch, heads, -1, length, dim)
    logits = (grouped @ key[:, :, None].transpose(-1, -2)).float() * scaling + bias[:, :, None]
    output = logits.softmax(-1).to(value.dtype) @ value[:, :, None]
    return output.view_as(query), kept


class Budgets(nn.Module):
    """Hold what decides how many keys each head selects: `[layers, heads]`, of which the softmax is taken."""

    def __init__(self, layers: int, heads: int, k: int) -> None:
        super().__init__()
        self.logits, self.k = nn.Parameter(torch.zeros(layers, heads)), k

    def shares(self) -> Tensor:
        return self.logits.numel() * self.logits.flatten().softmax(0).view_as(self.logits)


@contextmanager
def written_out(model: nn.Module, budgets: Budgets, way: str, kept: dict[int, Tensor]) -> Iterator[None]:
    """Let all layers attend by `attend` for the length of a `with` block."""
    layers: list[Any] = list(sparse_layers(model))

    def replace(number: int, layer: Any) -> None:
        budget = layer.budget

        def attend_written(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, *others: Any) -> Tensor:
            index = torch.arange(query.shape[2], device=query.device).expand(len(query), -1)
            scores = layer.score(hidden, index)
            k = budgets.k * (budgets.shares()[number] if way == "budget" else torch.ones_like(budgets.logits[number]))
            settings = budget.window, budget.sinks, others[-1], way == "layer"
            output, kept[number] = checkpoint(attend, query, key, value, scores, k, settings, use_reentrant=False)
            return output

        layer._attend, layer.recording_key = attend_written, lambda: None

    for number, layer in enumerate(layers):
        replace(number, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer._attend, layer.recording_key


def learn(base: Any, way: str, adapter: dict[str, Any], training: Tensor, arguments: argparse.Namespace) -> Any:
    """Return the shares `[layers, heads]` that were learned, and their history."""
    torch.manual_seed(0)
    model = get_peft_model(base, SparseKConfig(**adapter))
    try:
        options = {"progress": False, "cpu": arguments.device == "cpu", "divide_heads": False}
        finetune(model, training, FinetuneConfig(steps=arguments.first_steps, **options))
        layers: Any = sparse_layers(model)
        budgets = Budgets(len(layers), layers[0].num_key_value_heads, adapter["k"]).to(arguments.device)
        scorers = [p for name, p in model.named_parameters() if "sparsek_scorer" in name]
        groups = [{"params": scorers, "lr": 5e-3}]
        if way == "budget":
            groups.append({"params": [budgets.logits], "lr": arguments.rate})
        adam = torch.optim.AdamW(groups, weight_decay=0.0)
        peaks = [group["lr"] for group in adam.param_groups]
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))
        kept: dict[int, Tensor] = {}
        means: list[Tensor] = []
        history = []
        for layer in layers:
            layer.train()
        began = time.perf_counter()
        with written_out(model, budgets, way, kept):
            for step in range(arguments.steps):
                for group, peak in zip(adam.param_groups, peaks, strict=True):
                    group["lr"] = peak * min(1.0, (step + 1) / 5) * (1 - step / arguments.steps)
                chunk = training[order[step % len(order)]][None].to(arguments.device)
                loss = distill(model, chunk)
                adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(scorers, 1.0)
                adam.step()
                history.append(float(loss.detach()))
                if step >= arguments.steps // 2:
                    means.append(torch.stack([kept[number] for number in range(len(layers))]))
                if step % 10 == 0 or step + 1 == arguments.steps:
                    shares = budgets.shares()
                    print(f"{way} {step}: loss {history[-1]:.4f}, shares {float(shares.min()):.2f} to "
                          f"{float(shares.max()):.2f}, {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
                if arguments.learning_seconds and time.perf_counter() - began > arguments.learning_seconds:
                    break
        model.eval()
        if way == "budget":
            shares = budgets.shares().detach()
        else:
            shares = torch.stack(means or [torch.stack([kept[n] for n in range(len(layers))])]).mean(0) / adapter["k"]
            shares = shares / shares.mean()
    finally:
        model.unload()
    shares = shares.clamp(min=arguments.least)
    shares = shares / shares.mean()
    return [[round(float(share), 4) for share in row] for row in shares], history


def main() -> None:
    arguments = _arguments()
    source = resolve_base(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    base, exact = (
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(arguments.device).eval().requires_grad_(False)
        for dtype in (getattr(torch, arguments.dtype), torch.float32)
    )
    chunks = pack(tokenizer, read_text(arguments.text), arguments.length)
    training, held_out = select_chunks(chunks, arguments.train), select_chunks(chunks, arguments.held_out)
    adapter = json.loads(arguments.adapter)
    result: dict[str, Any] = {"settings": {**adapter, "steps": arguments.steps}, "rows": [], **describe()}
    for way in arguments.ways:
        shares, history = learn(base, way, adapter, training, arguments)
        result["rows"].append({"way": way, "head_shares": shares, "history": history})
        arguments.output.write_text(json.dumps(result) + "\n")
        variant = {"adapter": {**adapter, "head_shares": shares}, "training": {"steps": arguments.last_steps}}
        row = run(base, exact, variant, training, held_out, arguments.slots)
        del row["weights"]
        result["rows"][-1].update(row)
        print(way, row["quality"], flush=True)
        arguments.output.write_text(json.dumps(result) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--train", default="0:110")
    parser.add_argument("--held-out", default="110:130")
    parser.add_argument("--adapter", default='{"k": 188, "window": 64, "sinks": 4}')
    parser.add_argument("--ways", nargs="+", default=["budget", "layer"])
    parser.add_argument("--slots", type=lambda text: [int(n) for n in text.split(",")], default=[256, 128, 512])
    parser.add_argument("--first-steps", type=int, default=100, help="with equal heads, before anything is learned")
    parser.add_argument("--steps", type=int, default=120, help="in which shares are learned")
    parser.add_argument("--last-steps", type=int, default=300, help="with the shares that were learned")
    parser.add_argument("--learning-seconds", type=float, help="after which no other step is taken")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate of the budgets")
    parser.add_argument("--least", type=float, default=0.1, help="share of a head at least")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
