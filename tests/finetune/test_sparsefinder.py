"""Sparsefinder in the loop: what each stage trains, what is fitted in the end, and that a resumed run is the run."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import SparsefinderConfig
from hf_sparse.data import IGNORED, pack
from hf_sparse.demo import CHECKPOINT
from hf_sparse.demo.text import documents
from hf_sparse.errors import DataError
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.methods.sparsefinder.graph_loss import graph_loss
from hf_sparse.ops.entmax import support
from hf_sparse.ops.predictors.losses import info_nce
from hf_sparse.ops.tiles.allowed import allowed_edges
from hf_sparse.patches import sparse_layers

SHORT = {"steps": 4, "graph_steps": 3, "batch_size": 2, "warmup_steps": 1, "graph_rows": 24, "progress": False}
SIZES = {"tile": 16, "tiles_per_query": 2, "window": 1, "clusters": 4, "head_budgets": True}
SCALES, GRAPH = {"log_scale", "alpha_logit"}, {"query_projection", "query_bias", "key_projection", "projection"}
FITTED = {"centroids", "boundaries", "profile", "budgets"}


@pytest.fixture
def sparse(tiny_llama):
    def make(model=None, **changes):
        torch.manual_seed(1)
        return get_peft_model(model or tiny_llama(), SparsefinderConfig(**SIZES | changes))

    return make


def train(model, data, **changes):
    return finetune(model, data, FinetuneConfig(**SHORT | changes))


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(before, after):
    return {name.rpartition(".")[2] for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.cross("values")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("learn_alpha", [False, True])
def test_each_stage_trains_its_own_parameters(sparse, chunks, learn_alpha, shared):
    model = sparse(learn_alpha=learn_alpha, shared_projection=shared)
    scales = {"log_scale", "alpha_logit"} if learn_alpha else {"log_scale"}
    unfitted = FITTED & {name.rpartition(".")[2] for name in model.state_dict()}  # NaN, which equals nothing
    before = state(model)
    metrics = train(model, chunks, graph_steps=0)
    assert changed(before, state(model)) == scales | unfitted and unfitted == {"centroids", "profile", "budgets"}
    assert metrics["trainable_parameters"] == 2 * 4 * len(scales)
    before = state(model)
    train(model, chunks, objective="graph")
    projections = {"projection"} if shared else {"query_projection", "query_bias", "key_projection"}
    assert changed(before, state(model)) == projections | unfitted
    assert not any(tensor.isnan().any() for tensor in state(model).values())
    assert not model.training and not any(method.training for method in sparse_layers(model))
    assert all(p.requires_grad == ("sparsefinder_" in name) for name, p in model.named_parameters())
    assert all(method.observer is None and method.pattern is None for method in sparse_layers(model))


@pytest.mark.parametrize(
    "objective, share",
    [("distill", 0.5), *(pytest.param(*case, marks=pytest.mark.full) for case in (("lm", 0.96), ("graph", 0.5)))],
)
def test_the_loss_falls(sparse, objective, share):
    """On the bundled model, whose attention matters: it has to learn that its logits are far too sharp for entmax."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    texts = pack(tokenizer, next(documents("held_out")), 128)[:4]
    model = sparse(AutoModelForCausalLM.from_pretrained(CHECKPOINT), initial_scale=1.0)
    rates = {"learning_rate": 0.2, "graph_learning_rate": 5e-2}
    metrics = train(model, texts, objective=objective, steps=7, graph_steps=0, batch_size=4, **rates)
    losses = [row["loss"] for row in metrics["history"]]  # of the same four chunks each time
    assert losses[-1] < share * losses[0]


@pytest.mark.parametrize(
    "loss",
    [
        "profile_nce",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("info_nce", "pair_hinge", "mass_hinge", "sum_hinge")),
    ],
)
def test_every_graph_loss_falls(sparse, chunks, loss):
    settings = {"objective": "graph", "steps": 30, "batch_size": 6, "graph_loss": loss, "graph_learning_rate": 3e-2}
    losses = [row["loss"] for row in train(sparse(), chunks, **settings)["history"]]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])


