"""What the analysis of graphs says is what a loop over the pairs says, and the model is left as it was."""

import copy
import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hf_sparse import SparsefinderConfig, SparseKConfig, attention_graphs, patch
from hf_sparse.data import IGNORED
from hf_sparse.errors import DataError
from hf_sparse.evaluation import evaluate, tables, using
from hf_sparse.evaluation.tasks import check_tasks
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit, fit_predictors
from hf_sparse.methods.sparsefinder.evaluation import CONTENDERS, describe_graphs
from hf_sparse.methods.sparsefinder.evaluation.patterns import Patterns, fit_windows
from hf_sparse.methods.sparsek.evaluation import divide_layers
from hf_sparse.ops.entmax import entmax
from hf_sparse.ops.tiles import Tiles
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
LENGTH = 90
IDS = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
LABELS = torch.full_like(IDS, IGNORED)
LABELS[:, 4::7] = IDS[:, 4::7]
MASKED = {"input_ids": IDS.masked_fill(LABELS != IGNORED, 1), "labels": LABELS}
SIZES = {"tile": 16, "sparsity": 0.5, "length": LENGTH, "window": 1, "clusters": 5, "bins": 4}
OPTIONS = {"progress": False, "sparsities": (0.5,)}


def sparse(name="llama", changes=None, **settings):
    model = patch(FAMILIES[name].make(**changes or {}), SparsefinderConfig(**SIZES | settings))
    with torch.no_grad():
        for method in sparse_layers(model, SparsefinderAttention):
            method.parameters_in_use.log_scale.fill_(-0.5)
    text = torch.randint(3, 64, (2, 64), generator=torch.Generator().manual_seed(1))
    fit_predictors(sparse_layers(model, SparsefinderAttention), lambda: model(text), generator=torch.Generator())
    return model


def data(name):
    return MASKED if name == "bert" else IDS


def captured(model, pattern="predicted", seed=0):
    """Texts and graphs of every layer, and the logits, of a forward in which a pattern attends."""
    methods, seen = sparse_layers(model, SparsefinderAttention), []
    for method in methods:
        method.pattern = Patterns(method, seed).pattern(pattern)
        method.observer = lambda text, graph, certificate: seen.append((text, graph))
    with torch.no_grad():
        logits = model.eval()(IDS if methods[0].causal else MASKED["input_ids"]).logits
    for method in methods:
        method.pattern = method.observer = None
    return seen, logits


