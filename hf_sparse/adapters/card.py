"""Write the model card: a template for each method, filled from the measurements and from nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import ModelCardData
from markupsafe import Markup

from hf_sparse.adapters.files import CONFIG, MODEL_CONFIG
from hf_sparse.adapters.markdown import code, escape, python_string
from hf_sparse.adapters.method_report import report_of
from hf_sparse.bundled import BASE_NAME
from hf_sparse.core.config import SparseConfig
from hf_sparse.errors import DataError
from hf_sparse.metrics import metric_of
from hf_sparse.model_kinds import Kind, ModelKind, attends_both_ways, task_of_class
from hf_sparse.overlap import sentence

if TYPE_CHECKING:
    from jinja2 import Template

#: How an adapter is published: by itself, inside of a full model, or so with its LoRA merged into the weights.
Form = Literal["adapter", "full", "merged"]

#: What the card of a full model says first, and of one with LoRA merged after that.
_NOTICE = """\
> **Without the library `hf-sparse` this is a DENSE model.** It is a full model: the base model's files with the adapter
> inside, whose settings are in `config.json` under `hf_sparse` and whose tensors `hf_sparse.*` are in the last shard.
> `hf_sparse.from_pretrained` loads it with sparse attention. Plain `transformers` loads a dense model and warns that it
> did not use these tensors. No code of this repository runs, and nothing below holds for the dense model.
"""
_MERGED = """\
>
> LoRA is merged here: it was added to the weights, in their dtype, so it acts with dense attention too. What is
> measured below was measured before that.
"""

#: The sentence of each objective that every method can be trained with, by the kind of the model.
_OBJECTIVES: dict[Kind, dict[str, str]] = {
    "causal": {
        "distill": "The objective was the KL divergence from the same model with dense attention (self-distillation).",
        "lm": "The objective was the next-token loss.",
    },
    "masked": {
        "distill": "The objective was the KL divergence from the same model with dense attention (self-distillation), "
        "at hidden tokens.",
        "lm": "The objective was the loss of hidden tokens.",
    },
    "features": {
        "distill": "The objective was the cosine distance of the last hidden states, and of their means, from those of "
        "the same model with dense attention (self-distillation).",
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


@dataclass(frozen=True)
class AdapterFacts:
    """Hold what a card says of the adapter itself.

    Attributes:
        config: such as a `SparseKConfig`.
        base_model: Hub id of the base, `"demo"`, or `None` if it has no name that is true elsewhere.
        parameters: their number in the adapter, those of a head apart.
        lora_parameters: the number of LoRA's among them.
        head_parameters: their number in a head that was trained and saved with the adapter.
        model_class: the class that the adapter was made for; `None` for a causal language model's.
    """

    config: SparseConfig
    base_model: str | None
    parameters: int
    lora_parameters: int = 0
    head_parameters: int = 0
    model_class: str | None = None

    @property
    def task(self) -> ModelKind:
        """Return what the model is for, which decides the example and the widget of the Hub."""
        return task_of_class(self.model_class)

    @property
    def is_encoder(self) -> bool:
        """Tell whether its attention is bidirectional."""
        return attends_both_ways((self.config.base_shape or {}).get("model_type"), self.task)

    @property
    def base_on_hub(self) -> str | None:
        """Return the Hub id of the base; `None` if it has none."""
        return None if self.base_model == BASE_NAME else self.base_model


@dataclass(frozen=True)
class Measurements:
    """Hold what was measured of an adapter.

    Attributes:
        evaluation: content of eval.json; `None` if nothing was measured, which the card says.
        training: content of finetune.json; `None` if nothing is known of it, which the card says.
        left_out: files beside the card that are of other weights, or of nobody knows which.
    """

    evaluation: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """Say where an adapter is published.

    Attributes:
        repo_id: the name that a reader passes to `hf_sparse.from_pretrained`.
        form: whether the repository holds the adapter alone, or a full model with it inside.
        metadata: further entries of the metadata that are known, such as `license`, `license_link`, `language`.
        tags: further tags of the metadata.
    """

    repo_id: str
    form: Form = "adapter"
    metadata: Mapping[str, Any] | None = None
    tags: Sequence[str] = ()


def render(adapter: AdapterFacts, page: Page, measured: Measurements) -> str:
    """Return the README.md of an adapter's repository.

    Raises:
        DataError: a measurement lacks something that the card shows.
    """
    from jinja2 import UndefinedError

    metadata = _metadata(adapter, page, measured)
    try:
        text = _text(adapter, page, measured)
    except (UndefinedError, KeyError, AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"eval.json or finetune.json is not what hf-sparse writes: {error!r}") from error
    if page.form != "adapter":
        heading, _, rest = text.partition("\n")
        text = f"{heading}\n\n{_NOTICE}{_MERGED if page.form == 'merged' else ''}{rest}"
    return f"---\n{metadata.to_yaml()}\n---\n\n{text.rstrip()}\n"


def _metadata(adapter: AdapterFacts, page: Page, measured: Measurements) -> ModelCardData:
    """Return what the Hub reads of a card."""
    report, base, is_alone = report_of(adapter.config), adapter.base_on_hub, page.form == "adapter"
    kin = "adapter" if is_alone else "finetune"
    relation = [] if base is None else [f"base_model:{kin}:{base}"]  # the Hub finds what was made of a base by it
    tags = ["hf-sparse", report.name, "sparse-attention", *report.tags(adapter.is_encoder), *relation, *page.tags]
    known = {"datasets": _datasets(measured.training), "metrics": _metrics(measured.evaluation)}
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else kin,
        library_name="peft" if is_alone else "hf-sparse",  # else the Hub shows code that loads a dense model
        pipeline_tag=adapter.task.pipeline,
        tags=list(dict.fromkeys(tags)),
        **{name: value for name, value in {**known, **(page.metadata or {})}.items() if value},
    )


def _text(adapter: AdapterFacts, page: Page, measured: Measurements) -> str:
    """Return the text below the metadata."""
    config, evaluation, training = adapter.config, measured.evaluation, measured.training
    report, task = report_of(config), adapter.task
    objectives = {**_OBJECTIVES[task.kind], **report.objectives}
    example = _EXAMPLES[task.kind]
    if adapter.head_parameters:
        example = _WITH_LABELS.get(task.pipeline, example)
    return _template(report.templates / "card.md.jinja").render(
        config=config,
        form=page.form,
        config_file=Markup(CONFIG if page.form == "adapter" else MODEL_CONFIG),
        encoder=adapter.is_encoder,
        example=[Markup(line) for line in example],
        metric=metric_of(evaluation or {}),
        name=page.repo_id.split("/")[-1],
        repo_id=python_string(page.repo_id),
        parameters=adapter.parameters,
        lora_parameters=adapter.lora_parameters,
        head_parameters=adapter.head_parameters,
        peft_type=str(getattr(config.peft_type, "value", config.peft_type)),
        figure=report.figure,
        evaluation=evaluation,
        training=training,
        objective=_objective(objectives[training["objective"]], training["settings"]) if training else "",
        left_out=measured.left_out,
        versions=_versions(evaluation or training),
        **report.card(config, evaluation, adapter.is_encoder),
        **_base(page.repo_id, adapter.base_model, page.form),
    )


@cache
def _template(path: Path) -> "Template":
    """Return the compiled template of a file: compiling takes longer than filling it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # of HTML; this is Markdown
        finalize=escape,
    )
    environment.globals.update(change=_change, code=code, count=_count, machine=_machine, seen=sentence)
    return environment.from_string(path.read_text("utf-8"))


