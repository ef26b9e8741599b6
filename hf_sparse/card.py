"""The model card: a template for each method, filled from the measurements and from nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_sparse.demo import BASE_NAME
from hf_sparse.errors import DataError
from hf_sparse.methods import method_of
from hf_sparse.metrics import metric_of
from hf_sparse.overlap import sentence
from hf_sparse.results import results_of
from hf_sparse.tasks import Kind, attends_both_ways, task_of_class

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


def render(
    config: Any,
    *,
    repo_id: str,
    base_model: str | None,
    parameters: int,
    lora_parameters: int = 0,
    evaluation: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    figure: str = "quality.png",
    model_class: str | None = None,
    license: Mapping[str, Any] | None = None,
) -> str:
    """README.md of an adapter's repository.

    Args:
        config: the adapter's, such as a `SparseKConfig`.
        repo_id: what a reader passes to `hf_sparse.from_pretrained`.
        base_model: Hub id of the base, `"demo"`, or `None` if it has no name that is true elsewhere.
        parameters: how many the adapter has.
        lora_parameters: how many of them are LoRA's.
        evaluation: content of eval.json; without it the card says that nothing was measured.
        training: content of finetune.json; without it the card says so.
        figure: name of the figure file, shown if there is an evaluation.
        model_class: the class that the adapter was made for; by default a causal language model's.
        license: `license`, `license_name` and `license_link` of the metadata, those that are known.

    Raises:
        DataError: a measurement lacks something that the card shows.
    """
    from jinja2 import Environment, StrictUndefined, UndefinedError

    results = results_of(config)
    task = task_of_class(model_class)
    encoder = attends_both_ways((config.base_shape or {}).get("model_type"), task)
    slots = method_of(config).attention.has_slots and not encoder
    on_hub = base_model not in (None, BASE_NAME)
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag=task.pipeline,
        tags=["hf-sparse", results.name, "sparse-attention", *results.tags, *(SLOTS_TAGS if slots else [])],
        **(license or {}),
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.globals.update(change=_change, count=_count, machine=_machine, seen=sentence)
    template = environment.from_string(Path(__file__).with_name(f"card_{results.name}.md.jinja").read_text("utf-8"))
    try:
        objective = _OBJECTIVES[task.kind][training["objective"]] if training else ""
        text = template.render(
            config=config,
            encoder=encoder,
            example=_EXAMPLES[task.kind],
            metric=metric_of(evaluation or {}),
            name=repo_id.split("/")[-1],
            repo_id=repo_id,
            parameters=parameters,
            lora_parameters=lora_parameters,
            peft_type=str(config.peft_type.value),
            figure=figure,
            evaluation=evaluation,
            training=training,
            objective=objective,
            versions=_versions(evaluation or training),
            **results.card(config, evaluation, encoder),
            **_base(repo_id, base_model),
        )
    except (UndefinedError, KeyError, AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"eval.json or finetune.json is not what hf-sparse writes: {error!r}") from error
    return f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n"


def _base(repo_id: str, base_model: str | None) -> dict[str, str]:
    """How the text names the base model, and how the example loads it."""
    if base_model == BASE_NAME:
        return {
            "base_text": "the small Llama that comes with `hf-sparse`",
            "tokenizer": f'hf_sparse.hub.resolve_base("{BASE_NAME}")',
            "arguments": f'"{repo_id}"',
        }
    if base_model is None:
        return {
            "base_text": "a base model that has no name on the Hub",
            "tokenizer": '"path/to/the/base"',
            "arguments": f'"{repo_id}", base_model="path/to/the/base"',
        }
    return {
        "base_text": f"[`{base_model}`](https://huggingface.co/{base_model})",
        "tokenizer": f'"{base_model}"',
        "arguments": f'"{repo_id}"',
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
