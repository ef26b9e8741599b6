"""Train scorers of one base with several recipes and inputs, and measure each on text that training never saw.

    python benchmarks/learning/scorers.py --model smollm2-135m-instruct --text wiki.test.crlf.raw --output runs.json

A variant has an adapter (settings of a new one, or the folder of a trained one, which goes on), a recipe, and what the
scorer reads besides the hidden state of its token. A key is selected
when it leaves the window at the earliest, so its score may use all that happened until then (`window_inputs`). Nothing
of the library changes: the score of a layer is replaced for as long as a variant runs, for whole texts without a cache.
Training is soft selection, measuring is hard selection in float32.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseKConfig
from hf_sparse.base_model import resolve_base
from hf_sparse.data import pack, read_text, select_chunks
from hf_sparse.environment import describe
from hf_sparse.evaluation import compare
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.methods.sparsek.attention import SparseKAttention
from hf_sparse.methods.sparsek.evaluation import budget_of
from hf_sparse.ops.selection.linear_scores import normalised
from hf_sparse.patches import sparse_layers

STATISTICS = ("attention", "late", "value_norm", "key_norm", "alike")  # that `window_inputs` returns
TAPS = 8  # next tokens that have a weight each in `following`


def window_inputs(query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, scaling: float) -> Tensor:
    """Return what is known of each key when it leaves the window, `[5, B, Hkv, T]` float32, as `STATISTICS` names it.

    `attention` is the log of the mean attention that a key gets from the queries in whose window it is, in a softmax
    over that window and the sinks alone, so that it does not depend on what is selected; `late` is that of the last
    quarter of these queries. `alike` is the cosine of a key and the mean of the keys that follow it in the window.
    Keys whose window is not over yet get something, and are never selected.
    """
    batch, heads, length, dim = key.shape
    group = query.shape[1] // heads
    missing = -length % window
    q, k = (F.pad(x.float(), (0, 0, 0, missing)) for x in (query, key))
    blocks = q.shape[2] // window
    q = q.view(batch, heads, group, blocks, window, dim)
    k = k.view(batch, heads, blocks, window, dim)
    nearby = torch.cat([F.pad(k, (0, 0, 0, 0, 1, 0))[:, :, :-1], k], 3)  # the block before, and its own
    logits = (q @ nearby[:, :, None].transpose(-1, -2)) * scaling  # [B, Hkv, G, blocks, window, 2 window]
    step = torch.arange(window, device=key.device)
    age = step[:, None] + window - torch.arange(2 * window, device=key.device)  # of a key for a query
    first = torch.arange(blocks, device=key.device)[:, None, None] * window
    exists = first + step[:, None] - age >= 0
    inside = (age >= 0) & (age < window) & exists
    logits = logits.masked_fill(~inside, -torch.inf)
    of_sinks = (q.flatten(3, 4) @ k.flatten(2, 3)[:, :, None, :sinks].transpose(-1, -2)) * scaling
    of_sinks = of_sinks.view(batch, heads, group, blocks, window, sinks)
    old = first + step[:, None] - torch.arange(sinks, device=key.device) >= window  # a sink in the window counts once
    of_sinks = of_sinks.masked_fill(~old, -torch.inf)
    weight = torch.cat([logits, of_sinks], -1).softmax(-1)[..., : 2 * window].sum(2) / group

    def received(part: Tensor) -> Tensor:  # by each key, from its own block of queries and the next one
        own, before = part[..., window:].sum(3), part[..., :window].sum(3)
        return (own + F.pad(before, (0, 0, 0, 1))[:, :, 1:]).flatten(2)[..., :length]

    late = age >= window - window // 4
    sums = received(weight) / window, received(weight * late) / (window // 4)
    following = _following_mean(key.float(), window)
    return torch.stack(
        [
            *((mass + 1e-5).log() for mass in sums),
            value.float().norm(dim=-1).clamp(min=1e-6).log(),
            key.float().norm(dim=-1).clamp(min=1e-6).log(),
            F.cosine_similarity(key.float(), following, dim=-1),
        ]
    )


def _following_mean(states: Tensor, window: int) -> Tensor:
    """Return the mean of the states `[..., T, X]` that follow each one within its window."""
    total = F.pad(states.double().cumsum(-2), (0, 0, 1, 0))  # of the first n
    length = states.shape[-2]
    begin = torch.arange(1, length + 1, device=states.device)
    end = (begin + window - 1).clamp(max=length)
    mean = (total[..., end, :] - total[..., begin, :]) / (end - begin).clamp(min=1)[:, None]
    return mean.to(states.dtype)


class Inputs(nn.Module):
    """Hold the weights of what the scorers of one layer read besides the hidden state of the token itself.

    Attributes:
        statistics: `[Hkv, n]`, of those of `window_inputs` that are named.
        direction: `[Hkv, C]`, a second direction of hidden states, read of the tokens that follow in the window.
        taps: `[Hkv, TAPS + 1]`, what the next tokens count, and last the mean of the window.
    """

    def __init__(self, names: tuple[str, ...], heads: int, hidden_size: int) -> None:
        super().__init__()
        self.names = [STATISTICS.index(name) for name in names if name in STATISTICS]
        self.statistics = nn.Parameter(torch.zeros(heads, len(self.names))) if self.names else None
        self.direction = nn.Parameter(torch.randn(heads, hidden_size) * 0.02) if "following" in names else None
        self.taps = nn.Parameter(torch.full((heads, TAPS + 1), 0.1)) if "following" in names else None

    def add(self, layer: SparseKAttention, scores: Tensor, hidden: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        """Return scores `[B, Hkv, T]` with what the window tells of each token."""
        query, key, value, scaling = inputs
        budget: Any = layer.budget
        if self.statistics is not None:
            with torch.no_grad():
                known = window_inputs(query, key, value, budget.window, budget.sinks, scaling)[self.names]
            scores = scores + torch.einsum("nbht,hn->bht", known, self.statistics.float())
        if self.direction is not None and self.taps is not None:
            said = (normalised(hidden).float() @ self.direction.float().T).transpose(1, 2)  # [B, Hkv, T]
            mean = _following_mean(said[..., None], budget.window)[..., 0]
            later = [F.pad(said, (0, n))[..., n:] for n in range(1, TAPS + 1)]
            scores = scores + torch.einsum("nbht,hn->bht", torch.stack([*later, mean]), self.taps.float())
        return scores.contiguous()


@contextmanager
def reading(model: nn.Module, names: tuple[str, ...], weights: list[dict[str, Tensor]] | None = None) -> Iterator[None]:
    """Let all scorers of a model read more for the length of a `with` block; the weights are parameters of theirs."""
    with ExitStack() as restore:
        layers: Any = sparse_layers(model) if names else ()
        for number, layer in enumerate(layers):
            scorer = layer.sparsek_scorer[layer.active]
            more = Inputs(names, layer.num_key_value_heads, layer.hidden_size).to(scorer.weight.device)
            if weights is not None:
                more.load_state_dict(weights[number])
            scorer.more = more
            restore.callback(delattr, scorer, "more")
            restore.callback(delattr, layer, "_attend")
            restore.callback(delattr, layer, "score")
            _replace(layer, scorer)
        yield


def _replace(layer: Any, scorer: Any) -> None:
    attend: Callable[..., Tensor] = layer._attend
    score: Callable[..., Tensor] = layer.score
    inputs: list[Any] = []

    def attend_noting(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        inputs[:] = [(query, key, value, others[-1])]
        return attend(query, key, value, *others)

    def score_more(hidden: Tensor, index: Tensor) -> Tensor:
        return scorer.more.add(layer, score(hidden, index), hidden, inputs[0])

    layer._attend, layer.score = attend_noting, score_more


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Return what the scorers of a model have learned."""
    return {name: p.detach().float().cpu() for name, p in model.named_parameters() if "sparsek_scorer" in name}


