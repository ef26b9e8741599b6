"""In compiled decoding steps one decoder layer stands for all, in every family; the tokens are those of eager steps."""

import runpy
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_sparse import SparsefinderConfig, SparseKConfig, patch, unpatch
from hf_sparse.methods.sparsek.baselines import Recency
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.regions import mark_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
CAUSAL = [
    pytest.param(name, marks=() if name == "llama" else pytest.mark.full)
    for name, family in FAMILIES.items()
    if family.causal
]
BUDGET = {"k": 6, "window": 8, "sinks": 2}
IDS = torch.randint(2, 64, (2, 30), generator=torch.Generator().manual_seed(0))
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def _begin_anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def static(backend) -> dict[str, object]:
    """Return the options of `generate` that compile its steps anywhere."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return {**OPTIONS, "cache_implementation": "static", "compile_config": config}


def noted(graphs: list[torch.fx.GraphModule]):
    """Return a backend of torch.compile that notes the graphs that it is given."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_through_autograds_tracer_choose_the_tokens_of_eager_ones(name):
    model = patch(FAMILIES[name].make(), SparseKConfig(**BUDGET))
    expected = model.generate(IDS, **OPTIONS)
    assert torch.equal(model.generate(IDS, **static("aot_eager")), expected)
    has_windows = bool(FAMILIES[name].local)  # a second graph is for static windows that are full
    assert counters["stats"]["unique_graphs"] == 1 + has_windows


def test_heads_with_budgets_of_their_own_are_in_regions():
    model = patch(FAMILIES["llama"].make(), SparseKConfig(**BUDGET, head_shares=[[0.5, 1.5], [1.25, 0.75]]))
    expected = model.generate(IDS, **OPTIONS)
    assert torch.equal(model.generate(IDS, **static("aot_eager")), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_call_one_graph(tiny_llama):
    """All but the first layer, whose count of tokens the model's masks read."""
    graphs: list[torch.fx.GraphModule] = []
    model = patch(tiny_llama(num_hidden_layers=4), SparseKConfig(**BUDGET, scorer="mlp"))
    model.generate(IDS, **static(noted(graphs)))
    calls = [node for node in graphs[0].graph.nodes if node.target is torch.ops.higher_order.invoke_subgraph]
    assert len(calls) >= 3 and len({node.args[1] for node in calls[-3:]}) == 1


@pytest.mark.parametrize(
    "reason", ["baseline", *(pytest.param(name, marks=pytest.mark.full) for name in ("method", "off"))]
)
def test_other_steps_compile_without_regions(tiny_llama, reason):
    graphs: list[torch.fx.GraphModule] = []
    config = SparsefinderConfig(predictor="full") if reason == "method" else SparseKConfig(**BUDGET)
    model = patch(tiny_llama(), config)
    for layer in sparse_layers(model):
        if reason == "baseline":
            layer.baseline = Recency()
        if reason == "off":
            layer.enable_adapters(False)
    expected = model.generate(IDS, **OPTIONS)
    assert torch.equal(model.generate(IDS, **static(noted(graphs))), expected)
    targets = {node.target for node in graphs[0].graph.nodes}
    assert torch.ops.higher_order.invoke_subgraph not in targets


def test_the_count_of_tokens_that_a_graph_reads_is_right(tiny_llama):
    """Without positions the model asks the cache how many tokens came, in the graph that counts them."""
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    mark_layers(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = []
    with torch.no_grad():
        for step in (model, compiled):
            output = model(IDS)
            parts = []
            for token in IDS[:, :5].T:
                cache = output.past_key_values if hasattr(output, "past_key_values") else output.cache
                output_of_step = step(token[:, None].clone(), past_key_values=cache)
                parts.append(output_of_step.logits)
            logits.append(torch.cat(parts, 1))
            assert all(layer.cumulative_length == 35 for layer in cache.layers)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def test_unpatch_takes_the_marks_off(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    model.generate(IDS, **static("eager"))
    assert all("forward" in vars(layer) for layer in model.model.layers)
    unpatch(model)
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert "get_compiled_call" not in vars(model)
