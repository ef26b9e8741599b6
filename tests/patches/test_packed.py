"""Packed sequences: several texts in a row, each exactly as it is alone, in training too."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_sparse import SparsefinderConfig, SparseKConfig, patch
from hf_sparse._compat import with_cache
from hf_sparse.patches import SparseCache, sparse_layers

pytestmark = pytest.mark.versions

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
LENGTHS = [21, 1, 40, 5, 33]
TEXTS = [torch.randint(4, 64, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
IDS = torch.cat(TEXTS)[None]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BOUNDARIES = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
FLASH = {"cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": BOUNDARIES, "max_length_q": 40, "max_length_k": 40}
CONFIGS = {
    "sparsek": lambda **changes: SparseKConfig(k=4, window=5, sinks=2, position_slope=1e-3, **changes),
    "sparsefinder": lambda **changes: SparsefinderConfig(
        tile=8, tiles_per_query=2, window=1, predictor="bound", **changes
    ),
}


def sparse(family, method, **changes):
    model = patch(FAMILIES[family].make(), CONFIGS[method](**changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in sparse_layers(model):
            for parameter in getattr(layer, layer.adapter_layer_names[0]).parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def options(model):
    """Return what keeps a decoder from making a cache."""
    return {"use_cache": False} if sparse_layers(model)[0].causal else {}


def alone(model):
    return torch.cat([model(text[None], **options(model)).logits for text in TEXTS], 1)


@pytest.mark.cross
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("changes", [{}, {"layers": [1]}], ids=["all layers", "one layer"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("marks", [{}, FLASH], ids=["positions", "boundaries too"])
@torch.no_grad()
def test_a_row_of_texts_equals_each_alone(family, method, changes, marks):
    """Beside layers that stay dense, and local ones, too."""
    model = sparse(family, method, **changes)
    packed = model(IDS, position_ids=POSITIONS, use_cache=False, **marks).logits
    torch.testing.assert_close(packed, alone(model), rtol=0, atol=1e-5)
    assert (packed - model(IDS, use_cache=False).logits).abs().max() > 0.1


@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_several_rows_of_texts(method):
    model = sparse("llama", method)
    ids = torch.cat([IDS, IDS.flip(1)])
    positions = torch.cat([POSITIONS, torch.arange(IDS.shape[1])[None]])
    expected = torch.cat([alone(model), model(IDS.flip(1), use_cache=False).logits])
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.no_grad()
def test_an_encoder_takes_boundaries(family, method):
    """Local layers stay within the texts as well."""
    model = sparse(family, method)
    packed = model(IDS, position_ids=POSITIONS, **FLASH).logits
    torch.testing.assert_close(packed, alone(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_training_learns_the_same_as_from_each_text(method):
    model = sparse("llama", method).double()
    for layer in sparse_layers(model):
        layer.train()
    learned = {name: p for name, p in model.named_parameters() if "sparse_attention" in name}
    weight = torch.randn((1, sum(LENGTHS), 64), generator=torch.Generator().manual_seed(1)).double()
    losses = (model(IDS, position_ids=POSITIONS, use_cache=False).logits * weight).sum(), (alone(model) * weight).sum()
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, list(learned.values()), allow_unused=True) for loss in losses]
    reached = [(ours, expected) for ours, expected in zip(*gradients, strict=True) if expected is not None]
    assert len(reached) >= 2 and all(expected.abs().max() > 1e-4 for _, expected in reached)
    for ours, expected in reached:
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.cross("values")
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_trainer_with_a_collator_that_packs(method, flash, tmp_path):
    """As TRL packs by default: one row, positions that restart, labels without the first token of each text."""
    model = sparse("llama", method)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("sparse_attention" in name)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_tensors="pt")
    features = [{"input_ids": text.tolist()} for text in TEXTS if len(text) > 1]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        learning_rate=1e-2,
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    model.train()
    with torch.no_grad():
        texts = [text[None] for text in TEXTS if len(text) > 1]
        losses = [model(text, labels=text, use_cache=False).loss * (text.shape[1] - 1) for text in texts]
    expected = sum(losses) / sum(text.shape[1] - 1 for text in texts)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, args, train_dataset=features, data_collator=collator)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(float(expected), abs=1e-3)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("sparse_attention" in name for name in changed)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"use_cache": True, **FLASH}, r"have no cache: call the model with use_cache=False"),
        ({"attention_mask": (POSITIONS > 0).long(), **FLASH}, "have no padding: leave the attention_mask out"),
        ({**FLASH, "cu_seq_lens_k": BOUNDARIES + 1}, "the same boundaries for queries and keys"),
        ({"cu_seq_lens_q": BOUNDARIES[:-1]}, r"must rise from 0 to the 100 tokens of the row"),
    ],
    ids=["cache", "padding", "keys", "short"],
)
def test_packed_texts_that_cannot_be_told_apart_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        sparse("llama", "sparsek")(IDS, **{"use_cache": False, **keywords})


def test_a_cache_and_boundaries_are_refused_before_the_cache_is_filled():
    model = sparse("llama", "sparsek")
    cache = SparseCache(model)
    with pytest.raises(ValueError, match="have no cache"):
        model(IDS, **with_cache(cache), **FLASH)


def test_another_mask_function_is_still_refused():
    """Only what is causal within packed texts is taken for that."""
    model = sparse("llama", "sparsek")
    with pytest.raises(ValueError, match="custom masks are not supported"):
        model(IDS, attention_mask=torch.ones(1, 1, 100, 100, dtype=torch.bool).tril(), use_cache=False)
