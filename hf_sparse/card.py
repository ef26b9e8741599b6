"""The model card: a template for each method, filled from the measurements and from nothing else."""

from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCardData

from hf_sparse.demo import BASE_NAME
from hf_sparse.errors import DataError
from hf_sparse.figures.budgets import budgets_of
from hf_sparse.figures.style import DENSE, LOOKS, PATTERN_LOOKS
from hf_sparse.methods.sparsefinder import SparsefinderConfig
from hf_sparse.metrics import metric_of
from hf_sparse.tasks import Kind, attends_both_ways, task_of_class

TAGS = ["hf-sparse", "sparsek", "sparse-attention"]
GRAPH_TAGS = ["hf-sparse", "sparsefinder", "sparse-attention", "entmax"]
GENERATION_TAGS = ["kv-cache", "long-context"]

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

#: Selections of eval.json in the order of the table; `{}` is the number of slots.
_ROWS = {
    "dense": "all (dense attention of the base model)",
    "learned": "**{}: window, sinks, and the best-scored {} ones (this adapter)**",
    "recency": "{}: the most recent ones, and sinks",
    "window": "{}: the nearest ones, and sinks",
    "random": "{}: window, sinks, and {} ones at random",
    "key_norm": "{}: window, sinks, and the {} keys of smallest norm",
    "key_difference": "{}: window, sinks, and the {} keys least like the others (KeyDiff)",
    "h2o": "{}: window, sinks, and the {} ones most attended so far (H2O)",
    "tova": "{}: window, sinks, and the {} ones that the last query attends to most (TOVA)",
    "snapkv": "{}: window, sinks, and the {} ones that the latest queries vote for (SnapKV)",
    "oracle": "{}: window, sinks, and the {} ones that later queries will attend to most (sees the future)",
}

_WEAK = 0.5  # a base model that scores less cannot do the task

_SOFTMAX = "dense softmax (the base model)"

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
) -> str:
    """README.md of an adapter's repository.

    Args:
        config: the adapter's `SparseKConfig` or `SparsefinderConfig`.
        repo_id: what a reader passes to `hf_sparse.from_pretrained`.
        base_model: Hub id of the base, `"demo"`, or `None` if it has no name that is true elsewhere.
        parameters: how many the adapter has.
        lora_parameters: how many of them are LoRA's.
        evaluation: content of eval.json; without it the card says that nothing was measured.
        training: content of finetune.json; without it the card says so.
        figure: name of the figure file, shown if there is an evaluation.
        model_class: the class that the adapter was made for; by default a causal language model's.

    Raises:
        DataError: a measurement lacks something that the card shows.
    """
    from jinja2 import Environment, StrictUndefined, UndefinedError

    graphs = isinstance(config, SparsefinderConfig)
    task = task_of_class(model_class)
    encoder = attends_both_ways((config.base_shape or {}).get("model_type"), task)
    on_hub = base_model not in (None, BASE_NAME)
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag=task.pipeline,
        tags=GRAPH_TAGS if graphs else TAGS if encoder else TAGS + GENERATION_TAGS,
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.globals.update(change=_change, count=_count, machine=_machine)
    source = "card_sparsefinder.md.jinja" if graphs else "card.md.jinja"
    template = environment.from_string(Path(__file__).with_name(source).read_text("utf-8"))
    try:
        objective = _OBJECTIVES[task.kind][training["objective"]] if training else ""
        if graphs:
            shown: dict[str, Any] = {
                "budget": _graph_budget(config),
                "rows": graph_rows(evaluation) if evaluation else [],
            }
        else:
            kept = "other" if encoder else "older"
            labels = {"dense": DENSE, **{name: look.label for name, look in LOOKS.items()}}
            shown = {
                "rows": {name: label.format(config.slots, kept) for name, label in _ROWS.items()},
                "labels": labels,
                "budgets": budgets_of(evaluation) if evaluation else [],
                "tasks": [_task(name, task, labels) for name, task in (evaluation or {}).get("tasks", {}).items()],
            }
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
            **shown,
            **_base(repo_id, base_model),
        )
    except (UndefinedError, KeyError, AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"eval.json or finetune.json is not what hf-sparse writes: {error!r}") from error
    return f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n"


