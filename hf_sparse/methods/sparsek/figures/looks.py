"""Hold how the contenders of SparseK look in pictures, and what their budget counts."""

from typing import Any

from hf_sparse.figures.style import BLUE, GREY, ORANGE, Look, Looks

LOOKS = Looks(
    {
        "learned": Look("best by learned score", BLUE, "o"),
        "recency": Look("most recent (StreamingLLM)", ORANGE, "s"),
        "window": Look("nearest", ORANGE, "s"),
        "key_norm": Look("smallest key norm", "#009e73", "^"),
        "key_difference": Look("most unlike the mean key (KeyDiff)", "#56b4e9", "v"),
        "h2o": Look("accumulated attention (H2O)", "#d55e00", "D"),
        "tova": Look("last query's attention (TOVA)", "#cc79a7", "P"),
        "snapkv": Look("prompt's last queries (SnapKV)", "#a68a00", "X"),
        "random": Look("chosen at random", GREY, "d"),
        "prompt_random": Look("beginning, and at random", "#555555", "<"),
        "oracle": Look("future attention (oracle)", "#000000", "*"),
    },
    learned="learned",
)

#: Title and unit of the loss of the training stages that only SparseK has, or calls by a name of its own.
STAGES = {"attention": ("Warm start", "squared error of scores"), "lora": ("LoRA, hard selection", "loss")}


def budget_unit(evaluation: dict[str, Any]) -> str:
    """Say what a budget counts: slots of a KV cache, or keys that a query of an encoder reads."""
    return "KV slots" if evaluation.get("metric", "perplexity") == "perplexity" else "keys per query"
