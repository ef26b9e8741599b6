"""Training on encoders: each objective against its formula, and the loop as for causal models."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from hf_sparse import SparseKConfig
from hf_sparse.data import IGNORED
from hf_sparse.errors import DataError
from hf_sparse.finetune import FinetuneConfig, finetune, objectives
from hf_sparse.methods.sparsek.attention_objective import attention
from hf_sparse.ops.selection.attention_mass import far_attention_mass
from hf_sparse.patches import sparse_layers

SHORT = {"steps": 6, "warm_start_steps": 3, "batch_size": 2, "warmup_steps": 1, "progress": False}
MASKED, BARE = "BertForMaskedLM", "BertModel"


@pytest.fixture
def sparse_bert(tiny_bert):
    """Makes a tiny BERT with SparseK; the same weights each time."""

    def make(kind=MASKED, **changes):
        torch.manual_seed(1)
        return get_peft_model(tiny_bert(kind), SparseKConfig(**{"k": 6, "window": 8, "sinks": 1, **changes}))

    return make


@pytest.fixture
def tokens():
    return torch.randint(5, 64, (12, 64), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def data(tokens):
    """What each kind of model learns from."""
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.2
    masked = {"input_ids": tokens.masked_fill(hidden, 4), "labels": tokens.masked_fill(~hidden, IGNORED)}
    return {MASKED: masked, BARE: tokens, "BertForSequenceClassification": tokens}


def soft(model):
    model.eval()
    for method in sparse_layers(model):
        method.train()
    return model


def scorers(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "sparsek_scorer" in name}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model, data, **changes):
    return finetune(model, data, FinetuneConfig(**{**SHORT, **changes}))


def test_masked_distill_is_the_divergence_at_hidden_tokens(sparse_bert, data):
    model, (chunks, labels) = soft(sparse_bert()), data[MASKED].values()
    loss = objectives.masked_distill(model, chunks, labels)
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=chunks).logits
    student = model(input_ids=chunks).logits
    divergences = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(loss, divergences[labels != IGNORED].mean())
    assert loss > 0


def test_masked_lm_is_the_loss_of_transformers(sparse_bert, data):
    model = soft(sparse_bert())
    loss = objectives.masked_lm(model, *data[MASKED].values())
    torch.testing.assert_close(loss, model(**data[MASKED]).loss)


@pytest.mark.parametrize("kind", [BARE, "BertForSequenceClassification"])
def test_feature_distill_is_the_distance_of_states(sparse_bert, tiny_bert, tokens, kind):
    model = soft(sparse_bert(kind))
    loss = objectives.feature_distill(model, tokens)
    with torch.no_grad():
        teacher = tiny_bert(kind).base_model(input_ids=tokens).last_hidden_state
    student = model.get_base_model().base_model(input_ids=tokens).last_hidden_state
    expected = 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
    expected = expected + 1 - F.cosine_similarity(student.mean(1), teacher.mean(1), dim=-1).mean()
    torch.testing.assert_close(loss, expected)
    assert loss > 0.01


def test_attention_reads_mass_from_both_sides(sparse_bert, tokens):
    model, seen = sparse_bert(BARE).eval(), []
    for method in sparse_layers(model):
        method.observer = lambda *call: seen.append(call)
    model(input_ids=tokens)
    expected = []
    for query, key, scores, scaling in seen:
        target = (far_attention_mass(query, key, window=8, scaling=scaling, causal=False) + 1e-6).log()[..., 1:]
        found = scores[..., 1:]
        expected.append(F.mse_loss(found - found.mean(-1, keepdim=True), target - target.mean(-1, keepdim=True)))
    torch.testing.assert_close(attention(model, tokens), torch.stack(expected).mean())


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        (MASKED, "distill"),
        (MASKED, "lm"),
        (BARE, "distill"),
        (BARE, "attention"),
        ("BertForSequenceClassification", "distill"),
    ],
)
def test_scorers_change_and_nothing_else(sparse_bert, data, kind, objective):
    model = sparse_bert(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics = train(model, data[kind], objective=objective)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("sparsek_scorer" in name), name
    assert metrics["trainable_parameters"] == 2 * 4 * 32
    support = [row["support"] for row in metrics["history"] if "support" in row]
    assert len(support) == (0 if objective == "attention" else 6) and all(6 <= size <= 24 for size in support)


@pytest.mark.parametrize(
    ("kind", "objective"), [(MASKED, "distill"), (MASKED, "attention"), (BARE, "distill"), (BARE, "attention")]
)
def test_the_loss_falls(sparse_bert, data, kind, objective):
    settings = {"steps": 25, "warm_start_steps": 0, "batch_size": 12, "learning_rate": 5e-2}
    history = train(sparse_bert(kind), data[kind], objective=objective, **settings)["history"]
    losses = [row["loss"] for row in history]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("kind", [MASKED, BARE])
@pytest.mark.parametrize("stop", [2, 5], ids=["warm start", "middle"])
def test_resumed_run_equals_uninterrupted(stopped, sparse_bert, data, tmp_path, kind, stop):
    whole = sparse_bert(kind)
    expected = train(whole, data[kind])["history"]

    with stopped(stop):
        train(sparse_bert(kind), data[kind], output_dir=str(tmp_path), checkpoint_every=1)
    resumed = sparse_bert(kind)
    history = train(resumed, data[kind], output_dir=str(tmp_path), resume=True)["history"]
    assert same(scorers(resumed), scorers(whole))
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]


def test_resume_refuses_other_hidden_tokens(sparse_bert, data, tmp_path):
    train(sparse_bert(), data[MASKED], output_dir=str(tmp_path), checkpoint_every=3)
    other = {**data[MASKED], "labels": data[MASKED]["labels"].clone().index_fill_(1, torch.tensor([9]), 7)}
    with pytest.raises(ValueError, match="different: chunks"):
        train(sparse_bert(), other, output_dir=str(tmp_path), resume=True)


def test_a_causal_model_without_a_head(tiny_llama, tokens):
    model = get_peft_model(tiny_llama().model, SparseKConfig(k=6, window=8, sinks=1))
    before = scorers(model)
    assert train(model, tokens, warm_start_steps=0)["history"][-1]["loss"] > 0
    assert not same(scorers(model), before)


def test_refusals(sparse_bert, tokens):
    with pytest.raises(ValueError, match=r"'lm' needs a model with a language modelling head.* distill, attention"):
        train(sparse_bert(BARE), tokens, objective="lm")
    with pytest.raises(ValueError, match="lm_weight and hidden_weight are for causal language models"):
        train(sparse_bert(BARE), tokens, lm_weight=0.1)
    with pytest.raises(DataError, match="hidden tokens and their labels"):
        train(sparse_bert(), tokens)
    with pytest.raises(DataError, match="chunks of 64 tokens cannot train a budget of 64 slots"):
        train(sparse_bert(BARE, window=57), tokens)
