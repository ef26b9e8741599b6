"""Ask a model for a number hidden in noise (RULER's niah_single_1) through kvpress, by presses that keep as many keys.

    PYTHONPATH=.venv/kvpress python benchmarks/kvpress_ruler.py --model MODEL --adapter DIR --output kvpress_ruler.json

Needs the environment of `make kvpress`. The context is read and compressed before kvpress' pipeline reads the question.
A question counts if its number is in the answer, RULER's string match; RULER's own texts are on the Hub, so the
contexts here follow its wording. The JSON is written after each question.
"""

import argparse
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from kvpress import KVPressTextGenerationPipeline, SnapKVPress, StreamingLLMPress
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse.atomic_files import write_json
from hf_sparse.environment import describe
from hf_sparse.methods.sparsek.press import SparseKPress

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
WORDS = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "harbor", "indigo", "juniper")


def sample(tokenizer: Any, tokens: int, depth: float, random: Random) -> tuple[str, str, str]:
    """Return a context of about so many tokens with a number at a depth from 0 to 1, the question, and the number."""
    word, number = random.choice(WORDS), str(random.randrange(1_000_000, 10_000_000))
    count = max(2, tokens // len(tokenizer(NOISE)["input_ids"]))
    lines = [NOISE] * count
    lines.insert(round(depth * count), f"One of the special magic numbers for {word} is: {number}.")
    context = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n" + "\n".join(lines)
    )
    return context, f"What is the special magic number for {word} mentioned in the provided text?", number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=0.75, help="share of the context's keys that are dropped")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.to(device)
    pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device=device)
    presses = {
        "all keys": None,
        "SparseKPress": SparseKPress(compression_ratio=options.ratio, adapter=options.adapter),
        "SnapKVPress": SnapKVPress(compression_ratio=options.ratio),
        "StreamingLLMPress": StreamingLLMPress(compression_ratio=options.ratio),
    }
    random, right = Random(0), dict.fromkeys(presses, 0)
    for number in range(options.samples):
        depth = (number + 0.5) / options.samples
        context, question, expected = sample(tokenizer, options.tokens, depth, random)
        for name, press in presses.items():
            answer = pipe(context, question=question, press=press, max_new_tokens=24)["answer"]
            right[name] += expected in answer
        result = {
            "model": Path(options.model).name,
            "adapter": Path(options.adapter).name,
            "tokens": options.tokens,
            "ratio": options.ratio,
            "samples": number + 1,
            "right": right,
            "transformers": transformers.__version__,
            "environment": describe(),
        }
        write_json(options.output, result)
        print(number + 1, right, flush=True)


if __name__ == "__main__":
    main()
