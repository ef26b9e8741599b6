"""Draw quality against the number of slots."""

from pathlib import Path
from typing import Any

from hf_sparse.figures.lines import draw_legend, draw_lines
from hf_sparse.figures.style import GREY, WIDTH, canvas, reading, sample
from hf_sparse.methods.sparsek.figures.looks import LOOKS, budget_unit
from hf_sparse.metrics import metric_of


def budgets_figure(evaluation: dict[str, Any], path: str | Path) -> None:
    """Draw the metric of a model, and the divergence where it was measured, against slots: `sweep` of eval.json.

    Args:
        evaluation: content of eval.json with two budgets or more, see `budgets_of`.
        path: the PNG to write.

    Raises:
        DataError: the content is not what hf-sparse writes.
    """
    with reading("eval.json"):
        metric = metric_of(evaluation)
        rows = budgets_of(evaluation)
        slots = [row["slots"] for row in rows]
        panels = [(metric.key, f"{metric.name.capitalize()} ({sample(evaluation)})", metric.unit)]
        if any(row.get("divergence") for row in rows):
            panels.append(("divergence", "Divergence from dense", "mean KL, nats per token, lower is better"))
    with canvas(path, WIDTH if len(panels) > 1 else 5.6, 4.2) as figure, reading("eval.json"):
        row_of_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (key, title, unit) in zip(row_of_axes, panels, strict=True):
            names = dict.fromkeys(name for row in rows for name in row.get(key) or ())
            series = {name: [(row.get(key) or {}).get(name) for row in rows] for name in names}
            if key == "divergence":
                series.pop("dense", None)  # 0 by definition, and no place on a logarithmic axis
            elif "dense" not in series and "dense" in evaluation[key]:
                series["dense"] = [evaluation[key]["dense"]] * len(rows)
            draw_lines(axes, slots, series, LOOKS)
            axes.set_xscale("log", base=2)
            axes.set_xticks(slots, [f"{count:,}" for count in slots])
            axes.set_xticks([], minor=True)
            axes.axvline(evaluation["budget"]["slots"], color=GREY, linewidth=0.8, zorder=1)
            axes.set_title(title)
            axes.set_xlabel(f"{budget_unit(evaluation)} (vertical line: the adapter's own)")
            axes.set_ylabel(unit)
        draw_legend(figure, row_of_axes[0], LOOKS)


def budgets_of(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measurements at each budget, the adapter's own among them, in the order of slots.

    Each is an entry of `sweep` of eval.json: `slots`, the metric of every selection, and maybe `divergence`.

    Raises:
        KeyError, TypeError, ValueError: the content is not what hf-sparse writes.
    """
    adapters_own = {
        **evaluation["budget"],
        **{key: evaluation[key] for key in _measured(evaluation) if key in evaluation},
    }
    rows = {int(row["slots"]): row for row in (*evaluation.get("sweep", ()), adapters_own)}  # last: its split counts
    return [rows[slots] for slots in sorted(rows)]


def _measured(evaluation: dict[str, Any]) -> tuple[str, str]:
    """Name the entries of eval.json that are measured at every budget."""
    return metric_of(evaluation).key, "divergence"
