"""The model card: a template for each method, filled from the measurements and from nothing else."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from markupsafe import Markup

from hf_sparse.adapters.results import results_of
from hf_sparse.bundled import BASE_NAME
from hf_sparse.core.registry import method_of
from hf_sparse.errors import DataError
from hf_sparse.metrics import metric_of
from hf_sparse.model_kinds import Kind, attends_both_ways, task_of_class
from hf_sparse.overlap import sentence

#: Of causal models whose attention keeps a fixed number of keys.
SLOTS_TAGS = ["kv-cache", "long-context"]

_GRAPH = (
    "The objective was to predict the entmax graph of the model itself from the projections; the logit scales stayed."
)
_ATTENTION = "The objective was to predict, for each key, the dense attention that it receives from far queries."
_OBJECTIVES: dict[Kind, dict[str, str]] = {
    "causal": {
        "distill": "The objective was the KL divergence from the same model with dense attention (self-distillation).",
        "attention": _ATTENTION,
        "graph": _GRAPH,
        "lm": "The objective was the next-token loss.",
    },
    "masked": {
        "distill": "The objective was the KL divergence from the same model with dense attention (self-distillation), "
        "at hidden tokens.",
        "attention": _ATTENTION,
        "graph": _GRAPH,
        "lm": "The objective was the loss of hidden tokens.",
    },
    "features": {
        "distill": "The objective was the cosine distance of the last hidden states, and of their means, from those of "
        "the same model with dense attention (self-distillation).",
        "attention": _ATTENTION,
        "graph": _GRAPH,
    },
}

#: A text in Python, and what to do with its tokens.
_EXAMPLES: dict[Kind, tuple[str, str]] = {
    "causal": ('"Once upon a time"', "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0]))"),
    "masked": (
        'f"Once upon a {tokenizer.mask_token}."',
        "print(tokenizer.decode(model(**tokens).logits[0].argmax(-1)))",
    ),
    "features": ('"Once upon a time"', "states = model(**tokens, output_hidden_states=True).hidden_states[-1]"),
}

#: The same for adapters that bring a head with labels.
_WITH_LABELS: dict[str, tuple[str, str]] = {
    "text-classification": (
        '"Once upon a time"',
        "print(model.config.id2label[model(**tokens).logits[0].argmax().item()])",
    ),
    "token-classification": (
        '"Once upon a time"',
        "print([model.config.id2label[label] for label in model(**tokens).logits[0].argmax(-1).tolist()])",
    ),
}


def render(
    config: Any,
    *,
    repo_id: str,
    base_model: str | None,
    parameters: int,
    lora_parameters: int = 0,
    head_parameters: int = 0,
    evaluation: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    figure: str = "quality.png",
    model_class: str | None = None,
    license: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> str:
    """README.md of an adapter's repository.

    Args:
        config: the adapter's, such as a `SparseKConfig`.
        repo_id: what a reader passes to `hf_sparse.from_pretrained`.
        base_model: Hub id of the base, `"demo"`, or `None` if it has no name that is true elsewhere.
        parameters: how many the adapter has, those of a head apart.
        lora_parameters: how many of them are LoRA's.
        head_parameters: how many a head has that was trained and saved with it.
        evaluation: content of eval.json; without it the card says that nothing was measured.
        training: content of finetune.json; without it the card says so.
        figure: name of the figure file, shown if there is an evaluation.
        model_class: the class that the adapter was made for; by default a causal language model's.
        license: `license`, `license_name` and `license_link` of the metadata, those that are known.
        tags: further tags of the metadata.
        left_out: files beside the card that are of other weights, or of nobody knows which.

    Raises:
        DataError: a measurement lacks something that the card shows.
    """
    from jinja2 import Environment, StrictUndefined, UndefinedError

    results = results_of(config)
    task = task_of_class(model_class)
    encoder = attends_both_ways((config.base_shape or {}).get("model_type"), task)
    slots = getattr(method_of(config).layer, "has_slots", False) and not encoder
    on_hub = base_model not in (None, BASE_NAME)
    all_tags = ["hf-sparse", results.name, "sparse-attention", *results.tags, *(SLOTS_TAGS if slots else []), *tags]
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag=task.pipeline,
        tags=list(dict.fromkeys(all_tags)),
        **(license or {}),
    )
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # of HTML; this is Markdown
        finalize=escape,
    )
    environment.globals.update(change=_change, code=code, count=_count, machine=_machine, seen=sentence)
    template = environment.from_string((results.templates / "card.md.jinja").read_text("utf-8"))
    example = _WITH_LABELS.get(task.pipeline, _EXAMPLES[task.kind]) if head_parameters else _EXAMPLES[task.kind]
    try:
        objective = _OBJECTIVES[task.kind][training["objective"]] if training else ""
        text = template.render(
            config=config,
            encoder=encoder,
            example=[Markup(line) for line in example],
            metric=metric_of(evaluation or {}),
            name=repo_id.split("/")[-1],
            repo_id=_python(repo_id),
            parameters=parameters,
            lora_parameters=lora_parameters,
            head_parameters=head_parameters,
            peft_type=str(config.peft_type.value),
            figure=figure,
            evaluation=evaluation,
            training=training,
            objective=objective,
            left_out=left_out,
            versions=_versions(evaluation or training),
            **results.card(config, evaluation, encoder),
            **_base(repo_id, base_model),
        )
    except (UndefinedError, KeyError, AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"eval.json or finetune.json is not what hf-sparse writes: {error!r}") from error
    return f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n"


# What Markdown and HTML read as markup, underscores within words apart; `$` begins formulas on the Hub.
_MARKUP = re.compile(r"[\\`*<>|~\[\]&$#]|(?<![^\W_])_|_(?![^\W_])")

# Control characters, and those that turn the direction of what follows.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def escape(value: Any) -> Markup:
    """Make text of a value that shows in Markdown as it is, on one line; a `Markup` is Markdown already.

    The templates show everything through this.

    >>> print(escape("Q4_1 | <b> *all*"))
    Q4_1 \\| \\<b\\> \\*all\\*
    """
    if isinstance(value, Markup):
        return value
    return Markup(_MARKUP.sub(r"\\\g<0>", _visible(value)))


def code(value: Any) -> Markup:
    """Show a value as code in Markdown, whatever is in it.

    >>> print(code("a`b.txt"))
    ``a`b.txt``
    """
    text = _visible(value).strip() or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text[0] == "`" or text[-1] == "`" else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


def _visible(value: Any) -> str:
    return _INVISIBLE.sub(" ", str(value).encode("utf-8", "replace").decode())


def _python(text: str) -> Markup:
    """A string of Python in double quotes, on one line."""
    return Markup(json.dumps(text.encode("utf-8", "replace").decode(), ensure_ascii=False))


def _base(repo_id: str, base_model: str | None) -> dict[str, Markup]:
    """How the text names the base model, and how the example loads it."""
    repo = _python(repo_id)
    if base_model == BASE_NAME:
        return {
            "base_text": Markup("the small Llama that comes with `hf-sparse`"),
            "tokenizer": Markup(f'hf_sparse.hub.resolve_base("{BASE_NAME}")'),
            "arguments": repo,
        }
    if base_model is None:
        return {
            "base_text": Markup("a base model that has no name on the Hub"),
            "tokenizer": Markup('"path/to/the/base"'),
            "arguments": Markup(f'{repo}, base_model="path/to/the/base"'),
        }
    return {
        "base_text": Markup(f"[`{base_model}`](https://huggingface.co/{base_model})"),  # a checked id
        "tokenizer": _python(base_model),
        "arguments": repo,
    }


def _change(value: float, reference: float) -> str:
    return f"{100 * (value / reference - 1):+.1f} %"


def _count(value: Any) -> str:
    return f"{int(value):,}"


def _machine(measurement: dict[str, Any]) -> str:
    """One line on where a measurement was made; everything that the file tells."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in measurement["machine"].items())


def _versions(measurement: dict[str, Any] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (measurement or {"versions": {}})["versions"].items())
