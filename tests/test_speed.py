"""The page about speed and the table in the README are what `benchmarks/tables.py` makes of the JSON."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load_tables():
    spec = importlib.util.spec_from_file_location("speed_tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    return json.loads((RESULTS / name).read_text("utf-8"))


def test_every_number_is_that_of_the_json():
    tables = load_tables()
    kernels = tables.joined_kernels([read("kernels-h200.json"), read("kernels-flash-h200.json")])
    wider = read("kernels-support4096-h200.json")
    models = ("model-scores-h200.json", "model-h200.json", "model-eager-h200.json", "model-earlier-h200.json")
    model = tables.joined([read(name) for name in models])
    profiles = [read("profiles-scores-h200.json"), read("profiles-h200.json")]
    first_calls, sizes = read("first_calls-h200.json"), read("sizes-h200.json")
    generate = [read("generate-h200.json"), read("generate-before-h200.json")]
    runs = ("entmax_kernels{}-h200.json", "entmax_kernels{}-earlier-h200.json")
    entmax = [[read(name.format(shape)) for name in runs] for shape in ("", "-128")]
    page = tables.page(kernels, wider, model, profiles, first_calls, sizes, "speed.png", generate, entmax)
    assert (ROOT / "docs" / "speed.md").read_text("utf-8") == page
    readme = (ROOT / "README.md").read_text("utf-8")
    assert tables.summary(kernels, model) in readme
    assert tables.generate_summary(generate[0]) in readme
