"""Logits per slice: the same as the model's own in every family, and never all at once."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model

from hf_sparse import SparseKConfig, _compat, patch
from hf_sparse.finetune import objectives, predictions
from hf_sparse.finetune.predictions import predict
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]


@pytest.mark.parametrize(
    ("family", "cap"), [*((name, None) for name in FAMILIES), ("gemma2", 0.5), ("gemma3_text", 0.5)]
)
def test_logits_of_every_family(family, cap):
    """Through the head alone, a final scale or softcap included: no model of these falls back on all logits."""
    model = FAMILIES[family].make(**({} if cap is None else {"final_logit_softcapping": cap}))
    patch(model, SparseKConfig(k=6, window=8, sinks=1))
    tokens = torch.randint(5, 64, (2, 40))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        found = predict(model, tokens)
        assert found.states.shape == (2, 40, model.get_output_embeddings().in_features) != expected.shape
        torch.testing.assert_close(found.logits(found.states[:, 3:9]), expected[:, 3:9], rtol=0, atol=1e-6)
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=0)  # no hook is left
    if cap is not None:
        assert expected.abs().max() <= cap


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_logits_have_the_dtype_of_the_models(sparse_llama, chunks, precision):
    model = sparse_llama().eval()
    if precision == "bfloat16":
        model.get_base_model().to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        expected = model(input_ids=chunks[:2]).logits
        found = predict(model, chunks[:2])
    with torch.no_grad():  # the head runs after the autocast of the model has ended
        torch.testing.assert_close(found.logits(found.states), expected, rtol=0.02, atol=0.02)
    assert found.logits(found.states).dtype == expected.dtype


class Scaled(transformers.LlamaForCausalLM):
    """Does something after the head that its configuration does not tell."""

    def forward(self, **options):
        output = super().forward(**options)
        output.logits = output.logits * 0.5
        return output


class Headless(transformers.LlamaForCausalLM):
    def get_output_embeddings(self):
        return None


@pytest.mark.parametrize("kind", [Scaled, Headless])
def test_what_the_head_does_not_tell_is_read_from_the_logits(tiny_llama, chunks, kind):
    plain = tiny_llama()
    model = kind(plain.config)
    model.load_state_dict(plain.state_dict())
    model = get_peft_model(model.eval(), SparseKConfig(k=6, window=8, sinks=2))
    with torch.no_grad():
        expected = model(input_ids=chunks[:2]).logits
        found = predict(model, chunks[:2])
        assert torch.equal(found.states, expected) and torch.equal(found.logits(expected), expected)
    for method in sparse_layers(model):
        method.train()
    objectives.distill(model, chunks[:2]).backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("objective", ["distill", "lm"])
def test_no_more_than_a_slice_has_logits(monkeypatch, tiny_llama, chunks, held, objective):
    """And what is kept for the backward does not grow with the vocabulary."""
    monkeypatch.setattr(objectives, "_ROWS", 16)
    kept = {}
    for vocabulary in (64, 4096):
        model = get_peft_model(tiny_llama(vocab_size=vocabulary), SparseKConfig(k=6, window=8, sinks=2)).eval()
        for method in sparse_layers(model):
            method.train()
        tokens = []
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, logits, tokens=tokens: tokens.append(logits[..., 0].numel()))
        with held(model) as count:
            loss = getattr(objectives, objective)(model, chunks[:2])
        kept[vocabulary] = count()
        loss.backward()
        assert max(tokens) == 16 and sum(tokens) >= 2 * 95
    # The slice of one token that tells whether the head is all there is goes with the forward.
    assert kept[64] == kept[4096] > 2 * 96 * 32


def test_slices_make_no_difference_to_the_gradient(monkeypatch, sparse_llama, chunks):
    found = []
    for rows in (7, 10_000):
        monkeypatch.setattr(objectives, "_ROWS", rows)
        model = sparse_llama().eval()
        for method in sparse_layers(model):
            method.train()
        objectives.distill(model, chunks[:2], lm_weight=0.3).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    with torch.no_grad(), objectives.switched_off(model):
        teacher = model(input_ids=chunks[:2]).logits.log_softmax(-1)
    model.zero_grad()
    student = model(input_ids=chunks[:2], labels=chunks[:2])
    divergence = (teacher.exp() * (teacher - student.logits.log_softmax(-1))).sum(-1).mean()
    (divergence + 0.3 * student.loss).backward()
    for sliced, whole, written_out in zip(*found, [p.grad for p in model.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(sliced, written_out, rtol=1e-4, atol=1e-7)


def test_a_model_and_its_head_are_compared_once(monkeypatch, tiny_llama, chunks):
    """Later calls read no value back; another head is compared again, and a copy of the model too."""
    compared = []

    def agree(computed, expected):
        compared.append(computed.shape)
        return True

    monkeypatch.setattr(predictions, "_agree", agree)
    model = patch(tiny_llama().eval(), SparseKConfig(k=6, window=8, sinks=2))
    with torch.no_grad():
        for number in (1, 1, 1):
            predict(model, chunks[:2])
            assert len(compared) == number
        model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
        predict(model, chunks[:2])
        predict(copy.deepcopy(model), chunks[:2])
    assert len(compared) == 3


@pytest.mark.versions
@pytest.mark.parametrize("recorded", [False, True], ids=["run", "recorded"])
def test_whole_texts_need_no_mask(monkeypatch, tiny_llama, chunks, recorded):
    """Nothing looks for packed texts, and SDPA is told to be causal, in a recording too; then all is as before."""
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    module = transformers.masking_utils
    monkeypatch.setattr(_compat, "is_recorded_as_graph", lambda: recorded)
    if recorded:
        monkeypatch.setattr(module, "is_tracing", lambda *_: True)
    before = module.find_packed_sequence_indices, module.is_tracing
    predict(tiny_llama(), chunks[:2], use_cache=False)
    assert masks and all(mask is None for mask in masks)
    assert (module.find_packed_sequence_indices, module.is_tracing) == before
