"""Check that the tables of speed in the documents are what `benchmarks/tables.py` makes of the JSON."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("docs/speed.md", "README.md")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_tables", ROOT / "benchmarks" / "tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


def read(*names: str, machine: str = "h200") -> list[dict[str, Any]]:
    return [json.loads((RESULTS / f"{name}-{machine}.json").read_text("utf-8")) for name in names]


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    kernels = SCRIPT.joined_kernels(read("kernels-launches", "kernels", "kernels-flash"))
    model = SCRIPT.joined(read("model-scores", "model", "model-eager", "model-earlier"))
    wider, first_calls = read("kernels-support4096", "first_calls")
    sizes = read("sizes", "sizes-more", "sizes-soft")
    profiles = read("profiles-recorded", "profiles-launches", "profiles-scores", "profiles")
    generate = [
        SCRIPT.joined_generate(read("generate", "generate-8b", "generate-smollm2", "generate-smollm2-8k")),
        *read("generate-before"),
    ]
    recorded = read("recorded", "recorded-126f690", "recorded-earlier")
    first_static = read("first_static", "first_static-631e60f", "first_static-earlier")
    of_shapes = [path.name.removesuffix("-h200.json") for path in RESULTS.glob("kernels-shape-*-h200.json")]
    shapes = read(*sorted(of_shapes, key=len), "kernels-launches")  # a name with a commit is that of an earlier run
    (first_tokens,), prefills, entmax_prefills = read("generate-short"), read("prefill"), read("prefill-entmax")
    entmax = [read(f"entmax_kernels{shape}", f"entmax_kernels{shape}-earlier") for shape in ("", "-128")]
    (evaluation,) = read("evaluation")
    generate_cpu, before_cpu, busy = read("generate", "generate-before", "busy", machine="cpu")
    entmax_model, (conversion,) = read("entmax_model"), read("conversion")
    return SCRIPT.all_tables(
        kernels=kernels,
        wider=wider,
        model=model,
        profiles=profiles,
        first_calls=first_calls,
        sizes=sizes,
        generate=generate,
        entmax=entmax,
        evaluation=evaluation,
        cpu=[generate_cpu, before_cpu],
        busy=busy,
        entmax_model=entmax_model,
        conversion=conversion,
        steps=read("generate-entmax", "generate-predicted", "generate-entmax-more"),
        shapes=shapes,
        first_tokens=first_tokens,
        recorded=recorded,
        first_static=first_static,
        static=read("static_decode-8-layers", "static_decode-predicted"),
        prefills=prefills,
        entmax_prefills=entmax_prefills,
        recorded_steps=read("generate-entmax-recorded", "generate-predicted-recorded"),
        prediction=read(
            "entmax_prediction-4096",
            "entmax_prediction-smollm2",
            "entmax_prediction-c81fb3b",
            "entmax_prediction-contenders",
            "entmax_prediction-choices",
            "entmax_prediction-128k",
            "entmax_prediction",
        ),
        flex=read("entmax_prediction-flex"),
        bidirectional=read("entmax_bidirectional-1", "entmax_bidirectional-8"),
        lengths=read("finetune_length")[0],
        float8=read("finetune_fp8")[0],
        gpus=read("several_gpus", "several_gpus-05ba201"),
        teachers=read(
            *(f"finetune_teacher-{name}" for name in ("smollm2", "bundled", "smollm2-training", "bundled-training")),
            machine="cpu",
        ),
        products=read("products")[0],
        product_sizes=read("products-sizes")[0],
        head_shares=read("head_shares")[0],
        quality=read(
            *(
                f"predicted_quality-{name}"
                for name in ("qwen", "smollm2-8k", "smollm2", "smollm2-lora", "smollm2-unpatched")
            )
        ),
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_number_is_that_of_the_json(document, tables):
    text = (ROOT / document).read_text("utf-8")
    assert SCRIPT.fill(text, tables) == text


def test_every_table_has_a_place(tables):
    text = "".join((ROOT / document).read_text("utf-8") for document in DOCUMENTS)
    places = re.findall(r"<!-- table: (.*) -->", text)
    assert sorted(places) == sorted(tables)  # each once


def test_fill_replaces_what_is_marked_and_nothing_else():
    text = "before\n<!-- table: a -->\nold\n<!-- end -->\n<!-- table: a-b -->\nkept\n<!-- end -->\n"
    assert SCRIPT.fill(text, {"a": "new\n"}) == text.replace("old", "new")
    with pytest.raises(KeyError, match="'a'"):
        SCRIPT.fill(text, {})
