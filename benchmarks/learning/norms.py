"""What the norms of a token's key and value add to what the scorer reads.

    python benchmarks/learning/norms.py --output runs.jsonl --only recipe norms

Takes the arguments of `sweep.py`, and knows one setting more, `norms`, for models of the Llama family. Keys and values
are linear in the scorer's input, so a linear scorer reads them already; their norms it cannot.
"""

import sys
from typing import Any

import sweep
import torch
from settings import SETTINGS, Setting
from torch import Tensor, nn

import hf_sparse.methods.sparsek.attention as sparsek
from hf_sparse import SparseKConfig
from hf_sparse.methods.sparsek.scorer import LinearScorer


class WithNorms(LinearScorer):
    """Adds two learned multiples of the logarithms of the norms of key and value, per KV head."""

    def __init__(self, config: SparseKConfig, hidden_size: int, heads: int, causal: bool, layer: nn.Module) -> None:
        super().__init__(config, hidden_size, heads, causal)
        self.of_norms = nn.Parameter(torch.zeros(heads, 2))
        self.projections = [(m.weight, m.bias) for m in (layer.k_proj, layer.v_proj)]  # a list: no parameters of ours

    def forward(self, hidden_states: Tensor, index: Tensor) -> Tensor:
        scores = super().forward(hidden_states, index)
        for number, (weight, bias) in enumerate(self.projections):
            with torch.no_grad():
                projected = torch.nn.functional.linear(hidden_states, weight, bias).float()
                norms = projected.unflatten(-1, (scores.shape[1], -1)).norm(dim=-1).log().transpose(1, 2)  # [B, Hkv, T]
            scores = scores + norms * self.of_norms[:, number, None]
        return scores


def main() -> None:
    run, same_run = sweep.run, sweep._same_run

    def with_norms(base: Any, recipe: Any, name: str, *rest: Any) -> Any:
        if "norms" not in name.split("+"):
            return run(base, recipe, name, *rest)
        layers = iter([layer.self_attn for layer in base.model.layers])
        plain = sparsek.make_scorer
        sparsek.make_scorer = lambda *args: WithNorms(*args, next(layers))
        try:
            return run(base, recipe, name, *rest)
        finally:
            sparsek.make_scorer = plain

    SETTINGS["norms"] = Setting("the norms of key and value as well")
    sweep.run = with_norms
    sweep._same_run = lambda recipe, name: "norms" not in name.split("+") and same_run(recipe, name)
    sweep.main()


if __name__ == "__main__":
    sys.exit(main())