def _task(name: str, task: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """A task of eval.json as the card shows it: mean scores, those of each depth too, and what beats the scorers."""
    results: dict[str, Any] = task["results"]
    first = next(iter(results.values()))
    columns, depths = ["score"], None  # a number for each selection
    if isinstance(first, dict):
        columns, depths = [f"{length:,} tokens" for length in first["lengths"]], first.get("depths")
    scores: dict[str, list[list[float]]] = {}  # of each selection and length, at each depth
    for chosen, found in results.items():
        values = found["values"] if isinstance(found, dict) else [found]
        scores[chosen] = [list(column) for column in zip(*values, strict=True)] if depths else [[v] for v in values]
    means = {chosen: [fmean(column) for column in columns] for chosen, columns in scores.items()}
    own = means.get("learned", [1.0] * len(columns))
    others = [chosen for chosen in means if chosen not in ("dense", "learned")]
    better = {
        column: [labels[name] for name in others if means[name][at] > own[at]] for at, column in enumerate(columns)
    }
    return {
        "title": name.replace("_", " ").capitalize(),
        "metric": task["metric"].replace("_", " "),
        "settings": task["settings"],
        "columns": columns,
        "depths": depths,
        "rows": {labels[chosen]: [_scores(column) for column in columns] for chosen, columns in scores.items()},
        "better": {column: names for column, names in better.items() if names},
        "weak": weak if "dense" in means and (weak := fmean(means["dense"])) < _WEAK else None,
    }


def _scores(values: list[float]) -> str:
    mean = f"{fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{value:.2g}' for value in values)})"


def _graph_budget(config: SparsefinderConfig) -> list[tuple[str, str]]:
    """What a query attends to, by the settings of a Sparsefinder adapter."""
    first = [("first tokens of the text (global tokens)", str(config.global_tokens))]
    near = [("most recent tokens, in an encoder the nearest (window)", str(config.window)), *first]
    if config.predictor == "full":
        return [("keys", "all")]
    tile = "single tokens" if config.tile is None else f"{config.tile} tokens"
    how = {
        "clustering": _clusters(config),
        "quantization": f"{config.rank} x {config.bins} bins"
        if config.bin_kind == "shared"
        else f"bins of {config.bin_width} tokens",
        "distance": f"squared distance below {config.threshold:g}" if config.tile is None else "squared distance",
        "bound": "extremes of the keys of a tile",
    }[config.predictor]
    rows = [("predictor", f"{config.predictor}: {how}"), ("positions per tile", tile), *near]
    if config.rows != config.tile:
        rows[1:2] = [("keys per tile", tile), ("queries that have their list of tiles in common", str(config.rows))]
    if config.tile is not None and config.predictor != "bound":
        if config.tiles_per_query is not None:
            rows.append(("key tiles per query tile, all counted", f"**{config.tiles_per_query}**"))
        else:
            rows.append(("share of the pairs of tiles that is left out", f"**{config.sparsity:g}**"))
            rows.append(("tokens of a causal text for which that holds", str(config.length)))
            rows.append(("key tiles per query tile in a causal text", str(config.causal_tiles)))
        if config.head_budgets:
            rows.append(("divided among heads and layers by what they miss, these being the mean", "yes"))
    return [*rows, ("completed to be exact", "yes" if config.complete else "no")]


def _clusters(config: SparsefinderConfig) -> str:
    if config.cluster_parts > 1:
        return f"{config.clusters} clusters in each of {config.cluster_parts} parts of the points"
    return f"{config.clusters} clusters, a token in {1 if config.of_points else config.top_clusters}"


def graph_rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str, dict[str, float]]]:
    """Name, label, sparsity and measurements of each row of a table of graphs.

    Raises:
        KeyError, TypeError, ValueError: the content is not what hf-sparse writes.
    """
    rows = [("dense", _SOFTMAX, "", evaluation["dense"]), ("full", "full entmax", "", evaluation["full"])]
    for point in evaluation["points"]:
        for name, values in point["results"].items():
            shown = values["sparsity"] if point["sparsity"] is None else point["sparsity"]
            rows.append((name, PATTERN_LOOKS[name].label, f"{shown:.2f}{'*' if point['own'] else ''}", values))
    return rows


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