def test_metrics(sparse, chunks, tmp_path):
    metrics = train(sparse(), chunks, output_dir=str(tmp_path))
    assert json.loads((tmp_path / "finetune.json").read_text()) == metrics
    assert [row["stage"] for row in metrics["history"]] == ["distill"] * 4 + ["graph"] * 3
    assert [row["learning_rate"] for row in metrics["history"]][::4] == [2e-2, 1e-2]  # each stage warms up in one step
    assert "warm_start_steps" not in metrics["settings"] and metrics["settings"]["graph_rows"] == 24
    before, after = metrics["scales"]["before"], metrics["scales"]["after"]
    assert after["loss"] < before["loss"] and 0 < before["density"] < 1 and after["density"] != before["density"]
    assert metrics["history"][0]["density"] != metrics["history"][3]["density"]


def test_density_is_the_share_of_allowed_pairs(sparse, chunks):
    model, seen = sparse(), []
    for method in sparse_layers(model, SparsefinderAttention):
        method.pattern = lambda text: None
        method.observer = lambda text, *_: seen.append(
            support(text.query, text.key, alpha=1.5, scaling=text.scaling, causal=True)[0].sum() / (2 * 4 * 64 * 65 / 2)
        )
    short = chunks[:, :64]
    with torch.no_grad():
        model(input_ids=short[:2])
    expected = float(torch.stack(seen).mean())
    for method in sparse_layers(model, SparsefinderAttention):
        method.pattern = method.observer = None
    found = train(model, short, graph_steps=0)["scales"]["before"]["density"]
    assert found == pytest.approx(expected)


def test_the_graph_loss_is_the_mean_over_layers_and_has_its_gradient(sparse, chunks):
    model = sparse().eval()
    methods, seen = sparse_layers(model, SparsefinderAttention), []
    for method in methods:
        method.train()
        method.observer = lambda text, *_: seen.append(text)
    with torch.no_grad():
        model(input_ids=chunks[:2])
    losses = []
    for method, text in zip(methods, seen, strict=True):
        method.observer = None
        learned = method.parameters_in_use
        options = {"alpha": 1.5, "scaling": text.scaling.detach(), "causal": True}
        _, gold = support(text.query, text.key, **options)
        points = learned.project_queries(text.query), learned.project_keys(text.key)
        losses.append(info_nce(*points, gold, allowed_edges(torch.arange(96), 96, causal=True)))
    expected = torch.stack(losses).mean()
    wanted = torch.autograd.grad(expected, [p for m in methods for p in m.parameters_in_use.projections()])
    loss = graph_loss(model, methods, chunks[:2], kind="info_nce", rows=1000, seed=0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for method in methods:
        for name, parameter in method.parameters_in_use.named_parameters():
            assert (parameter.grad is None) == (name in SCALES)
    found = [p.grad for m in methods for p in m.parameters_in_use.projections()]
    torch.testing.assert_close(found, list(wanted))


@pytest.mark.cross("values")
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(2, id="scales"),
        pytest.param(4, id="stage boundary", marks=pytest.mark.full),
        pytest.param(5, id="graph"),
        pytest.param(7, id="end", marks=pytest.mark.full),
    ],
)
def test_resumed_run_equals_uninterrupted(stopped, sparse, chunks, tmp_path, stop):
    whole = sparse()
    expected = train(whole, chunks)

    with stopped(stop):
        train(sparse(), chunks, output_dir=str(tmp_path), checkpoint_every=1)
    resumed = sparse()
    metrics = train(resumed, chunks, output_dir=str(tmp_path), resume=True)
    assert same(state(resumed), state(whole))
    assert metrics["scales"] == expected["scales"]
    assert [row["loss"] for row in metrics["history"]] == [row["loss"] for row in expected["history"]]


