"""What dividing the slots among the layers does to a trained adapter, before any more training.

    python benchmarks/learning/shares.py ADAPTER --text FILE --output shares.json

Layers are measured on chunks of the training text (`--chunks`); perplexity and KL from dense are those on `--held-out`.
"""

import argparse
import json

from arguments import adapter_and_text

from hf_sparse.core.overrides import override
from hf_sparse.data import pack, read_text, select_chunks
from hf_sparse.environment import describe
from hf_sparse.evaluation import budget_of, compare, divide_layers
from hf_sparse.patches import sparse_layers_in_use
from hf_sparse.workflow import load_adapter


def main() -> None:
    arguments = _arguments()
    model, tokenizer = load_adapter(arguments.adapter, device=arguments.device)
    text = pack(tokenizer, read_text(arguments.text), arguments.length)
    chunks, held_out = (select_chunks(text, part) for part in (arguments.chunks, arguments.held_out))
    shares, damages = divide_layers(model, chunks, batch_size=arguments.batch_size)
    config, run, whole = sparse_layers_in_use(model)[0].config, (budget_of(model), "learned"), {}
    for name, some in (("equal", None), ("divided", shares)):
        with override([config], layer_shares=some):
            losses = compare(model, held_out, [run], batch_size=arguments.batch_size)[run]
        whole[name] = {"perplexity": losses.perplexity, "divergence": losses.mean_divergence}
    result = {"slots": run[0].slots, "damages": damages, "shares": shares, "whole": whole, **describe()}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = adapter_and_text(__doc__)
    parser.add_argument("--held-out", default="110:120", help="START:STOP")
    parser.add_argument("--batch-size", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
