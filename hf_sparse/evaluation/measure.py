"""Measure everything that eval.json holds, in one call.

What quality is depends on the model: perplexity of every next token, perplexity of hidden tokens for a masked language
model, and likeness of embeddings to the dense model's for one without a language modelling head. What is compared and
what is measured besides depends on the method, which says so by its `Evaluation`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_sparse import environment
from hf_sparse.core.settings import check_integer
from hf_sparse.data import IGNORED, check_chunks, fingerprint, first_token, tensors
from hf_sparse.evaluation.base import Request
from hf_sparse.evaluation.settings import settings_from
from hf_sparse.evaluation.switching import evaluating, evaluation_of
from hf_sparse.metrics import METRIC_KEYS
from hf_sparse.model_kinds import kind_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FORMAT = 1


def evaluate(
    model: "PeftModel | PreTrainedModel",
    chunks: Any,
    *,
    selections: Sequence[str] | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    speed_tokens: int = 64,
    progress: bool = True,
    text_name: str = "",
    **options: Any,
) -> dict[str, Any]:
    """Measure a patched model on text, against dense attention and against baselines of equal size.

    The model comes back as it was: its mode, its baselines, its budget, and whether it is switched on.

    Args:
        model: a `PeftModel` or a model patched by `hf_sparse.patch`.
        chunks: `[N, T]` int64 tokens, longer than what a query attends to at most, see `hf_sparse.data.pack`; for a
            masked language model what `hf_sparse.data.mask_tokens` returns.
        selections: the contenders to compare, of `evaluation_of(model).contenders(model)`; all by default.
        stride: of a causal language model, count the last `stride` tokens of each chunk only: perplexity over a sliding
            window, if `pack` cut the chunks with the same stride. By default all tokens but the first count.
        batch_size: chunks at a time.
        speed_tokens: tokens that are decoded to measure the speed of a causal language model: the last ones of the
            first chunk, after the others as the prompt; fewer where the chunk is not that long.
        progress: show a progress bar on stderr.
        text_name: what the text is called in the result.
        options: of the method, the fields of its `Evaluation.settings_type`. SparseK has `slots`, further budgets to
            measure the same at; Sparsefinder has `sparsities`, `seed` and `rows`. One that is `None` has its default.

    Returns:
        What `eval.json` holds. Its `metric` names the entry with the quality of each contender: perplexity per token of
        every position but the first of each chunk; perplexity per hidden token; or the mean cosine similarity of
        mean-pooled embeddings to the dense model's. For a causal language model also `by_position`, the perplexity
        between `edges`; `divergence`, the mean KL divergence from dense attention in nats per token; bytes of keys and
        values after one chunk (for the sparse cache also its bookkeeping, the scores and positions of its slots) and
        tokens per second of decoding one sequence. For others, tokens per second of the forward. `sweep` has one entry
        per further budget. A method may measure something else, as Sparsefinder does: see
        `hf_sparse.methods.sparsefinder.evaluation.measure_graphs`.

    Raises:
        DataError: chunks that cannot be measured.
        ValueError: a model that is not patched, options of another method, or options out of range.
        TypeError: an option that no method has.
    """
    evaluation = evaluation_of(model)
    settings = settings_from(evaluation, options)
    tokens, labels = tensors(model, chunks)
    check_chunks(model, tokens, labels)
    names = evaluation.contenders(model) if selections is None else selections
    evaluation.check_contenders(model, names)
    for option, value in (("batch_size", batch_size), ("speed_tokens", speed_tokens)):
        check_integer(option, value, least=1)
    kind = kind_of(model)
    request = Request(kind, tokens, labels, tuple(names), stride, batch_size, speed_tokens, progress, settings)
    evaluation.check(model, request)
    with evaluating(model):
        measured = evaluation.measure(model, request)
    return {
        "format": FORMAT,
        **evaluation.subject(model),
        "text": _describe_text(model, request, text_name),
        "metric": METRIC_KEYS[kind],
        **measured,
        **environment.describe(),
    }


def _describe_text(model: Any, request: Request, name: str) -> dict[str, Any]:
    """Return the entry `text` of eval.json: which text was measured, and how much of it was predicted."""
    tokens, labels = request.tokens, request.labels
    count, length = tokens.shape
    text: dict[str, Any] = {"name": name, "sha256": fingerprint(tokens, labels), "chunks": count, "length": length}
    text["first_token"] = first_token(model, tokens)
    if request.kind != "features":
        predicted = count * (request.stride or length - 1)
        text["predicted_tokens"] = predicted if labels is None else int((labels != IGNORED).sum())
    if request.stride is not None:
        text["stride"] = request.stride
    return text
