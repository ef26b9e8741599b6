"""All families: attach, detach, switch, move, train, save and load."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_sparse import unpatch
from hf_sparse.patches import sparse_layers

pytestmark = [pytest.mark.versions, pytest.mark.cross("values")]


def _anatomy(model):
    modules = {
        name: (type(module), len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    }
    return modules, list(model.state_dict()), model.config.to_dict(), model.config._attn_implementation


def _differ(actual, expected):
    assert (actual - expected).abs().max() > 0.05, "nothing would be noticed"


@pytest.mark.every_family
def test_detach(subject, measure):
    """Taken off again, it leaves the module tree and every bit of the outputs as they were."""
    _detach(subject, measure)


def test_detach_from_eager_attention(subject, measure):
    """So it does with the implementation of attention that the model had, if that is another than the usual one."""
    _detach(subject, measure, attn_implementation="eager")


def _detach(subject, measure, **options):
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


def _with_adapters(subject, *names):
    """Make a PEFT model with one adapter per name; the second one is of other settings and has other parameters."""
    base = subject.make()
    configs = [subject.method.config(base, **changes) for changes in ({}, subject.method.second)][: len(names)]
    model = get_peft_model(base, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    for seed, name in enumerate(names):
        subject.randomise(model, name, seed)
    return model.eval()


def test_two_adapters(subject, measure):
    """Switched to one of two adapters, a model is one that has only that adapter."""
    model = _with_adapters(subject, "one", "two")
    alone = [subject.logits(subject.sparse, subject.ids)]
    alone.append(subject.logits(subject.fresh(seed=1, **subject.method.second), subject.ids))
    _differ(*alone)
    for seed, name in ((0, "one"), (1, "two"), (0, "one")):
        model.set_adapter(name)
        measure.equal(subject.logits(model, subject.ids), alone[seed])


def test_delete(subject, measure):
    """Without one of its two adapters, a model is as if that had never been there."""
    model, alone = _with_adapters(subject, "one", "two"), _with_adapters(subject, "one")
    model.delete_adapter("two")
    assert list(model.state_dict()) == list(alone.state_dict()) and list(model.peft_config) == ["one"]
    measure.equal(subject.logits(model, subject.ids), subject.logits(alone, subject.ids))


def test_disable(subject, measure):
    """Switched off, the base model bit for bit; switched on again, as before."""
    model = _with_adapters(subject, "one")
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

    scorers = [subject.method.scores(layer) for layer in sparse_layers(model)]
    for scorer, name in scorers:
        setattr(scorer, name, recorded(getattr(scorer, name)))
    assert subject.logits(model, subject.ids).isfinite().all()
    if subject.causal:
        ids, mask = subject.padded("left")
        assert subject.in_chunks(model, ids, [60] + [1] * 11, mask)[0].isfinite().all()
    assert len(scores) >= len(scorers)
    for score in scores:
        assert score.dtype == torch.float32 and score.isfinite().all()
        assert not torch.equal(score, score.bfloat16().float()), "the scores are float32 in name only"
    for scorer, name in scorers:
        delattr(scorer, name)
    rounded = subject.fresh()
    with torch.no_grad():
        for tensor in (*rounded.parameters(), *rounded.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    measure.equal(subject.logits(model.float(), subject.ids), subject.logits(rounded, subject.ids))


def _backward(subject, model):
    """Train one step's worth: gradients of the mean log-likelihood."""
    torch.manual_seed(0)  # of the base model's dropout
    options = {"use_cache": False} if subject.causal else {}
    output = model(input_ids=subject.ids, attention_mask=torch.ones_like(subject.ids), **options)
    output.logits.log_softmax(-1).gather(-1, subject.ids[..., None]).mean().backward()


@pytest.mark.every_family
def test_gradients(subject, measure):
    """Training reaches parameters of the adapter in use, of every layer, and nothing else."""
    model = _with_adapters(subject, "one", "two").train()
    _backward(subject, model)
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    prefix, trained = subject.method.registered.prefix, subject.method.trained
    learned = {name for name, _ in model.named_parameters() if f".{prefix}" in name and ".one." in name}
    assert reached == {name for name in learned if trained is None or name.rpartition(".")[2] in trained}
    assert len(reached) >= len(sparse_layers(model))
    gradients = dict(model.named_parameters())
    assert all(gradients[name].grad.abs().max() > 1e-6 for name in reached)
    measure.equal(subject.logits(model.eval(), subject.ids), subject.logits(subject.sparse, subject.ids))


def test_checkpointing(subject, measure):
    """Gradient checkpointing changes no gradient of a learned parameter."""
    gradients = []
    for checkpointing in (False, True):
        model = subject.fresh().train()
        if checkpointing:
            # The older name is deprecated in newer transformers.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        _backward(subject, model)
        learned = [p for layer in sparse_layers(model) for p in subject.method.learned(layer).parameters()]
        gradients.append([parameter.grad for parameter in learned if parameter.grad is not None])
    assert gradients[0]
    for without, checkpointed in zip(*gradients, strict=True):
        assert without.abs().max() > 1e-6
        measure.close(checkpointed, without)


def test_round_trip(subject, measure, tmp_path):
    """Saved as safetensors and loaded onto a new base model: the same bits. The file holds nothing of the base."""
    model = _with_adapters(subject, "default")
    model.save_pretrained(tmp_path)
    prefix = subject.method.registered.prefix
    assert all(f".{prefix}" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(subject.make(), tmp_path).eval()
    measure.equal(subject.logits(loaded, subject.ids), subject.logits(model, subject.ids))
    measure.equal(subject.logits(copy.deepcopy(loaded), subject.ids), subject.logits(model, subject.ids))
