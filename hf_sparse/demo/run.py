"""Show all of hf-sparse in a minute or two, offline: patch, measure, train, measure again, generate, report.

The base is the bundled checkpoint, the text is the standard library of the Python that runs this, so the numbers
differ a little between Python versions; for one version they follow from the seed.
"""

import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoTokenizer

from hf_sparse._compat import cache_of
from hf_sparse.adapters.files import CONFIG, WEIGHTS, measurement_files
from hf_sparse.adapters.folder import write_repo
from hf_sparse.adapters.load import load_adapter
from hf_sparse.adapters.report import write_report
from hf_sparse.adapters.saving import save_adapter
from hf_sparse.bundled import BASE_NAME, CHECKPOINT
from hf_sparse.data import pack
from hf_sparse.demo.text import PROMPT, documents
from hf_sparse.evaluation import evaluate, kv_bytes, perplexity, readable_bytes, using
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.finetune.checkpoint import checkpoints
from hf_sparse.folders import staged
from hf_sparse.methods.sparsek import SparseKConfig
from hf_sparse.overlap import overlap
from hf_sparse.workflow import create_adapter

K, WINDOW, SINKS = 20, 8, 4  # 32 slots
# A small model attends mostly to near tokens: the untrained scorer starts as recency, and learns which tokens should
# outlive their neighbours. A warm start on attention mass would first unlearn that.
POSITION_SLOPE, WARM_START_STEPS = 0.05, 0

#: What is compared, and what the tables call it.
COMPARED = {
    "dense": "all (dense attention)",
    "recency": "the most recent (StreamingLLM)",
    "snapkv": "most attended of late (SnapKV)",
    "random": "any, at random",
    "learned": "by the untrained scorer",
}
EVALUATION_CHUNKS, EVALUATION_LENGTH, EVALUATION_BATCH = 12, 1024, 4

BATCH_SIZE, LEARNING_RATE = 2, 1e-2
TRAINING_LENGTH = 256  # a score does not depend on later queries: what is learned on short text serves long text
EVERY_NTH_DOCUMENT = 8  # one training document in 8 is read, still more than the steps need

#: A copy of the published adapter model_cards/demo-llama-sparsek-64, whose finetune.json has the tokens.
PUBLISHED, PUBLISHED_TOKENS = Path(__file__).parent / "adapter", 614_400

NEW_TOKENS = 64
REPORT_DOCUMENTS, REPORT_CHUNKS = 8, ":2"  # of the held-out text, whose kept keys the report draws
HELD_OUT = "held-out modules of the Python standard library"


