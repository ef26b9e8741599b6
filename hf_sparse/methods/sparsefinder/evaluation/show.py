"""Make tables of the measurements of graphs."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_sparse.metrics import metric_of
from hf_sparse.overlap import sentence

_SHARES = {
    "mass_recall": "mass recall",
    "recall": "edge recall",
    "exact_rows": "exact rows",
    "certified_rows": "certified rows",
}


def point_name(point: dict[str, Any]) -> str:
    """Name a point of eval.json: `0.8`, or `own` for a graph that decides on its own size."""
    return "own" if point["sparsity"] is None else f"{point['sparsity']:g}"


def graph_table(result: dict[str, Any]) -> Table:
    """Return the table of all graphs of an eval.json."""
    text, metric, adapter = result["text"], metric_of(result), result["adapter"]
    caption = f"{text['chunks']} chunks of {text['length']} tokens" + (
        f" of {escape(text['name'])}" if text["name"] else ""
    )
    caption += "; * the adapter's own number of tiles; graphs compound through the layers"
    caption += f"\n{told}" if (told := sentence(text)) else ""
    tile = f"tiles of {adapter['tile']}" if adapter["tile"] else "single tokens"
    if query_tile := adapter.get("query_tile"):
        tile += f", a list for {'each query' if query_tile == 1 else f'{query_tile} queries'}"
    view = Table(
        title=f"{escape(str(result['base_model']))}: {adapter['predictor']}, {tile}",
        caption=caption,
    )
    apart = "divergence" in result["full"]
    right = "accuracy" in result["full"]
    headers = ["attention", "tile sparsity", metric.name, *(["accuracy"] if right else [])]
    headers += [*(["KL from full entmax, nats"] if apart else []), "token sparsity", *_SHARES.values()]
    for number, header in enumerate(headers):
        view.add_column(header, justify="right" if number else "left", no_wrap=not number, overflow="fold")

    def add(name: str, sparsity: str, values: dict[str, float]) -> None:
        shares = [f"{values[key]:.3f}" if key in values else "" for key in ("sparsity", *_SHARES)]
        cells = [metric.show(values[metric.key])]
        cells += [f"{values['accuracy']:.3f}"] if right else []
        cells += [f"{values['divergence']:.4f}"] if apart else []
        view.add_row(name, sparsity, *cells, *shares, style="bold" if name == "predicted" else None)

    if adapter.get("entmax_native") is None:
        add("dense softmax", "", result["dense"])
    add("full entmax", f"gold {result['full']['gold_sparsity']:.3f}", result["full"])
    for point in result["points"]:
        view.add_section()
        for name, values in point["results"].items():
            add(name, point_name(point) + ("*" if point["own"] else ""), values)
    return view
