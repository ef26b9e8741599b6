"""Training LoRA beside scorers and logit scales."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

import hf_sparse.finetune.optimiser_step as optimiser_step
from hf_sparse import SparsefinderConfig
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.finetune.objectives import distill
from hf_sparse.finetune.recompute import recomputed
from hf_sparse.patches import sparse_layers

SHORT = {"steps": 6, "warm_start_steps": 3, "batch_size": 2, "warmup_steps": 1, "progress": False}
RANK = 2
COUNT = 2 * RANK * (4 * 32 + 2 * 32 + 2 * 16)  # of 2 layers: inputs, outputs of q and o, outputs of k and v


def train(model, chunks, **changes):
    return finetune(model, chunks, FinetuneConfig(**{**SHORT, **changes}))


def learned(model, part=".sparse"):
    return {name: p.detach().clone() for name, p in model.state_dict().items() if part in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def sparse_finder(tiny_llama):
    def make(**changes):
        torch.manual_seed(1)
        settings = {"tile": 16, "clusters": 4, "sparsity": 0.3, "length": 96, **changes}
        return get_peft_model(tiny_llama(), SparsefinderConfig(**settings))

    return make


@pytest.mark.parametrize("objective", ["distill", "lm"])
def test_scorers_and_lora_change_and_nothing_else(sparse_llama, chunks, objective, tmp_path):
    model = sparse_llama(lora_rank=RANK)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics = train(model, chunks, objective=objective, output_dir=str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (".sparsek_" in name), name
    assert metrics["trained"] == "scorers and LoRA" and metrics["lora_parameters"] == COUNT
    assert metrics["trainable_parameters"] == COUNT + 2 * 2 * (32 + 1)
    assert metrics["settings"]["lora_learning_rate"] == 2e-4
    assert json.loads((tmp_path / "finetune.json").read_text()) == metrics


def test_a_run_without_lora_says_nothing_of_it(sparse_llama, chunks):
    metrics = train(sparse_llama(), chunks)
    assert metrics["trained"] == "scorers" and metrics["lora_parameters"] == 0
    assert "lora_learning_rate" not in metrics["settings"]
    with pytest.raises(ValueError, match="lora_learning_rate: the adapter has no LoRA, its lora_rank is 0"):
        train(sparse_llama(), chunks, lora_learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"lora_learning_rate must be a number above 0, got 0\.0"):
        train(sparse_llama(lora_rank=RANK), chunks, lora_learning_rate=0.0)


def test_the_objective_of_the_warm_start_trains_scorers_alone(sparse_llama, chunks):
    """Also beside LoRA that changes the states that scorers read."""
    model = sparse_llama(lora_rank=RANK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_lora." in name:
                parameter.normal_(std=0.2)
    before = learned(model)
    metrics = train(model, chunks, objective="attention")
    assert metrics["trained"] == "scorers" and metrics["lora_parameters"] == 0
    assert same(learned(model, "_lora."), {name: p for name, p in before.items() if "_lora." in name})
    assert not same(learned(model, "_scorer."), {name: p for name, p in before.items() if "_scorer." in name})
    assert all(p.requires_grad for name, p in model.named_parameters() if "_lora." in name)


def test_lora_has_its_own_learning_rate(sparse_llama, chunks):
    """The first step of AdamW is the learning rate, wherever there is a gradient; B starts at 0."""
    model = sparse_llama(lora_rank=RANK)
    before = learned(model, "_scorer.")
    train(model, chunks, steps=1, warm_start_steps=0, learning_rate=3e-2, lora_learning_rate=5e-4)
    for name, tensor in learned(model, "_B").items():
        assert tensor.abs().median().item() == pytest.approx(5e-4, rel=1e-2), name
    for name, tensor in learned(model, "_scorer.").items():
        assert (tensor - before[name]).abs().median().item() == pytest.approx(3e-2, rel=1e-2), name


def test_lora_does_not_shrink_the_steps_of_scorers(sparse_llama, chunks):
    """Gradients are clipped apart: with LoRA that stands still, scorers learn as without it."""
    plain, model = sparse_llama(), sparse_llama(lora_rank=RANK)
    train(plain, chunks, max_grad_norm=1e-3)
    train(model, chunks, max_grad_norm=1e-3, lora_learning_rate=1e-30)
    found, expected = learned(model, "_scorer."), learned(plain, "_scorer.")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_the_teacher_is_the_base_without_lora(sparse_llama, tiny_llama, chunks):
    """With a budget for the whole text, all that the student has of its own is LoRA."""
    model = sparse_llama(k=96, lora_rank=RANK).eval()
    assert distill(model, chunks).abs() < 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_lora." in name:
                parameter.normal_(std=0.2)
        student, teacher = (one(chunks).logits.log_softmax(-1).flatten(0, 1) for one in (model, tiny_llama()))
    expected = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    assert expected > 0.1
    torch.testing.assert_close(distill(model, chunks), expected, rtol=1e-4, atol=0)


@pytest.mark.full
def test_lora_lowers_the_loss_further(sparse_llama, chunks):
    options = {"steps": 15, "warm_start_steps": 0, "batch_size": 12, "learning_rate": 2e-2, "lm_weight": 0.0}
    plain, both = (
        [row["loss"] for row in train(sparse_llama(**adapter), chunks, **options, **rate)["history"]]
        for adapter, rate in (({}, {}), ({"lora_rank": RANK}, {"lora_learning_rate": 5e-3}))
    )
    assert both[-1] < 0.95 * plain[-1]


AFTER = {"lora_steps": 3, "lora_learning_rate": 1e-2}


def test_lora_after_the_scorers_learns_with_hard_selection(monkeypatch, sparse_llama, chunks):
    """Scorers end as they would without it, and every loss of its stage is that of the model in use."""
    plain, model = sparse_llama(), sparse_llama(lora_rank=RANK)
    alone = train(plain, chunks)["history"]
    modes, real = [], optimiser_step._schedule

    def watch(config, stage, step):
        modes.append((stage.label, {method.training for method in sparse_layers(model)}))
        return real(config, stage, step)

    monkeypatch.setattr(optimiser_step, "_schedule", watch)
    metrics = train(model, chunks, **AFTER)
    assert modes == [("attention", {True})] * 3 + [("distill", {True})] * 6 + [("lora", {False})] * 3
    assert [row["loss"] for row in metrics["history"][:9]] == [row["loss"] for row in alone]
    assert [row["stage"] for row in metrics["history"]] == [label for label, _ in modes]
    assert not any("support" in row for row in metrics["history"][9:])
    assert [row["learning_rate"] for row in metrics["history"][9:]] == pytest.approx([1e-2, 1e-2, 5e-3])
    assert same(learned(model, "_scorer."), learned(plain, "_scorer."))
    assert all(tensor.any() for tensor in learned(model, "_B").values())
    assert metrics["lora_parameters"] == COUNT and metrics["settings"]["lora_steps"] == 3


def test_lora_afterwards_lowers_the_divergence_of_the_model_in_use(sparse_llama, chunks):
    model = sparse_llama(lora_rank=RANK)
    options = {"warm_start_steps": 0, "steps": 1, "batch_size": 12, "learning_rate": 1e-12}
    before = distill(model.eval(), chunks).item()
    train(model, chunks, lora_steps=25, lora_learning_rate=1e-2, **options)
    assert distill(model, chunks).item() < 0.9 * before


def test_steps_for_lora_need_lora_and_scorers(sparse_llama, sparse_finder, chunks):
    with pytest.raises(ValueError, match="lora_steps: the adapter has no LoRA"):
        train(sparse_llama(), chunks, lora_steps=1)
    with pytest.raises(ValueError, match="lora_steps must be 0 for the objective 'attention'"):
        train(sparse_llama(lora_rank=RANK), chunks, objective="attention", lora_steps=1)
    with pytest.raises(ValueError, match="lora_steps must be an integer of at least 0, got -1"):
        train(sparse_llama(lora_rank=RANK), chunks, lora_steps=-1)
    with pytest.raises(ValueError, match="lora_steps: no setting for Sparsefinder"):
        train(sparse_finder(lora_rank=RANK), chunks, warm_start_steps=40, lora_steps=1)


@pytest.mark.cross("values")
@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        pytest.param(2, {}, id="warm start", marks=pytest.mark.full),
        pytest.param(5, {}, id="distill"),
        pytest.param(9, AFTER, id="before its own stage", marks=pytest.mark.full),
        pytest.param(11, AFTER, id="in its own stage"),
    ],
)
def test_resumed_run_equals_uninterrupted(stopped, sparse_llama, chunks, tmp_path, stop, changes):
    whole = sparse_llama(lora_rank=RANK)
    train(whole, chunks, **changes)

    with stopped(stop):
        train(sparse_llama(lora_rank=RANK), chunks, output_dir=str(tmp_path), checkpoint_every=1, **changes)
    resumed = sparse_llama(lora_rank=RANK)
    train(resumed, chunks, output_dir=str(tmp_path), resume=True, **changes)
    assert same(learned(resumed), learned(whole))
    other = sparse_llama(lora_rank=RANK, lora_alpha=1.0)
    with pytest.raises(ValueError, match="different: adapter"):
        train(other, chunks, output_dir=str(tmp_path), resume=True, **changes)


def test_layers_run_again_give_the_same_gradients(sparse_llama, chunks):
    model = sparse_llama(lora_rank=RANK).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_B"):
                parameter.normal_(std=0.2)
    for method in sparse_layers(model):
        method.train()
    found = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    found.append(torch.autograd.grad(distill(model, chunks), parameters))
    with recomputed(model):
        loss = distill(model, chunks)
    found.append(torch.autograd.grad(loss, parameters))
    for once, again in zip(*found, strict=True):
        assert once.any()
        torch.testing.assert_close(again, once, rtol=1e-6, atol=1e-9)


def test_sparsefinder_trains_it_beside_the_scales(sparse_finder, chunks):
    model = sparse_finder(lora_rank=RANK)
    before = learned(model)
    options = {"steps": 3, "warm_start_steps": 40, "learning_rate": 1e-2}
    metrics = train(model, chunks, graph_steps=2, **options)
    after = learned(model)
    assert metrics["lora_parameters"] == COUNT and metrics["trained"] == "logit scales and projections and LoRA"
    trained = [name for name in before if "_lora." in name or "scale" in name or "projection" in name]
    assert len(trained) == 2 * (8 + 3) and all(not torch.equal(after[name], before[name]) for name in trained)
    train(model, chunks, objective="graph", **options)
    again = learned(model)
    for name in trained:
        assert torch.equal(again[name], after[name]) != ("projection" in name), name