def run(output: Path, steps: int, seed: int, console: Console) -> dict[str, Any]:
    """Run the demo on the CPU.

    Args:
        output: folder for the adapter, its measurements and card; appears at the end. A new or empty one, or one that
            holds an adapter, which is replaced.
        steps: training steps after the warm start, at least 1. `hf_sparse.demo.STEPS` is what the demo was tuned for.
        seed: seed of the scorers' first weights and of the order of the training text.
        console: prints the steps and their results.

    Returns:
        What eval.json holds.

    Raises:
        ValueError: `output` holds something else, or `steps` is out of range.
    """
    began = time.perf_counter()
    settings = FinetuneConfig(
        steps=steps,
        warm_start_steps=WARM_START_STEPS,
        divide_heads=False,  # measuring every head would take longer than the training
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        seed=seed,
        cpu=True,
    )
    if output.exists() and not (output / CONFIG).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and holds no adapter that the demo could replace; choose another --output")

    old = [*measurement_files(output), *checkpoints(output)]  # files of the adapter that is replaced
    with staged(output, first=(CONFIG, WEIGHTS), removed=old) as stage:
        config = SparseKConfig(k=K, window=WINDOW, sinks=SINKS, position_slope=POSITION_SLOPE)
        model = create_adapter(BASE_NAME, config, stage, seed=seed, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

        console.rule("1. patch")
        console.print(_patched(model))

        console.rule("2. measure, untrained")
        held_out = _held_out(tokenizer)
        before = _untrained(model, held_out)
        keys = {name: f"up to {EVALUATION_LENGTH if name == 'dense' else config.slots}" for name in COMPARED}
        rows = [_Row(COMPARED[name], keys[name], before[name]) for name in COMPARED]
        console.print(_perplexities(rows))
        console.print(_explained(before["dense"], config.slots))

        console.rule("3. train the scorer")
        console.print(
            "The model with all keys teaches the model with few (KL divergence of their predictions); the base stays "
            "frozen."
        )
        training_text = "\n\n".join(islice(documents("train"), 0, None, EVERY_NTH_DOCUMENT))
        training = finetune(model, pack(tokenizer, training_text, TRAINING_LENGTH), settings)
        console.print(_trained(training, steps))

        console.rule("4. measure again")
        evaluation = _measured_again(model, held_out, before, training)
        after = evaluation["perplexity"]["learned"]
        rows += [_Row("by the trained scorer", keys["learned"], after), *_published(held_out)]
        console.print(_perplexities(rows))
        console.print(_verdict(before["dense"], before["recency"], after))
        console.print(
            "The last row is the adapter that the project publishes, trained on "
            f"{PUBLISHED_TOKENS:,} tokens. It divides its keys among the KV heads by what each needs; the row above it "
            "divides the most recent keys alike."
        )

        console.rule("5. generate")
        console.print(_side_by_side(model, tokenizer))

        save_adapter(model, stage)
        write_repo(stage, evaluation=evaluation, training=training, repo_id=output.name)

    console.rule("6. report")
    _say_as_it_is(
        console,
        f"Open {_report(output)} in a browser: the same numbers, the loss of every step, and the keys that every head "
        "keeps.",
    )

    console.rule("7. publish")
    names = ", ".join(sorted(path.name for path in output.iterdir()))
    console.print(f"In {escape(str(output))}: {escape(names)}.", soft_wrap=True)
    _say_as_it_is(
        console,
        f"Load it:    hf_sparse.from_pretrained({str(output)!r})\n"
        f"Publish it: hf-sparse push {output} YOUR_NAME/demo-sparsek    (after `hf auth login`)",
    )
    console.print(f"The demo took {time.perf_counter() - began:.0f} s.")
    return evaluation


def _say_as_it_is(console: Console, text: str) -> None:
    """Print what is to be copied: without colours, and without line breaks of rich's own."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _patched(model: PeftModel) -> str:
    """Say what was patched."""
    trainable, total = model.get_nb_trainable_parameters()
    return (
        f"A Llama of {total - trainable:,} parameters, and {trainable:,} of a scorer that chooses which old keys "
        f"stay.\nEvery query attends to {K + WINDOW + SINKS} keys instead of all: the first {SINKS}, the last "
        f"{WINDOW}, and of those between the {K} with the best scores."
    )


def _untrained(model: PeftModel, held_out: Tensor) -> dict[str, float]:
    """Return the perplexity of all that is compared before the scorer is trained."""
    model.eval()
    perplexities = {}
    for name in COMPARED:
        with using(model, name):
            perplexities[name] = perplexity(model, held_out, batch_size=EVALUATION_BATCH, progress=name)
    return perplexities


def _explained(dense: float, slots: int) -> str:
    """Say what the columns of the first table mean; `dense` is the perplexity with all keys."""
    return (
        "Perplexity is the number of equally likely tokens that would leave as much doubt about the next token: "
        f'{dense:.1f} with all keys, and lower is better. "Against dense" says how much higher it is with {slots} '
        f"keys, of which the rows choose the same {SINKS + WINDOW} and {K} others."
    )


def _trained(training: dict[str, Any], steps: int) -> str:
    """Say what the training did, from its metrics."""
    first, last = training["history"][0]["loss"], training["history"][-1]["loss"]
    return (
        f"{training['tokens']:,} tokens in {training['seconds']:.0f} s: {steps} steps of {BATCH_SIZE} texts of "
        f"{TRAINING_LENGTH} tokens. The loss was {first:.3f} in the first step and {last:.3f} in the last, in nats per "
        "token; it would be 0 if few keys predicted what all keys predict."
    )


def _measured_again(
    model: PeftModel, held_out: Tensor, before: dict[str, float], training: dict[str, Any]
) -> dict[str, Any]:
    """Measure the trained scorer, and return what eval.json holds: the others, `before`, do not depend on it."""
    evaluation = evaluate(model, held_out, selections=("learned",), batch_size=EVALUATION_BATCH, text_name=HELD_OUT)
    evaluation["text"]["trained_on"] = overlap(training["trained_on"], held_out)
    evaluation["perplexity"] = {**before, "learned": evaluation["perplexity"]["learned"]}
    return evaluation


def _report(output: Path) -> Path:
    """Write the report of the adapter in a folder, and return the page."""
    text = "\n\n".join(islice(documents("held_out"), REPORT_DOCUMENTS))
    return write_report(output, text, HELD_OUT, length=EVALUATION_LENGTH, chunks=REPORT_CHUNKS, device="cpu")


def _held_out(tokenizer: Any) -> Tensor:
    """Return `[EVALUATION_CHUNKS, EVALUATION_LENGTH]` tokens from all over the text that the checkpoint never saw."""
    chunks = pack(tokenizer, "\n\n".join(documents("held_out")), EVALUATION_LENGTH)
    return chunks[:: max(1, len(chunks) // EVALUATION_CHUNKS)][:EVALUATION_CHUNKS]


class _Row(NamedTuple):
    """Hold a row of the table: what is kept, how many keys a query attends to, and the perplexity."""

    what: str
    keys: str
    perplexity: float


def _published(held_out: Tensor) -> list[_Row]:
    """Measure the published adapter, and the most recent keys at its budget."""
    model, _ = load_adapter(PUBLISHED, device="cpu", dtype="float32")
    keys = f"{model.active_peft_config.slots} on average"
    rows = []
    for name, what in (("recency", COMPARED["recency"]), ("learned", "by a scorer trained for longer")):
        with using(model, name):
            value = perplexity(model, held_out, batch_size=EVALUATION_BATCH, progress=f"{name}, published")
        rows.append(_Row(what, keys, value))
    return rows


def _perplexities(rows: list[_Row]) -> Table:
    table = Table(caption=f"{EVALUATION_CHUNKS} held-out chunks of {EVALUATION_LENGTH} tokens")
    table.add_column("which keys")
    table.add_column("keys per query", justify="right")
    table.add_column("perplexity", justify="right")
    table.add_column("against dense", justify="right")
    dense = rows[0].perplexity
    for number, (what, keys, value) in enumerate(rows):
        table.add_row(what, keys, f"{value:.2f}", f"{value / dense - 1:+.1%}" if number else "")
    return table


def _verdict(dense: float, recency: float, learned: float) -> str:
    if not dense < recency > learned:
        return "The trained scorer is no better than keeping the most recent keys: train for more steps."
    closed = (recency - learned) / (recency - dense)
    return f"At the same number of keys, the scorer closes {closed:.0%} of the gap between recency and dense."


@torch.no_grad()
def _side_by_side(model: PeftModel, tokenizer: Any) -> Group:
    """Continue the prompt greedily with dense and with sparse attention, and compare the sizes of their caches."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    count = prompt["input_ids"].shape[1]
    texts, sizes = [], []
    for name in ("dense", "learned"):
        with using(model, name):
            output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
        texts.append(Text(tokenizer.decode(output.sequences[0, count:], skip_special_tokens=True)))
        sizes.append(readable_bytes(kv_bytes(cache_of(output))))
    table = Table(show_lines=True)
    table.add_column(f"dense: {sizes[0]} of keys and values", ratio=1, overflow="fold")
    table.add_column(f"sparse: {sizes[1]}, however long the text", ratio=1, overflow="fold")
    table.add_row(*texts)
    return Group(
        f"A module of {count} tokens defines errors, one class after another, and ends in `class`. Both go on, always "
        "with the likeliest token:",
        table,
        f"The cache of dense attention holds the keys and values of all {count + NEW_TOKENS - 1} tokens so far, the "
        f"other one those in {K + WINDOW + SINKS} slots.",
    )
