"""Patched encoders: every head, padding on either side, and BERT as a causal decoder."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from hf_sparse import SparseKConfig, patch, unpatch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.patches import sparse_layers

pytestmark = pytest.mark.versions

ENCODERS = {
    name: family
    for name, family in runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"].items()
    if not family.causal
}
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "Model")
BUDGET = {"k": 5, "window": 6, "sinks": 2}
LENGTH = 50
LENGTHS = (LENGTH, 31, 9)  # the last one fits into the slots
IDS = torch.randint(3, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def encoder(name: str, head: str = "ForMaskedLM", **changes):
    return ENCODERS[name].make(model=ENCODERS[name].model.removesuffix("ForMaskedLM") + head, **changes)


def with_scorers(model, **settings):
    """Patched, with scorers that choose."""
    patch(model, SparseKConfig(**{**BUDGET, **settings}))
    for method in sparse_layers(model):
        torch.nn.init.normal_(method.sparsek_scorer["default"].weight)
    return model


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """Ids, attention mask, and where the tokens of each row stand."""
    rows = [slice(LENGTH - n, LENGTH) if side == "left" else slice(0, n) for n in LENGTHS]
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, (place, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        ids[row, place] = IDS[row, :length]
        mask[row, place] = 1
    return ids, mask, rows


def positions(name: str, mask: torch.Tensor) -> torch.Tensor:
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    return counted + 1 if "roberta" in name else counted  # pad_token_id + 1


@pytest.mark.parametrize("name", ENCODERS)
def test_only_global_layers_are_patched_and_see_both_sides(name):
    model = encoder(name)
    before = model(IDS).logits
    methods = sparse_layers(with_scorers(model))
    layers = set(range(model.config.num_hidden_layers)) - set(ENCODERS[name].local)
    assert {method.layer for method in methods} == layers
    assert not any(method.causal for method in methods)
    after = model(IDS).logits
    assert (after - before).abs().amax((0, 2)).min() > 1e-3, "every position must feel the selection"
    changed = IDS.clone()
    changed[:, -1] = 3 + (changed[:, -1] - 2) % 61
    assert not torch.equal(model(changed).logits[:, 0], after[:, 0])


@pytest.mark.cross("values")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ENCODERS)
def test_budget_of_the_length_is_the_base_model_and_unpatch_is_exact(name, head):
    model = encoder(name, head)
    ids, mask, rows = padded("right")
    before = model(ids, attention_mask=mask)[0]
    patch(model, SparseKConfig(k=LENGTH - 8, window=6, sinks=2))
    after = model(ids, attention_mask=mask)[0]
    for row, place in enumerate(rows):
        shown = place if after.ndim == 3 else slice(None)
        torch.testing.assert_close(after[row, shown], before[row, shown], rtol=0, atol=1e-5)
    unpatch(model)
    assert torch.equal(model(ids, attention_mask=mask)[0], before)


_NO_DROPOUT: dict[str, dict[str, float]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0},
    "modernbert": {},
}


@pytest.mark.cross
@pytest.mark.parametrize("training", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_padding_equals_each_row_alone(name, side, training):
    model = with_scorers(encoder(name, **_NO_DROPOUT.get(name, _NO_DROPOUT["bert"]))).train(training)
    ids, mask, rows = padded(side)
    together = model(ids, attention_mask=mask, position_ids=positions(name, mask)).logits
    assert torch.isfinite(together).all()
    for row, (place, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        alone = model(IDS[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row, place], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_pooled_heads_with_padding(name):
    model = with_scorers(encoder(name, "ForSequenceClassification"))
    ids, mask, _ = padded("right")
    together = model(ids, attention_mask=mask).logits
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(together[row], model(IDS[row : row + 1, :length]).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_one_token(name):
    model = encoder(name)
    before = model(IDS[:, :1]).logits
    torch.testing.assert_close(with_scorers(model)(IDS[:, :1]).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_scorer_is_trained(name):
    model = patch(encoder(name), SparseKConfig(**BUDGET)).train()
    model(IDS, labels=IDS).loss.backward()
    for method in sparse_layers(model):
        assert method.sparsek_scorer["default"].weight.grad.abs().amax(-1).min() > 0


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_takes_no_cache(name):
    model = with_scorers(encoder(name, "Model"))
    with pytest.raises(ValueError, match="has no KV cache: pass none"):
        model(IDS, **with_cache(DynamicCache()))


def test_a_local_layer_of_modernbert_is_refused():
    with pytest.raises(ValueError, match=r"layers \[1\] attend within a sliding window .* choose among \[0, 2\]"):
        patch(encoder("modernbert"), SparseKConfig(**BUDGET, layers=[0, 1]))


# Decoders made of the same modules.

DECODERS = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM"}


def decoder(name: str, **changes):
    return ENCODERS[name].make(model=DECODERS[name], is_decoder=True, **changes)


@torch.no_grad()
def one_after_another(model, prefill: int = 30, **inputs) -> torch.Tensor:
    out = model(IDS[:, :prefill], use_cache=True, **inputs)
    logits = [out.logits]
    for t in range(prefill, LENGTH):
        out = model(IDS[:, t : t + 1], **with_cache(cache_of(out)), **inputs)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_causal_and_decodes_from_its_slots(name):
    model = with_scorers(decoder(name))
    assert all(method.causal for method in sparse_layers(model))
    whole = model(IDS, use_cache=False).logits
    torch.testing.assert_close(one_after_another(model), whole, rtol=0, atol=1e-5)
    changed = IDS.clone()
    changed[:, 40:] = 3
    assert torch.equal(model(changed, use_cache=False).logits[:, :40], whole[:, :40])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_cross_attention_stays_dense(name, masked):
    model = decoder(name, add_cross_attention=True)
    inputs = {"encoder_hidden_states": torch.randn(3, 17, 32)}
    if masked:
        inputs["encoder_attention_mask"] = (torch.arange(17) < torch.tensor([17, 9, 4])[:, None]).long()
    before = model(IDS, use_cache=False, **inputs).logits
    patch(model, SparseKConfig(k=LENGTH, window=1))
    assert len(sparse_layers(model)) == model.config.num_hidden_layers
    torch.testing.assert_close(model(IDS, use_cache=False, **inputs).logits, before, rtol=0, atol=1e-5)
    unpatch(model)

    with_scorers(model)
    whole = model(IDS, use_cache=False, **inputs).logits
    assert (whole - before).abs().max() > 1e-3
    torch.testing.assert_close(one_after_another(model, **inputs), whole, rtol=0, atol=1e-5)
