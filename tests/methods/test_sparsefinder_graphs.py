"""`hf_sparse.attention_graphs` returns what attention used: graph and weights, of padded batches too."""

import runpy
from pathlib import Path

import pytest
import torch
from entmax import entmax15
from peft import get_peft_model

import hf_sparse
from hf_sparse import SparsefinderConfig, SparseKConfig, attention_graphs, patch
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
from hf_sparse.ops.tiles import Tiles
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
SIZES = {"tile": 16, "tiles_per_query": 2, "window": 1, "clusters": 5, "top_clusters": 1, "bins": 4}
SETTINGS = {
    "tiles": {},
    "a list per query, by group": {"query_tile": 1, "tile": 8, "per_group": True},
    "single tokens": {"tile": None},
    "complete": {"complete": True},
    "bound": {"predictor": "bound"},
    "full": {"predictor": "full"},
}
LENGTH = 70
LENGTHS = (LENGTH, 41, 7)
IDS = torch.randint(3, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))
MODELS = ("llama", "bert", "modernbert")


def sparse(name="llama", settings="tiles"):
    model = patch(FAMILIES[name].make(), SparsefinderConfig(**SIZES | SETTINGS[settings]))
    text = torch.randint(3, 64, (2, 64), generator=torch.Generator().manual_seed(1))
    fit_predictors(sparse_layers(model, SparsefinderAttention), lambda: model(text))
    return model.eval()