def attach(model: Any, adapter: str | dict[str, Any]) -> Any:
    """Give a model new scorers with these settings, or those of a folder."""
    if isinstance(adapter, str):
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return get_peft_model(model, SparseKConfig(**adapter))


def run(base: Any, exact: Any, variant: dict[str, Any], training: Tensor, held_out: Tensor, slots: list[int]) -> Any:
    """Train one variant on `base`, and measure it on `exact`, the same model in float32; both stay as they were."""
    names, adapter = tuple(variant.get("reads", ())), variant.get("adapter", {})
    torch.manual_seed(variant.get("seed", 0))
    model = attach(base, adapter)
    try:
        with reading(model, names):
            options = {"progress": False, "cpu": base.device.type != "cuda", "seed": variant.get("seed", 0)}
            began = time.perf_counter()
            metrics = finetune(
                model, training, FinetuneConfig(**{"divide_heads": False} | variant.get("training", {}), **options)
            )
            weights = learned(model)
            result = {
                "seconds": time.perf_counter() - began,
                "tokens": metrics["tokens"],
                "parameters": metrics["trainable_parameters"],
                "last_loss": sum(row["loss"] for row in metrics["history"][-30:]) / len(metrics["history"][-30:]),
            }
    finally:
        model.unload()
    model = attach(exact, adapter)
    try:
        with reading(model, names):
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in weights.items():
                    parameters[name].copy_(value)
            whole = budget_of(model)
            budgets = {n: whole if n == whole.slots else whole.resized(n) for n in slots}
            began = time.perf_counter()
            runs = [(budget, "learned") for budget in budgets.values()]
            batch_size = 4 if exact.device.type == "cuda" else 1
            losses = compare(model.eval(), held_out, runs, batch_size=batch_size, progress=False)
            result["quality"] = {
                str(n): {
                    "perplexity": losses[(budget, "learned")].perplexity,
                    "kl": losses[(budget, "learned")].mean_divergence,
                }
                for n, budget in budgets.items()
            }
            result["measuring_seconds"] = time.perf_counter() - began
            result["weights"] = weights
    finally:
        model.unload()
    return result


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    source = resolve_base(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    options = {"use_safetensors": True}
    base, exact = (
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).to(arguments.device).eval()
        for dtype in (getattr(torch, arguments.dtype), torch.float32)
    )
    for model in (base, exact):
        model.requires_grad_(False)
    chunks = pack(tokenizer, read_text(arguments.text), arguments.length)
    training, held_out = select_chunks(chunks, arguments.train), select_chunks(chunks, arguments.held_out)
    variants: list[dict[str, Any]] = json.loads(arguments.variants.read_text())
    result: dict[str, Any] = {"length": arguments.length, "held_out": len(held_out), "rows": [], **describe()}
    began = time.perf_counter()
    for variant in variants:
        if arguments.deadline and time.perf_counter() - began > arguments.deadline:
            print("no time for", variant["name"], flush=True)
            continue
        try:
            row = run(base, exact, variant, training, held_out, variant.get("slots", arguments.slots))
        except Exception:
            traceback.print_exc()
            continue
        weights = row.pop("weights")
        if arguments.adapters:
            from safetensors.torch import save_file

            save_file(weights, arguments.adapters / f"{variant['name']}.safetensors")
        result["rows"].append({**variant, **row})
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        quality = {n: (round(q["perplexity"], 3), round(q["kl"], 4)) for n, q in row["quality"].items()}
        print(f"{variant['name']}: {quality} in {row['seconds']:.0f} + {row['measuring_seconds']:.0f} s", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--train", default="0:110")
    parser.add_argument("--held-out", default="110:130")
    parser.add_argument("--slots", type=lambda text: [int(n) for n in text.split(",")], default=[256, 128, 512])
    parser.add_argument("--variants", type=Path, required=True, help="JSON: name, adapter, training, reads of each")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--deadline", type=float, help="seconds after which no other variant begins")
    parser.add_argument("--adapters", type=Path, help="folder for what the scorers learned")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
