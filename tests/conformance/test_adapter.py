"""All families: attach, detach, switch, move, train, save and load."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_sparse import SparseKConfig, unpatch
from hf_sparse.patches import sparse_layers

pytestmark = pytest.mark.versions


def _anatomy(model):
    modules = {
        name: (type(module), len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    }
    return modules, list(model.state_dict()), model.config.to_dict(), model.config._attn_implementation


def _differ(actual, expected):
    assert (actual - expected).abs().max() > 0.05, "nothing would be noticed"


def test_detach(subject, measure):
    """Taken off again, it leaves the module tree and every bit of the outputs as they were."""
    for options in ({}, {"attn_implementation": "eager"}):
        model = subject.make(**options)
        before, expected = _anatomy(model), subject.logits(model, subject.ids)
        subject.fresh(model=model)
        assert _anatomy(model) != before
        sparse = subject.logits(model, subject.ids)
        _differ(sparse, expected)
        measure.close(sparse, subject.logits(subject.sparse, subject.ids))
        unpatch(model)
        assert _anatomy(model) == before
        measure.equal(subject.logits(model, subject.ids), expected)


def _with_adapters(subject, randomise, *names):
    """A PEFT model with one adapter per name; the name's number is the seed of its scorers and changes its budget."""
    configs = [SparseKConfig(k=5 + seed, window=6, sinks=2) for seed in range(len(names))]
    model = get_peft_model(subject.make(), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    for seed, name in enumerate(names):
        randomise(model, name, seed)
    return model.eval()


def test_two_adapters(subject, measure, randomise):
    """Switched to one of two adapters, a model is one that has only that adapter."""
    model = _with_adapters(subject, randomise, "one", "two")
    alone = [subject.logits(subject.fresh(seed=seed, k=5 + seed), subject.ids) for seed in (0, 1)]
    _differ(*alone)
    for seed, name in ((0, "one"), (1, "two"), (0, "one")):
        model.set_adapter(name)
        measure.equal(subject.logits(model, subject.ids), alone[seed])


def test_disable(subject, measure, randomise):
    """Switched off, the base model bit for bit; switched on again, as before."""
    model = _with_adapters(subject, randomise, "one")
    sparse = subject.logits(model, subject.ids)
    with model.disable_adapter():
        measure.equal(subject.logits(model, subject.ids), subject.logits(subject.base, subject.ids))
    measure.equal(subject.logits(model, subject.ids), sparse)
    _differ(sparse, subject.logits(subject.base, subject.ids))


def test_dtype(subject, measure):
    """In bfloat16 outputs are finite and scores float32; back in float32 it is the model of the rounded weights."""
    model, scores = subject.fresh().to(torch.bfloat16), []

    def recorded(score):
        def wrapper(*args):
            scores.append(score(*args))
            return scores[-1]

        return wrapper

    for method in sparse_layers(model):
        method.score = recorded(method.score)
    assert subject.logits(model, subject.ids).isfinite().all()
    if subject.causal:
        ids, mask = subject.padded("left")
        assert subject.in_chunks(model, ids, [50] + [1] * 21, mask)[0].isfinite().all()
    assert len(scores) >= len(sparse_layers(model))
    for score in scores:
        assert score.dtype == torch.float32 and score.isfinite().all()
        assert not torch.equal(score, score.bfloat16().float()), "the scores are float32 in name only"
    for method in sparse_layers(model):
        del method.score
    rounded = subject.fresh()
    with torch.no_grad():
        for tensor in (*rounded.parameters(), *rounded.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    measure.equal(subject.logits(model.float(), subject.ids), subject.logits(rounded, subject.ids))


def test_checkpointing(subject, measure):
    """Gradient checkpointing changes no gradient of a scorer."""
    gradients = []
    for checkpointing in (False, True):
        model = subject.fresh().train()
        if checkpointing:
            # The older name is deprecated in newer transformers.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        torch.manual_seed(0)  # of the base model's dropout
        options = {"use_cache": False} if subject.causal else {}
        output = model(subject.ids, attention_mask=torch.ones_like(subject.ids), **options)
        output.logits.log_softmax(-1).gather(-1, subject.ids[..., None]).mean().backward()
        gradients.append([p.grad for method in sparse_layers(model) for p in method.sparsek_scorer.parameters()])
    for without, checkpointed in zip(*gradients, strict=True):
        assert without.abs().max() > 1e-6
        measure.close(checkpointed, without)


def test_round_trip(subject, measure, randomise, tmp_path):
    """Saved as safetensors and loaded onto a new base model: the same bits, and nothing but scorers in the file."""
    model = _with_adapters(subject, randomise, "default")
    model.save_pretrained(tmp_path)
    assert all("sparsek_scorer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(subject.make(), tmp_path).eval()
    measure.equal(subject.logits(loaded, subject.ids), subject.logits(model, subject.ids))
    measure.equal(subject.logits(copy.deepcopy(loaded), subject.ids), subject.logits(model, subject.ids))