def padded(side):
    """Ids and mask of a batch whose texts begin or end late, or have a hole in them."""
    mask = torch.zeros(3, LENGTH, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        begin = LENGTH - length if side == "left" else 0
        mask[row, begin : begin + length] = 1
    ids = torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        ids[row, mask[row].bool()] = IDS[row, :length]
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def attended(model, inputs):
    """Return what each layer attends to in a forward, text by text: inputs of the attention, its graph, its output."""
    layers, seen = sparse_layers(model, SparsefinderAttention), []

    def observe(text, graph, certificate):
        seen.append((text, graph if certificate is None else certificate.tiles))

    for layer in layers:
        layer.observer = observe
    model(**inputs)
    for layer in layers:
        layer.observer = None
    return seen


@pytest.mark.cross
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_graph_and_weights_are_those_that_attention_used(name, settings, side):
    """The pairs are those of the observed graph; the weights are entmax of the float64 logits of these pairs."""
    model = sparse(name, settings)
    inputs = {"input_ids": IDS} if side is None else padded(side)
    valid = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
    graphs = attention_graphs(model, inputs)
    local = FAMILIES[name].local
    assert sorted(graphs) == [n for n in range(model.config.num_hidden_layers) if n not in local]
    texts_of = {number: [] for number in graphs}
    for text, graph in attended(model, inputs):
        for row in range(len(text.query)):
            texts_of[text.layer].append((text, graph, row))
    for number, graph in graphs.items():
        weights, pairs = graph.weights.to_dense(), graph.pairs().to_dense()
        assert graph.layer == number and graph.causal == FAMILIES[name].causal and torch.equal(graph.valid, valid)
        assert len(texts_of[number]) == len(IDS)
        for place, (text, used, row) in enumerate(texts_of[number]):
            length, heads = text.key.shape[2], text.query.shape[1]
            edges = torch.ones(heads, length, length, dtype=torch.bool)
            if isinstance(used, Tiles):
                edges = used.edges(length, length, causal=text.causal)
                edges = edges[min(row, len(edges) - 1)].repeat_interleave(heads // edges.shape[1], 0)
            elif used is not None:
                edges = used[row].expand(heads, -1, -1)
            edges = edges.tril() if text.causal else edges
            key = text.key[row].double().repeat_interleave(heads // text.key.shape[1], 0)
            logits = text.scaling[:, None, None].double() * (text.query[row].double() @ key.transpose(-1, -2))
            expected = entmax15(logits.masked_fill(~edges, -torch.inf), dim=-1)
            real = valid[place].nonzero()[:, 0]
            corner = (place, slice(None), real[:, None], real)
            assert torch.equal(pairs[corner], edges)
            torch.testing.assert_close(weights[corner].double(), expected, rtol=0, atol=1e-5)
            assert not pairs[place, :, ~valid[place]].any() and not pairs[place, :, :, ~valid[place]].any()
            assert weights[place].count_nonzero() == weights[corner].count_nonzero()
        assert not (weights.bool() & ~pairs).any()


def test_memory_is_that_of_what_is_there():
    """There is an entry for each weight, one for each listed tile, and none for what is not attended to."""
    graph = attention_graphs(sparse(), IDS, layers=[1])[1]
    dense = graph.weights.to_dense()
    assert graph.weights._nnz() == dense.count_nonzero() < 0.5 * dense.numel()
    assert graph.tiles.index.shape == (3, 4, 5, 2)


def test_full_is_entmax_over_all_keys():
    predicted, full = (attention_graphs(sparse(), IDS, full=full) for full in (False, True))
    expected = attention_graphs(sparse(settings="full"), IDS)
    assert full[1].tiles is None and predicted[1].tiles is not None
    for number in (0, 1):
        assert torch.equal(full[number].weights.to_dense(), expected[number].weights.to_dense())
    assert not torch.equal(predicted[1].weights.to_dense(), full[1].weights.to_dense())


def test_a_peft_model_is_left_as_it_was():
    model = get_peft_model(FAMILIES["llama"].make(), SparsefinderConfig(**SIZES | {"predictor": "bound"})).train()
    layers = sparse_layers(model, SparsefinderAttention)
    with model.disable_adapter():
        graphs = attention_graphs(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, layers=[1])
        assert all(layer.disable_adapters for layer in layers)
    assert list(graphs) == [1] and graphs[1].weights.requires_grad is False
    assert all(layer.training and layer.observer is None and layer.pattern is None for layer in layers)
    torch.testing.assert_close(graphs[1].weights.to_dense().sum(-1), torch.ones(3, 4, LENGTH), rtol=0, atol=1e-5)


def test_a_row_of_padding_alone_has_nothing():
    inputs = padded("right")
    inputs["attention_mask"][1] = 0
    graph = attention_graphs(sparse("bert"), inputs, layers=[0])[0]
    assert not graph.weights.to_dense()[1].any() and not graph.pairs().to_dense()[1].any()
    assert graph.weights.to_dense()[2].any()


@pytest.mark.parametrize(
    "inputs, layers, message",
    [
        (IDS, [0, 1], r"expected layers with Sparsefinder attention, 0, 2, got 1"),
        (IDS[0], None, r"expected token ids \[B, T\], as a tokenizer returns with .*, got torch.int64 \[70\]"),
        ("a text", None, r"expected token ids \[B, T\], .*, got str"),
        ({"input_ids": [[3, 4]]}, None, r"expected token ids \[B, T\], .*, got list"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 5)}, None, r"expected an attention_mask \[3, 70\] .*, got"),
    ],
    ids=["layer", "shape", "text", "list", "mask"],
)
def test_what_is_refused(inputs, layers, message):
    with pytest.raises(ValueError, match=message):
        attention_graphs(sparse("modernbert"), inputs, layers)


def test_other_models_are_refused():
    for model in (FAMILIES["llama"].make(), patch(FAMILIES["llama"].make(), SparseKConfig(k=3, window=4, sinks=1))):
        with pytest.raises(ValueError, match="expected a model with Sparsefinder attention, got a LlamaForCausalLM"):
            hf_sparse.attention_graphs(model, IDS)
    unfitted = patch(FAMILIES["llama"].make(), SparsefinderConfig(**SIZES))
    with pytest.raises(ValueError, match="never fitted"):
        attention_graphs(unfitted, IDS)
