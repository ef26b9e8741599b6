"""A checkpoint that was trained with entmax, patched with `entmax_native`, is the model that it was trained as."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from entmax import entmax15, entmax_bisect, sparsemax
from peft import PeftModel, get_peft_model
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb
from typer.testing import CliRunner

import hf_sparse
from hf_sparse import SparsefinderConfig, attention_graphs, cli, patch
from hf_sparse.data import IGNORED
from hf_sparse.errors import DataError
from hf_sparse.evaluation import evaluate, tables, using
from hf_sparse.finetune import FinetuneConfig, finetune
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.methods.sparsefinder.evaluation import describe_graphs
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
SIZES = {"tile": 8, "sparsity": 0.5, "window": 4, "clusters": 4}
LENGTH = 48
LENGTHS = (LENGTH, 29, 5)
IDS = torch.randint(3, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))
TRANSFORMS = {1.5: entmax15, 2.0: sparsemax, 1.25: lambda z, dim: entmax_bisect(z, 1.25, dim, n_iter=100)}


def modernbert():
    return FAMILIES["modernbert"].make()  # of 4 layers, 1 and 3 are local


@torch.no_grad()
def as_trained(model, ids, mask, alpha):
    """Logits of a ModernBERT whose global layers attend by entmax, and whose local ones by softmax, as its authors'.

    `sparse_modern_bert.py` of deep-spin/SparseModernBERT: entmax of `q k^T / sqrt(d)` and the mask, in global layers.
    """
    inner = model.model
    hidden, positions = inner.embeddings(input_ids=ids), torch.arange(ids.shape[1])[None]
    rotary = {kind: inner.rotary_emb(hidden, positions, kind) for kind in ("full_attention", "sliding_attention")}
    distance = (positions[0, :, None] - positions[0]).abs()
    for number, layer in enumerate(inner.layers):
        kind = model.config.layer_types[number]
        attention, normed = layer.attn, layer.attn_norm(hidden)
        qkv = attention.Wqkv(normed).view(*ids.shape, 3, -1, attention.head_dim)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        query, key = apply_rotary_pos_emb(query, key, *rotary[kind], unsqueeze_dim=1)
        logits = query @ key.transpose(-1, -2) / math.sqrt(attention.head_dim)
        seen = mask[:, None, None].bool()
        if kind == "sliding_attention":
            seen = seen & (distance <= model.config.sliding_window)
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1) if kind == "sliding_attention" else TRANSFORMS[alpha](logits, dim=-1)
        hidden = hidden + attention.Wo((weights @ value).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
    return model.decoder(model.head(inner.final_norm(hidden)))


def batch(side):
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        place = slice(LENGTH - length, LENGTH) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    return (IDS, torch.ones_like(IDS)) if side is None else (ids, mask)


@pytest.mark.cross("values")
@pytest.mark.versions
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("alpha", TRANSFORMS)
@pytest.mark.parametrize("predictor", ["full", "clustering"])
def test_the_model_is_the_one_that_was_trained(alpha, side, predictor):
    """With the predictor "full", and with one that was not fitted yet; local layers attend by softmax."""
    ids, mask = batch(side)
    softmax, expected = modernbert()(ids, attention_mask=mask).logits, as_trained(modernbert(), ids, mask, alpha)
    model = get_peft_model(modernbert(), SparsefinderConfig(entmax_native=alpha, predictor=predictor, **SIZES))
    with torch.no_grad():
        logits = model.eval()(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=2e-4)
    assert (softmax - expected)[real].abs().max() > 0.05  # what transformers makes of the checkpoint
    assert [layer.layer for layer in sparse_layers(model, SparsefinderAttention)] == [0, 2]


def test_scale_and_alpha_are_frozen():
    model = get_peft_model(modernbert(), SparsefinderConfig(entmax_native=2.0, learn_alpha=False, **SIZES))
    layer = sparse_layers(model, SparsefinderAttention)[0]
    assert (layer.config.alpha, layer.config.initial_scale) == (2.0, 1.0)
    trained = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("log_scale" in name or "alpha" in name for name, _ in model.named_parameters()) and trained
    assert torch.equal(layer.parameters_in_use.scale, torch.ones(4)) and layer.parameters_in_use.alpha == 2.0


@pytest.mark.parametrize("options", [("--tile", "8"), ("--predictor", "full")], ids=["clustering", "full"])
def test_the_command_line_patches_a_checkpoint_of_the_authors_own_class(options, tmp_path):
    """Its config names a class that transformers does not know; it is a masked language model all the same.

    With `full` the adapter has no parameters, and is loaded all the same.
    """
    model = modernbert()
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["CustomModernBertForMaskedLM"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    command = ["patch", str(tmp_path / "base"), "--method", "sparsefinder", "--entmax-native", "1.5", *options]
    result = CliRunner().invoke(cli.app, [*command, "--output", str(tmp_path / "adapter")])
    assert result.exit_code == 0, result.output
    assert "entmax as the checkpoint was trained with" in " ".join(result.output.split())
    patched = hf_sparse.from_pretrained(tmp_path / "adapter").eval()
    assert type(patched.get_base_model()).__name__ == "ModernBertForMaskedLM"
    with torch.no_grad():
        expected = as_trained(model, IDS, torch.ones_like(IDS), 1.5)
        torch.testing.assert_close(patched(IDS).logits, expected, rtol=0, atol=2e-4)


def trained(**changes):
    model = get_peft_model(modernbert(), SparsefinderConfig(entmax_native=1.5, **SIZES | changes))
    settings = {"objective": "graph", "steps": 3, "batch_size": 2, "graph_rows": 16, "warmup_steps": 1}
    data = {"input_ids": IDS, "labels": torch.where(torch.arange(LENGTH) % 7 == 4, IDS, IGNORED)}
    return model, finetune(model, data, FinetuneConfig(**settings, progress=False)), data


def test_training_fits_a_graph_to_the_model_itself(tmp_path):
    """Only projections move; what is compared with is entmax; the adapter travels, and attends by its graph."""
    model, report, _ = trained()
    base = modernbert().state_dict()
    after = {name.removeprefix("base_model.model."): value for name, value in model.cpu().state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert report["trainable_parameters"] and "scales" not in report and report["history"][0]["stage"] == "graph"
    full = as_trained(modernbert(), IDS, torch.ones_like(IDS), 1.5)
    with torch.no_grad():
        predicted = model.eval()(IDS).logits
    assert (predicted - full).abs().max() > 1e-3  # the graph leaves something out
    assert attention_graphs(model, IDS)[0].tiles is not None
    full_graph = attention_graphs(model, IDS, full=True)[0]
    assert full_graph.tiles is None and full_graph.weights._nnz() < full_graph.weights.numel()
    assert describe_graphs(model, IDS[:1])["heads"]
    model.save_pretrained(tmp_path)
    again = hf_sparse.SparsefinderConfig.from_pretrained(tmp_path)
    assert (again.entmax_native, again.alpha, again.initial_scale) == (1.5, 1.5, 1.0)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(modernbert(), tmp_path).eval()(IDS).logits, predicted)


def test_a_measurement_has_no_dense_model():
    model, _, data = trained()
    masked = {"input_ids": data["input_ids"].masked_fill(data["labels"] != IGNORED, 1), "labels": data["labels"]}
    result = evaluate(model.eval(), masked, progress=False, sparsities=(0.5,), selections=["predicted", "longformer"])
    assert "dense" not in result and result["adapter"]["entmax_native"] == 1.5
    assert result["full"]["divergence"] == pytest.approx(0, abs=1e-9)
    (table,) = tables(result)
    names = list(table.columns[0].cells)
    assert names[0] == "full entmax" and not any("dense" in name for name in names)
    with pytest.raises(ValueError, match="with softmax it is no model to compare with"), using(model, "dense"):
        pytest.fail("entered the block")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"entmax_native": 1.0}, r"entmax_native must be None or a number above 1 and at most 2, got 1.0"),
        ({"entmax_native": 2.5}, r"entmax_native must be None or a number above 1 and at most 2, got 2.5"),
        ({"entmax_native": True}, r"entmax_native must be None or a number above 1 and at most 2, got True"),
        ({"entmax_native": 2.0, "alpha": 1.7}, r"alpha must be 2, or left out, where entmax_native is 2, got 1.7"),
        ({"entmax_native": 2.0, "initial_scale": 0.5}, r"initial_scale must be 1, or left out, .*, got 0.5"),
        ({"entmax_native": 1.5, "learn_alpha": True}, r"learn_alpha must be False for a checkpoint that was trained"),
        (
            {"entmax_native": 1.5, "predictor": "distance", "profile": False},
            r"nothing is fitted for 'distance' without",
        ),
    ],
    ids=str,
)
def test_settings_that_contradict_it_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SparsefinderConfig(**changes)


@pytest.mark.parametrize(
    "adapter, training, message",
    [
        ({}, {}, "'distill' has nothing to learn: this checkpoint was trained with entmax .* choose 'graph'"),
        ({}, {"objective": "lm"}, "'lm' has nothing to learn: .* the adapter has no LoRA"),
        ({"lora_rank": 2}, {"objective": "lm", "alpha_start": 1.1}, "alpha is that of the checkpoint"),
    ],
    ids=["distill", "lm", "annealing"],
)
def test_training_without_anything_to_learn_is_refused(adapter, training, message):
    model = get_peft_model(modernbert(), SparsefinderConfig(entmax_native=1.5, **SIZES, **adapter))
    with pytest.raises(ValueError, match=message):
        finetune(model, {"input_ids": IDS, "labels": IDS}, FinetuneConfig(steps=1, progress=False, **training))


def test_lora_goes_on_from_entmax():
    """The objective `lm` trains LoRA with entmax, then the projections."""
    model = get_peft_model(modernbert(), SparsefinderConfig(entmax_native=1.5, lora_rank=2, **SIZES))
    settings = FinetuneConfig(objective="lm", steps=2, graph_steps=2, batch_size=2, progress=False)
    report = finetune(model, {"input_ids": IDS, "labels": IDS}, settings)
    assert [row["stage"] for row in report["history"]] == ["lm", "lm", "graph", "graph"]
    assert set(report["scales"]) == {"before", "after"}


def test_an_unfitted_predictor_has_no_graph_to_measure_or_draw():
    model = patch(modernbert(), SparsefinderConfig(entmax_native=1.5, **SIZES)).eval()
    assert attention_graphs(model, IDS)[2].tiles is None
    with pytest.raises(DataError, match="the predictor was never fitted: there is no predicted graph to draw"):
        describe_graphs(model, IDS[:1])
    with pytest.raises(ValueError, match="never fitted"):
        evaluate(model, {"input_ids": IDS, "labels": IDS}, progress=False)


def test_a_decoder_generates_before_and_after_it_is_fitted():
    """Steps with a cache equal one forward, before the predictor is fitted too."""
    model = get_peft_model(FAMILIES["llama"].make(), SparsefinderConfig(entmax_native=1.5, **SIZES)).eval()
    prompt = IDS[:1, :20]
    for _ in range(2):
        ids = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            assert torch.equal(model(ids[:, :-1]).logits[:, 19:].argmax(-1), ids[:, 20:])
        finetune(model, IDS, FinetuneConfig(objective="graph", steps=1, batch_size=2, progress=False))
        model.cpu().eval()