def by_hand(text, graph):
    """Metrics per text and query head, pair by pair."""
    batch, heads, length = text.query.shape[:3]
    group = heads // text.key.shape[1]
    found = {name: torch.zeros(batch, heads) for name in ("sparsity", "recall", "mass_recall", "exact_rows")}
    for b in range(batch):
        for h in range(heads):
            logits = text.scaling[h] * (text.query[b, h] @ text.key[b, h // group].T)
            listed = graph.index[b % len(graph.index), h * graph.index.shape[1] // heads]
            pairs = edges = gold = both = exact = mass = 0
            for i in range(length):
                reach = i + 1 if text.causal else length
                p = entmax(logits[i, :reach], text.alpha).tolist()
                tiles = set(listed[i // graph.rows].tolist())
                missed = 0
                for j in range(reach):
                    predicted = j // graph.size in tiles
                    pairs += 1
                    edges += predicted
                    gold += p[j] > 0
                    both += predicted and p[j] > 0
                    missed += p[j] > 0 and not predicted
                    mass += p[j] * predicted
                exact += missed == 0
            of = {"sparsity": 1 - edges / pairs, "recall": both / gold}
            for key, value in {**of, "mass_recall": mass / length, "exact_rows": exact / length}.items():
                found[key][b, h] = value
    return found


@pytest.mark.cross("values")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("pattern", ["predicted", "longformer", "oracle"])
@pytest.mark.parametrize("query_tile", [None, 1])
def test_metrics_are_those_of_a_loop_over_the_pairs(name, pattern, query_tile):
    model = sparse(name, per_group=name == "llama", query_tile=query_tile)
    seen, logits = captured(model, pattern)
    result = evaluate(model, data(name), selections=[pattern], rows=LENGTH, **OPTIONS)
    found = result["points"][0]["results"][pattern]
    expected = [by_hand(*layer) for layer in seen]
    for key in expected[0]:
        per_head = torch.stack([layer[key].mean(0) for layer in expected])
        assert found[key] == pytest.approx(per_head.mean().item(), abs=2e-4), key
        if pattern == "predicted":
            torch.testing.assert_close(torch.tensor(result["points"][0]["heads"][key]), per_head, atol=1e-3, rtol=0)
    if name == "bert":
        hidden = LABELS != IGNORED
        nats, target = F.cross_entropy(logits[hidden], LABELS[hidden]).item(), LABELS[hidden]
        assert found["accuracy"] == pytest.approx((logits[hidden].argmax(-1) == target).float().mean().item())
    else:
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()
    assert found[result["metric"]] == pytest.approx(math.exp(nats), rel=1e-5)


def test_window_and_global_by_hand():
    """Of 6 tiles each query tile lists 3: its own, then the first, then the nearest."""
    (_, graph), *_ = captured(sparse(tiles_per_query=3), "longformer")[0]
    assert isinstance(graph, Tiles)
    rows = [row[row >= 0].tolist() for row in graph.index[0, 0]]
    assert rows == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]


def test_errors_compound():
    """The second layer is compared on the queries that the first layer's graph leads to."""
    model = sparse(tiles_per_query=1)
    (first, _), (second, _) = captured(model, "longformer")[0]
    (full_first, _), (full_second, _) = captured(model, "full")[0]
    assert torch.equal(first.query, full_first.query)
    assert (second.query - full_second.query).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_references_are_the_model_itself(name):
    model = sparse(name)
    result = evaluate(model, data(name), selections=["predicted"], **OPTIONS)
    assert result["full"]["divergence"] == 0 and result["full"]["recall"] == 1 and result["full"]["exact_rows"] == 1
    base = FAMILIES[name].make()
    with torch.no_grad():
        dense = base(IDS if name == "llama" else MASKED["input_ids"]).logits.log_softmax(-1)
    full = captured(model, "full")[1].log_softmax(-1)
    if name == "llama":
        dense, full, target = dense[:, :-1].flatten(0, 1), full[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    else:
        hidden = LABELS != IGNORED
        dense, full, target = dense[hidden], full[hidden], LABELS[hidden]
    assert result["dense"][result["metric"]] == pytest.approx(F.nll_loss(dense, target).exp().item(), rel=1e-5)
    apart = (full.exp() * (full - dense)).sum(-1).mean().item()
    assert result["dense"]["divergence"] == pytest.approx(apart, rel=1e-4)


@pytest.mark.cross("values")
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("query_tile", [None, 1])
def test_all_patterns_list_as_many_tiles(name, query_tile):
    model = sparse(name, query_tile=query_tile)
    result = evaluate(model, data(name), progress=False, sparsities=(0.3, 0.6))
    assert [point["sparsity"] for point in result["points"][1:]] == [0.3, 0.6]
    for point in result["points"]:
        assert set(point["results"]) == set(CONTENDERS)
        point["results"].pop("windows")  # divided among heads, whatever the predictor does
        sparsities = {round(values["tile_sparsity"], 9) for values in point["results"].values()}
        assert len(sparsities) == 1
        for values in point["results"].values():
            assert 0 <= values["certified_rows"] <= values["exact_rows"] + 1e-9 and values["added_tiles"] == 0


def test_divided_tiles_are_as_many_on_the_whole_and_the_oracle_has_the_same():
    results = evaluate(sparse(head_budgets=True), IDS, **OPTIONS)["points"][0]["results"]
    predicted, oracle, longformer = (results[name]["tile_sparsity"] for name in ("predicted", "oracle", "longformer"))
    assert predicted == pytest.approx(oracle) and predicted == pytest.approx(longformer, abs=0.1)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_windows_are_the_nearest_tiles_divided_by_what_they_gain(monkeypatch, name):
    """Of one layer, on the text that they are fitted to: no less than equal windows keep, for no more tiles."""
    monkeypatch.setattr(fit, "_POWER", 1.0)  # for the attention that is missed itself
    model = sparse(name, {"num_hidden_layers": 1}, window=0, global_tokens=0)
    (method,) = sparse_layers(model, SparsefinderAttention)
    with torch.no_grad():  # heads that attend to few keys and to many
        method.parameters_in_use.log_scale.copy_(torch.linspace(-3, 5, len(method.parameters_in_use.log_scale)))
    options = {"selections": ["longformer", "windows"], "rows": LENGTH, "progress": False, "sparsities": (0.4,)}
    results = evaluate(model, data(name), **options)["points"][-1]["results"]
    equal, divided = results["longformer"], results["windows"]
    assert divided["mass_recall"] >= equal["mass_recall"] + (1e-3 if name == "bert" else 0)
    assert divided["tile_sparsity"] >= equal["tile_sparsity"] - 1e-6
    of, shown = Patterns(method, 0), []
    fit_windows([of], lambda: model(data(name)["input_ids"] if name == "bert" else IDS))
    method.pattern, method.observer = of.pattern("windows"), lambda text, graph, _: shown.append(graph)
    with torch.no_grad():
        model.eval()(data(name)["input_ids"] if name == "bert" else IDS)
    widths = set()
    for head in shown[0].index[0]:
        rows = [row[row >= 0] for row in head]
        assert all(len(tiles) == int(tiles[-1] - tiles[0]) + 1 for tiles in rows)  # no gap
        widths.add(len(rows[-1]))
    assert name == "llama" or len(widths) > 1  # in the llama no head is more local than another


def test_in_one_layer_nothing_keeps_more_mass_than_the_oracle():
    model = sparse(changes={"num_hidden_layers": 1}, window=0, global_tokens=0)
    results = evaluate(model, IDS, rows=LENGTH, **OPTIONS)["points"][0]["results"]
    best = results.pop("oracle")["mass_recall"]
    assert all(values["mass_recall"] <= best + 1e-6 for values in results.values())
    assert best > 1.02 * results["bigbird"]["mass_recall"]


def test_embeddings_are_compared_with_the_dense_models():
    model = sparse("bert", {"model": "BertModel"})
    result = evaluate(model, IDS, **OPTIONS)
    assert result["metric"] == "embedding_similarity"
    assert result["dense"]["embedding_similarity"] == pytest.approx(1)
    with torch.no_grad():
        dense = FAMILIES["bert"].make(model="BertModel")(IDS).last_hidden_state.mean(1)
        found = model(IDS).last_hidden_state.mean(1)
    expected = F.cosine_similarity(found, dense, dim=-1).mean().item()
    assert result["points"][0]["results"]["predicted"]["embedding_similarity"] == pytest.approx(expected, rel=1e-5)
    assert "divergence" not in result["full"]


def test_completed_and_bounded_graphs_are_full_entmax():
    result = evaluate(sparse(complete=True, tiles_per_query=1), IDS, **OPTIONS)
    for point in result["points"]:
        found = point["results"]["predicted"]
        assert found["perplexity"] == pytest.approx(result["full"]["perplexity"], rel=1e-5)
        assert found["exact_rows"] == 1 and found["added_tiles"] > 0 and found["certified_rows"] < 1
    result = evaluate(sparse(predictor="bound"), IDS, **OPTIONS)
    own = result["points"][0]
    assert own["own"] and own["sparsity"] is None and list(own["results"]) == ["predicted"]
    assert own["results"]["predicted"]["certified_rows"] == own["results"]["predicted"]["exact_rows"] == 1
    assert "predicted" not in result["points"][1]["results"]


def test_graphs_of_tokens():
    result = evaluate(sparse(tile=None), IDS, **OPTIONS)
    own, half = result["points"]
    assert 0 < own["results"]["predicted"]["sparsity"] < 1 and "certified_rows" not in own["results"]["predicted"]
    assert set(half["results"]) == set(CONTENDERS) - {"predicted", "bound", "windows"}
    assert all(values["sparsity"] == pytest.approx(0.5, abs=0.01) for values in half["results"].values())


def test_the_predictor_full_has_baselines_only():
    results = evaluate(sparse(predictor="full"), IDS, **OPTIONS)["points"][0]["results"]
    assert set(results) == set(CONTENDERS) - {"predicted"}


def test_own_settings_are_measured_beside_the_sparsities():
    points = evaluate(sparse(tiles_per_query=2), IDS, selections=["predicted"], progress=False, sparsities=(0.1, 0.2))[
        "points"
    ]
    assert [(point["sparsity"], point["own"]) for point in points] == [(0.4762, True), (0.1, False), (0.2, False)]
    points = evaluate(sparse(), IDS, selections=["predicted"], progress=False, sparsities=(0.5, 0.7))["points"]
    assert [(point["sparsity"], point["own"]) for point in points] == [(0.5, True), (0.7, False)]


def without_machine(result):
    return {key: value for key, value in result.items() if key not in ("machine", "versions")}


def test_the_seed_decides():
    model, options = sparse(), {"selections": ["bigbird", "lsh", "routing"], "progress": False, "sparsities": (0.3,)}
    first, again, other = (without_machine(evaluate(model, IDS, seed=seed, **options)) for seed in (0, 0, 1))
    assert first == again
    for name in ("bigbird", "lsh"):
        assert first["points"][-1]["results"][name] != other["points"][-1]["results"][name]


def test_batches_change_nothing():
    model, options = sparse(), {"selections": ["predicted", "strided"], **OPTIONS}
    one, two = (evaluate(model, IDS, batch_size=size, **options)["points"][0]["results"] for size in (1, 2))
    for name in one:
        assert one[name] == pytest.approx(two[name], rel=1e-4)


def state(model):
    methods = sparse_layers(model, SparsefinderAttention)
    modes = [module.training for module in model.modules()]
    held = [(m.pattern, m.observer, m.certify, m.disable_adapters, copy.copy(vars(m.config))) for m in methods]
    return modes, held


def test_the_model_comes_back_as_it_was(monkeypatch):
    model = sparse(tiles_per_query=2).train()
    for method in sparse_layers(model, SparsefinderAttention):
        method.pattern = lambda text: None
        method.observer = lambda *seen: None
        method.switch(False)
    before = state(model)
    evaluate(model, IDS, **OPTIONS)
    describe_graphs(model, IDS[:1])
    assert state(model) == before

    def fail(*_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(Patterns, "_strided", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        evaluate(model, IDS, **OPTIONS)
    assert state(model) == before


def test_result():
    result = evaluate(sparse(), IDS, selections=["predicted"], text_name="words", **OPTIONS)
    assert result["method"] == "sparsefinder" and result["graphs"] == "compounded" and result["text"]["name"] == "words"
    assert list(result)[:7] == ["format", "method", "base_model", "adapter", "causal", "text", "metric"]
    (view,) = tables(result)
    assert view.row_count == 3


@pytest.mark.parametrize("name", ["predicted", "longformer", "oracle"])
def test_a_contender_can_be_used_alone(name):
    model = sparse().eval()
    _, expected = captured(model, name)
    before = state(model)
    with torch.no_grad(), using(model, name):
        assert torch.equal(model(IDS).logits, expected)
    with torch.no_grad(), using(model, "dense"):
        assert torch.equal(model(IDS).logits, FAMILIES["llama"].make()(IDS).logits)
    assert state(model) == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsities": (1.0,)}, r"sparsities must be a list of numbers, at least 0 and below 1, got \(1.0,\)"),
        ({"sparsities": 0.5}, "sparsities must be a list of numbers, .*got 0.5"),
        ({"selections": ["nearest"]}, r"selections must be among predicted, .*got \['nearest'\]"),
        ({"rows": 0}, "rows must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(sparse(), IDS, progress=False, **options)


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="expected a model with sparse attention, got a LlamaForCausalLM without"):
        evaluate(FAMILIES["llama"].make(), IDS)
    with pytest.raises(ValueError, match="expected a model with Sparsefinder attention"):
        describe_graphs(patch(FAMILIES["llama"].make(), SparseKConfig()), IDS[:1])
    with pytest.raises(ValueError, match="never fitted"):
        evaluate(patch(FAMILIES["llama"].make(), SparsefinderConfig(**SIZES)), IDS)
    with pytest.raises(DataError, match="a text of 16 tokens is one tile of 16; use longer chunks"):
        evaluate(sparse(), IDS[:, :16])
    for pattern in ("bound", "windows"):
        with pytest.raises(ValueError, match="chooses tiles of keys: expected an adapter with tiles, got tile=None"):
            evaluate(sparse(tile=None), IDS, selections=[pattern])
    with pytest.raises(ValueError, match="there is no predicted graph to measure"):
        evaluate(sparse(predictor="full"), IDS, selections=["predicted"])
    with pytest.raises(DataError, match="there is no predicted graph to draw"):
        describe_graphs(sparse(predictor="full"), IDS[:1])


def test_what_belongs_to_the_other_method():
    with pytest.raises(ValueError, match="'slots' is an option of sparsek: a sparsefinder model is"):
        evaluate(sparse(), IDS, slots=[32])
    with pytest.raises(ValueError, match="stride is no option of sparsefinder"):
        evaluate(sparse(), IDS, stride=8)
    with pytest.raises(ValueError, match="'sparsities' is an option of sparsefinder: a sparsek model is"):
        evaluate(patch(FAMILIES["llama"].make(), SparseKConfig(k=3, window=4, sinks=1)), IDS, sparsities=[0.5])
    with pytest.raises(ValueError, match="slots of SparseK attention, and the model has Sparsefinder attention"):
        divide_layers(sparse(), IDS)
    with pytest.raises(DataError, match="tasks compare contenders at a number of KV slots, got a Sparsefinder adapter"):
        check_tasks(sparse(), ["passkey"], lengths=[64])
    with (
        pytest.raises(ValueError, match="'routing' is fitted to the text"),
        using(sparse(), "routing"),
    ):
        pytest.fail("entered the block")


@pytest.mark.parametrize("query_tile", [None, 2])
def test_described_graphs_are_those_that_attend(query_tile):
    model = sparse("llama", per_group=True, query_tile=query_tile)
    seen, _ = captured(model)
    content = describe_graphs(model, IDS[:1], text_name="words")
    assert content["length"] == LENGTH and content["tile"] == 16 and len(content["heads"]) == 6
    assert content["query_tile"] == (query_tile or 16)
    recalls = [head["mass_recall"] for head in content["heads"]]
    assert recalls == sorted(recalls, reverse=True)
    for head in content["heads"]:
        text, graph = seen[head["layer"]]
        lists = graph.index[0, head["head"] // 2]
        assert head["predicted"] == [row[row >= 0].tolist() for row in lists]
        logits = text.scaling[head["head"]] * (text.query[0, head["head"]] @ text.key[0, head["head"] // 2].T)
        for i, keys in enumerate(head["gold"]):
            assert keys == entmax(logits[i, : i + 1], text.alpha).nonzero().squeeze(1).tolist()


def test_described_weights_are_those_of_attention_graphs():
    class Tokenizer:
        def decode(self, ids):
            return f"<{ids[0]}>"

    model = sparse("llama")
    weights = describe_graphs(model, IDS[:1], tokenizer=Tokenizer())["weights"]
    assert weights["tokens"] == [f"<{token}>" for token in IDS[0, :32].tolist()] and len(weights["heads"]) == 6
    graphs = attention_graphs(model, IDS[:1, :32])
    for head in weights["heads"]:
        dense = graphs[head["layer"]].weights.to_dense()[0, head["head"]]
        rows = [
            [[key, round(dense[i, key].item(), 4)] for key in row.nonzero()[:, 0].tolist()]
            for i, row in enumerate(dense)
        ]
        assert [[list(pair) for pair in row] for row in head["weights"]] == rows
    assert "weights" not in describe_graphs(model, IDS[:1])