def _base(repo_id: str, base_model: str | None, form: Form) -> dict[str, Markup]:
    """Name the base model for the text, and say for the example how it is loaded."""
    repo = python_string(repo_id)
    if form != "adapter":  # the tokenizer is in the repository too, and so is the base model
        return {**_base(repo_id, base_model, "adapter"), "tokenizer": repo, "arguments": repo}
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
        "tokenizer": python_string(base_model),
        "arguments": repo,
    }


def _datasets(training: dict[str, Any] | None) -> list[str]:
    """List the dataset on the Hub that an adapter was trained on; nothing where it was a file or is not known."""
    name = (training or {}).get("dataset", {}).get("name")
    return [name] if isinstance(name, str) else []


def _objective(sentence: str, settings: dict[str, Any]) -> str:
    """Add to the sentence on an objective what was added to the objective, and what its teacher did not see."""
    added = {"lm_weight": "the next-token cross-entropy", "hidden_weight": "the distance of the hidden states"}
    terms = [f"{settings[name]:g} times {term}" for name, term in added.items() if settings.get(name)]
    more = f" Added to it was {' and '.join(terms)}." if terms else ""
    return f"{sentence}{more}{_teacher(settings)}"


def _teacher(settings: dict[str, Any]) -> str:
    """Say in a sentence what a teacher within a window did not see; nothing of one that saw all of its texts."""
    window, length = settings.get("teacher_window"), settings.get("length")
    if not (isinstance(window, int) and isinstance(length, int) and 0 < 2 * window < length):
        return ""
    return (
        f" The dense model attended to at least {window:,} tokens before each, to fewer than {2 * window:,}, and to "
        "the first ones of a text."
    )


def _metrics(evaluation: dict[str, Any] | None) -> list[str]:
    """List the metric of a measurement as the Hub names it; nothing where the Hub has no name for it."""
    return ["perplexity"] if evaluation and "perplexity" in evaluation else []


def _change(value: float, reference: float) -> str:
    """Write the relative difference of a value from a reference in percent."""
    return f"{100 * (value / reference - 1):+.1f} %"


def _count(value: Any) -> str:
    """Write a count with a comma between thousands."""
    return f"{int(value):,}"


def _machine(measurement: dict[str, Any]) -> str:
    """Describe in one line where a measurement was made, with everything that the file tells."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in measurement["machine"].items())


def _versions(measurement: dict[str, Any] | None) -> str:
    """List the versions that a measurement was made with; empty without one."""
    return ", ".join(f"{name} {version}" for name, version in (measurement or {"versions": {}})["versions"].items())