def test_what_was_fitted_travels(sparse, tiny_llama, chunks, tmp_path):
    model = sparse()
    train(model, chunks)
    model.save_pretrained(tmp_path)
    loaded = hf_sparse.from_pretrained(tmp_path, base_model=tiny_llama())
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=chunks[:2]).logits, model(input_ids=chunks[:2]).logits)


def test_scales_alone_leave_the_predictor_unfitted(sparse, chunks):
    model = sparse()
    train(model, chunks, graph_steps=0)
    with pytest.raises(ValueError, match="this clustering predictor was never fitted"):
        model(input_ids=chunks[:1])


@pytest.mark.parametrize("predictor", ["bound", "full"])
def test_without_projections_there_is_one_stage(sparse, chunks, predictor):
    model = sparse(predictor=predictor)
    assert {row["stage"] for row in train(model, chunks)["history"]} == {"distill"}
    with torch.no_grad():
        model(input_ids=chunks[:1])
    with pytest.raises(ValueError, match=f"trains projections, and the predictor '{predictor}' has none"):
        train(model, chunks, objective="graph")


def test_alpha_grows_to_its_own(sparse, chunks):
    model = sparse()
    history = train(model, chunks, steps=3, graph_steps=0, alpha_start=1.1)["history"]
    assert [row["alpha"] for row in history] == pytest.approx([1.1, 1.3, 1.5])
    assert sparse_layers(model, SparsefinderAttention)[0].config.alpha == 1.5
    plain = sparse()
    train(plain, chunks, steps=3, graph_steps=0)
    assert not same(state(plain), state(model))


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel"])
def test_encoders(sparse, tiny_bert, kind):
    tokens = torch.randint(5, 64, (12, 64), generator=torch.Generator().manual_seed(2))
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.2
    masked = {"input_ids": tokens.masked_fill(hidden, 4), "labels": tokens.masked_fill(~hidden, IGNORED)}
    model = sparse(tiny_bert(kind), predictor="distance")
    metrics = train(model, masked if kind == "BertForMaskedLM" else tokens, steps=10)
    assert metrics["scales"]["after"]["loss"] < metrics["scales"]["before"]["loss"]
    assert not any(tensor.isnan().any() for tensor in state(model).values())
    with torch.no_grad():
        assert model(input_ids=tokens[:1])[0].isfinite().all()


def test_refusals(sparse, chunks):
    with pytest.raises(ValueError, match="Sparsefinder has no objective 'attention'; choose one of distill, lm, graph"):
        train(sparse(), chunks, objective="attention")
    with pytest.raises(ValueError, match="final_scale, warm_start_steps: no setting for Sparsefinder"):
        train(sparse(), chunks, warm_start_steps=3, final_scale=2.0)
    with pytest.raises(ValueError, match=r"alpha_start must be None, for alpha is learned here; got 1\.2"):
        train(sparse(learn_alpha=True), chunks, alpha_start=1.2)
    with pytest.raises(ValueError, match=r"'profile_nce' needs SparsefinderConfig\(profile=True\) and a tile"):
        train(sparse(profile=False), chunks)
    with pytest.raises(DataError, match=r"chunks of 31 tokens have no graph of tiles .* at least two tiles of 16"):
        train(sparse(), chunks[:, :31])
    with pytest.raises(DataError, match="1152 training tokens are too few to fit 5000 clustering buckets"):
        train(sparse(clusters=5000), chunks)


def test_sparsek_refuses_what_is_sparsefinders(sparse_llama, chunks):
    with pytest.raises(ValueError, match="SparseK has no objective 'graph'"):
        finetune(sparse_llama(), chunks, FinetuneConfig(objective="graph"))
    with pytest.raises(ValueError, match="graph_steps: no setting for SparseK"):
        finetune(sparse_llama(), chunks, FinetuneConfig(graph_steps=3))
