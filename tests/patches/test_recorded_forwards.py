"""Forwards of whole texts, without `generate`, that are played return what forwards return that run.

Without a GPU a recording is imitated (`played_prompts` in tests/conftest.py).
"""

import copy
import gc
import inspect
import pickle
import runpy
from contextlib import nullcontext
from operator import itemgetter
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaForSequenceClassification, LlamaModel

import hf_sparse
from hf_sparse import SparseKCache, SparseKConfig, patch, unpatch, unrecorded
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.patches import recorded_prompts, sparse_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
(assert_same_layers, choosing, generate, prompt, prompts_of, recordings_of) = itemgetter(
    "assert_same_layers", "choosing", "generate", "prompt", "prompts_of", "recordings_of"
)(runpy.run_path(str(Path(__file__).with_name("prompts.py"))))


@pytest.fixture
def model(tiny_llama):
    return choosing(tiny_llama())


def forward(model, ids=None, **inputs):
    with torch.no_grad():
        return model(prompt() if ids is None else ids, **inputs)


def check(model, ids=None, **inputs):
    """Compare all that a forward returns with what it returns when it runs, and return the first."""
    found = forward(model, ids, **inputs)
    with unrecorded():
        expected = forward(model, ids, **inputs)
    assert type(found) is type(expected) and list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].shape == value.shape and found[name].is_contiguous() == value.is_contiguous()
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    if cache_of(expected) is not None:
        assert_same_layers(cache_of(found).layers, cache_of(expected).layers)
    return found


def warm_up(model, length=40, rows=1, **inputs):
    for seed in range(1, 4):
        forward(model, prompt(length, rows, seed), **inputs)


CALLS = {
    "plain": {},
    "cached": {"use_cache": True},
    "uncached": {"use_cache": False},
    "last logits": {"logits_to_keep": 1},
    "two logits": {"logits_to_keep": 2, "use_cache": False},
}


@pytest.mark.versions
@pytest.mark.parametrize("inputs", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("rows", [1, 3])
def test_outputs_and_caches_are_those_of_forwards_that_run(model, played_prompts, inputs, rows):
    for length in (12, 40, 65, 100):
        warm_up(model, length, rows, **inputs)
        before = len(played_prompts)
        check(model, prompt(length, rows), **inputs)
        assert len(played_prompts) == before + 1


def test_the_loss_of_labels(model, played_prompts):
    ids = prompt(40, 2)
    warm_up(model, 40, 2, use_cache=False)
    found = check(model, ids, labels=ids, use_cache=False)
    assert found.loss.isfinite() and played_prompts == [64]


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, id=name, marks=pytest.mark.full if family.kin else ()) for name, family in FAMILIES.items()],
)
def test_every_family(family, played_prompts):
    """Encoders run, as do models with local layers, and an older OPT, which looks into a mask of its own."""
    model = choosing(family.make())
    for use_cache in (False, True) if family.causal else (None,):
        inputs = {} if use_cache is None else {"use_cache": use_cache}
        warm_up(model, 60, 2, **inputs)
        for length in (60, 37):
            found = forward(model, prompt(length, 2), **inputs)
            with unrecorded():
                expected = forward(model, prompt(length, 2), **inputs)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    waits = family.name == "opt" and "past_key_values" in with_cache(None)
    if family.local or waits or not family.causal:
        assert not played_prompts
    elif DEVICE == "cpu" or "num_experts" not in family.settings:
        assert len(played_prompts) == 7  # a text without a cache, and one with it, share a recording


def test_what_keeps_nothing_shares_the_recordings_of_what_keeps_keys(model, played_prompts):
    """Both are compared, whatever came first."""
    warm_up(model, use_cache=False)
    check(model, use_cache=True)
    check(model, use_cache=False)
    assert played_prompts == [64] * 2 and len(recordings_of(model)) == 1


@pytest.mark.parametrize("part", ["states", "keys"])
def test_a_recording_that_differs_is_refused(model, played_prompts, monkeypatch, part):
    """Also in what is kept, where the forward that runs beside keeps nothing."""
    play = recorded_prompts.RecordedPrompts._play

    def differ(self, recording, prompt, inputs):
        output = play(self, recording, prompt, inputs)
        wrong = output.last_hidden_state if part == "states" else prompt.layers[1].keys
        wrong.copy_(torch.randn_like(wrong))
        return output

    monkeypatch.setattr(recorded_prompts.RecordedPrompts, "_play", differ)
    for seed in (1, 2):
        forward(model, prompt(seed=seed), use_cache=False)
    with pytest.warns(UserWarning, match="recorded as a CUDA graph differs from one that ran, so all of the model run"):
        assert cache_of(check(model, use_cache=False)) is None
    for _ in range(4):
        check(model, use_cache=False)
    assert not played_prompts and not recordings_of(model)


def test_what_a_forward_returned_stays(model, played_prompts):
    warm_up(model)
    first = forward(model, prompt(seed=1))
    logits, keys = first.logits.clone(), cache_of(first).layers[0].keys.clone()
    forward(model, prompt(seed=2))
    assert torch.equal(first.logits, logits) and torch.equal(cache_of(first).layers[0].keys, keys)
    assert played_prompts == [64, 64]


def test_the_hidden_states_of_a_backbone_stay(tiny_llama, played_prompts):
    """A backbone may be patched by itself, and takes tokens by position too."""
    torch.manual_seed(0)
    backbone = choosing(LlamaModel(tiny_llama().config).eval())
    warm_up(backbone)
    found = [check(backbone, prompt(seed=seed)).last_hidden_state for seed in (1, 2)]
    assert not torch.equal(*found) and played_prompts == [64, 64]
    with unrecorded():
        assert torch.allclose(forward(backbone, prompt(seed=1)).last_hidden_state, found[0], rtol=1e-4, atol=1e-5)


def test_a_head_that_classifies(tiny_llama, played_prompts):
    torch.manual_seed(0)
    model = choosing(LlamaForSequenceClassification(tiny_llama().config).eval())
    warm_up(model, 40, 1)
    check(model)
    assert played_prompts == [64]


def test_a_cache_goes_on(model, played_prompts):
    warm_up(model)
    results = []
    for _ in range(2):
        first = forward(model)
        results.append(forward(model, prompt(7, seed=9), **with_cache(cache_of(first))))
        recorded_prompts._all_run.set(True)
    recorded_prompts._all_run.set(False)
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-5)
    assert_same_layers(*(cache_of(one).layers for one in results))
    assert played_prompts == [64]


def test_caches_of_the_user(model, played_prompts):
    for _ in range(3):
        forward(model, **with_cache(SparseKCache(model)))
    found, expected = SparseKCache(model), SparseKCache(model)
    forward(model, **with_cache(found))
    with unrecorded():
        forward(model, **with_cache(expected))
    assert_same_layers(found.layers, expected.layers)
    assert played_prompts == [64]
    forward(model, **with_cache(DynamicCache()))  # grows as layers ask for theirs
    assert played_prompts == [64]


MASKS = {
    "mask": lambda ids: {"attention_mask": torch.ones_like(ids)},
    "mask, uncached": lambda ids: {"attention_mask": torch.ones_like(ids), "use_cache": False},
    "mask and positions": lambda ids: {
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1], device=DEVICE)[None] + 3,
        "use_cache": False,
    },
}


@pytest.mark.parametrize("inputs", MASKS.values(), ids=MASKS)
def test_masks_without_padding_are_played(model, played_prompts, inputs):
    ids = prompt(40, 2)
    for _ in range(3):
        forward(model, ids, **inputs(ids))
    check(model, ids, **inputs(ids))
    assert played_prompts == [64]


def restarting(ids):
    return torch.arange(ids.shape[1], device=DEVICE)[None] % 20


INPUTS = {
    "padding": lambda ids: {"attention_mask": (torch.arange(40, device=DEVICE) >= 3).long().expand(2, -1)},
    "packed texts": lambda ids: {"position_ids": restarting(ids).expand(2, -1), "use_cache": False},
    "positions": lambda ids: {"position_ids": torch.arange(40, device=DEVICE).expand(2, -1), "use_cache": False},
    "hidden states": lambda ids: {"output_hidden_states": True},
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_inputs_that_run(model, played_prompts, inputs):
    ids = prompt(40, 2)
    for _ in range(3):
        forward(model, ids)
    for _ in range(5):
        forward(model, ids, **inputs(ids))
    assert not played_prompts
    for _ in range(4):  # hooks that collect hidden states are new to the model
        check(model, ids)
    assert played_prompts


def test_packed_texts_stay_apart(model, played_prompts):
    """As positions say that begin again; a recording knows one text in a row."""
    first, second = prompt(20, seed=1), prompt(20, seed=2)
    warm_up(model, 40, use_cache=False)
    both = torch.cat([first, second], 1)
    packed = forward(model, both, position_ids=restarting(both), use_cache=False).logits
    apart = [forward(model, ids, use_cache=False).logits for ids in (first, second)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


def test_embeddings_run(model, played_prompts):
    embeddings = model.get_input_embeddings()(prompt()).detach()
    for _ in range(4):
        with torch.no_grad():
            model(inputs_embeds=embeddings)
    assert not played_prompts


def test_gradients_autocast_and_training_run(model, played_prompts):
    for _ in range(4):
        model(prompt())
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            forward(model)
        model.train()
        forward(model)
        model.eval()
    assert not played_prompts


def test_tuples(model, played_prompts):
    """Heads make them of what the backbone returns."""
    warm_up(model)
    found = forward(model, return_dict=False)
    with unrecorded():
        expected = forward(model, return_dict=False)
    assert isinstance(found, tuple) and len(found) == len(expected)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert played_prompts == [64]


def test_a_switch_of_adapters_is_seen(model, played_prompts):
    patch(model, SparseKConfig(k=5, window=4, sinks=1), adapter="other")
    for number, name in enumerate(("default", "other") * 5):
        for layer in sparse_layers(model):
            layer.set_adapter(name)
        check(model, prompt(40, seed=number), use_cache=False)
    assert len(recordings_of(model)) == 2 and len(played_prompts) == 4


def test_dense_attention_runs(model, played_prompts):
    """Where the method is off, or taken off."""
    warm_up(model)
    for layer in sparse_layers(model):
        layer.enable_adapters(False)
    off = forward(model).logits
    assert not played_prompts
    for layer in sparse_layers(model):
        layer.enable_adapters(True)
    check(model)
    assert played_prompts == [64]
    unpatch(model)
    torch.testing.assert_close(forward(model).logits, off)
    assert type(model.model) is LlamaModel and "model_switch" not in vars(model.model)


def test_the_class_of_the_backbone_goes_with_the_patch(tiny_llama):
    base = tiny_llama()
    text, signature = repr(base), inspect.signature(base.model.forward)
    model = patch(base, SparseKConfig(k=4, window=4, sinks=1))
    assert isinstance(model.model, LlamaModel) and type(model.model) is not LlamaModel
    assert inspect.signature(model.model.forward) == signature
    assert (type(model.model).__name__, type(model.model).__module__) == ("LlamaModel", LlamaModel.__module__)
    unpatch(model)
    assert type(base.model) is LlamaModel and repr(base) == text and "model_switch" not in vars(base.model)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_recordings_of_its_own(model, played_prompts, copied):
    warm_up(model)
    check(model)
    twin = copied(model)
    assert not recordings_of(twin)
    warm_up(twin)
    check(twin)
    assert len(played_prompts) == 2 and len(recordings_of(twin)) == 1
    unpatch(twin)
    assert type(twin.model) is LlamaModel
    check(model)
    assert len(played_prompts) == 3


def test_a_replica_runs(model, played_prompts):
    """As DataParallel makes them for each forward, with the attributes of the model."""
    warm_up(model)
    replica = model.model._replicate_for_data_parallel()
    replica._modules = dict(model.model._modules)
    with torch.no_grad():
        replica(prompt())
    assert not played_prompts


def test_a_forward_of_its_own_stays_in_front(tiny_llama, played_prompts):
    """As accelerate sets it: the backbone is not recorded, and what was set is called."""
    base, calls = tiny_llama(), []
    given = base.model.forward
    base.model.forward = lambda *args, **kwargs: calls.append(1) or given(*args, **kwargs)
    model = choosing(base)
    for _ in range(4):
        forward(model)
    assert len(calls) == 4 and not played_prompts
    unpatch(model)
    assert type(base.model) is LlamaModel and "forward" in vars(base.model)


def test_a_forward_that_is_set_later_is_called(model, played_prompts):
    calls, given = [], model.model.forward
    model.model.forward = lambda *args, **kwargs: calls.append(1) or given(*args, **kwargs)
    for _ in range(5):
        forward(model)
    assert len(calls) == 5 and not played_prompts


def test_unrecorded_is_for_a_block_and_a_thread(model, played_prompts):
    warm_up(model)
    found = []
    with hf_sparse.unrecorded():
        forward(model)
        thread = Thread(target=lambda: found.append(forward(model)))
        thread.start()
        thread.join()
        assert played_prompts == [64]
    with pytest.raises(ZeroDivisionError), unrecorded():
        raise ZeroDivisionError
    forward(model)
    assert played_prompts == [64, 64]


def test_deterministic_torch_pads_nothing(model, played_prompts):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        warm_up(model, 40)
        forward(model)
        warm_up(model, 41)
        forward(model, prompt(41))
    finally:
        torch.use_deterministic_algorithms(False)
    assert played_prompts == [40, 41]


def test_a_draft_is_looked_up(tiny_llama, played_prompts):
    """The prompt of assisted decoding is a forward of its own, and its cache is cropped."""
    model = choosing(tiny_llama(), k=60)
    options = {"prompt_lookup_num_tokens": 2, "output_logits": False, "max_new_tokens": 12}
    for _ in range(4):
        found = generate(model, prompt(), **options)
    with unrecorded():
        assert torch.equal(found.sequences, generate(model, prompt(), **options).sequences)


def test_a_model_that_cannot_be_recorded_is_looked_at_now_and_then(model, played_prompts, monkeypatch):
    """A look takes milliseconds, which its forwards would lose."""
    looks, look = [], recorded_prompts.state_of
    monkeypatch.setattr(recorded_prompts, "state_of", lambda *args: looks.append(1) or look(*args))
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    for _ in range(200):
        forward(model)
    assert len(looks) == 8 and not played_prompts  # after 1, 2, 4, ... and then 64 forwards
    handle.remove()
    for _ in range(70):
        forward(model)
    assert played_prompts


def test_a_length_that_came_once_costs_no_look(model, played_prompts, monkeypatch):
    monkeypatch.setattr(recorded_prompts, "state_of", lambda *_: 1 / 0)
    for length in (40, 70, 130):
        forward(model, prompt(length))
    with pytest.raises(ZeroDivisionError):
        forward(model, prompt(131))


def test_a_compiled_model_is_not_recorded(model, played_prompts):
    compiled = torch.compile(model, backend="eager")
    inputs = {"use_cache": False, "attention_mask": torch.ones_like(prompt())}
    for _ in range(4):
        with torch.no_grad():
            found = compiled(prompt(), **inputs).logits
    with unrecorded():
        torch.testing.assert_close(found, forward(model, **inputs).logits, rtol=1e-4, atol=1e-5)
    assert not played_prompts


@pytest.mark.parametrize(
    "copied",
    [
        lambda model: model.model,
        lambda model: copy.deepcopy(model.model),
        lambda m: pickle.loads(pickle.dumps(m.model)),
    ],
    ids=["kept", "deepcopy", "pickle"],
)
def test_a_backbone_whose_head_is_gone(tiny_llama, played_prompts, copied):
    """As of a model that embeds: it runs, is played, and is unpatched as before."""
    model = choosing(tiny_llama())
    expected = forward(model.model).last_hidden_state
    backbone = copied(model)
    del model
    gc.collect()
    with torch.no_grad():
        torch.testing.assert_close(backbone(prompt(), use_cache=False)[0], expected, rtol=1e-4, atol=1e-5)
    warm_up(backbone)
    played = len(played_prompts)
    check(backbone)
    assert len(played_prompts) == played + 1
    unpatch(backbone)
    assert type(backbone) is LlamaModel


def test_two_heads_of_a_backbone(model, tiny_llama, played_prompts):
    head = LlamaForSequenceClassification(tiny_llama().config).eval().to(DEVICE)
    head.model = model.model
    expected = forward(head, use_cache=False).logits
    backbone = model.model
    del model
    gc.collect()
    for _ in range(4):
        torch.testing.assert_close(forward(head, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert played_prompts and type(backbone) is not LlamaModel


def test_a_model_with_cross_attention_runs(played_prompts):
    """Its cache has two halves."""
    model = choosing(FAMILIES["gpt2"].make(add_cross_attention=True))
    for use_cache in (True, False, None) * 3:
        assert forward(model, use_cache=use_cache).logits.isfinite().all()
    assert not played_prompts


def test_an_error_in_the_comparison_is_not_that_of_the_forward(model, played_prompts, monkeypatch):
    monkeypatch.setattr(recorded_prompts, "agree", lambda *_: 1 / 0)
    for _ in range(6):
        check(model)
    assert not prompts_of(model).played and not recordings_of(model)


def test_texts_beyond_what_can_be_pinned_run_without_a_cache(tiny_llama, played_prompts):
    """And leave alone what is recorded of prompts that can."""
    model = choosing(tiny_llama(), k=30, pin_prompt=-1)
    for length in (90, 20, 90):
        for seed in range(5):
            check(model, prompt(length, seed=seed), use_cache=False)
    assert played_prompts == [32, 32]


def test_what_is_set_for_a_while(model, played_prompts):
    for layer in sparse_layers(model):
        layer.dense_window = 8
    for _ in range(5):
        forward(model, use_cache=False)
    for layer in sparse_layers(model):
        layer.dense_window = 0
    assert not played_prompts
    warm_up(model, use_cache=False)
    check(model, use_cache=False)
    assert played_prompts


def test_other_outputs_of_the_configuration_run(played_prompts):
    model = choosing(FAMILIES["mixtral"].make(output_router_logits=True))
    for _ in range(5):
        with torch.no_grad():
            assert model.model(prompt()).router_logits is not None
    assert not played_prompts


def test_keywords_that_say_something_with_false(model, played_prompts):
    warm_up(model)
    check(model, output_attentions=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="is_causal=False was asked of"):
            forward(model, is_causal=False)
    assert played_prompts == [64]


@pytest.mark.parametrize("part", ["backbone", "attention", "mlp"])
def test_a_forward_that_is_replaced_in_a_class_is_called(model, played_prompts, monkeypatch, part):
    module = {"backbone": model.model, "attention": model.model.layers[0].self_attn, "mlp": model.model.layers[0].mlp}[
        part
    ]
    kind = getattr(type(module), "unpatched_class", type(module))
    warm_up(model)
    check(model)
    calls, given = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: calls.append(1) or given(*args, **kwargs))
    forward(model)
    assert calls and played_prompts == [64]


class Halved(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 0.5 if func is torch.nn.functional.silu else result


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_modes_of_torch_see_each_operation(model, played_prompts):
    warm_up(model)
    plain = check(model)
    with Halved():
        halved = forward(model)
    assert not torch.allclose(halved.logits, plain.logits) and played_prompts == [64]
    counts = []
    for _ in range(2):
        with Counted() as counted:
            forward(model)
        counts.append(counted.calls)
    assert counts[0] == counts[1] > 100 and played_prompts == [64]
    ids = prompt()
    torch.set_default_device(DEVICE)  # a mode too
    try:
        check(model, ids)
    finally:
        torch.set_default_device(None)
    assert played_prompts == [64, 64]


def test_derivatives_in_forward_mode(model, played_prompts):
    warm_up(model, use_cache=False)
    weight = model.model.norm.weight.detach()
    with torch.no_grad(), forward_ad.dual_level():
        dual = {"model.norm.weight": forward_ad.make_dual(weight, torch.ones_like(weight))}
        logits = torch.func.functional_call(model, dual, (prompt(),), {"use_cache": False}).logits
        assert forward_ad.unpack_dual(logits).tangent is not None
    assert not played_prompts


def test_a_trace_is_refused(model):
    with torch.no_grad(), pytest.raises(ValueError, match=r"torch\.jit\.trace would record"):
        torch.jit.trace(model.model, (prompt(),), strict=False)


def test_arguments_that_no_forward_takes(model, played_prompts):
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"positional argument|multiple values"):
            model.model(prompt(), *[None] * 12)
        with pytest.raises(TypeError, match="multiple values"):
            model.model(prompt(), input_ids=prompt())
        for _ in range(4):
            found = model.model(prompt(), None)
    with unrecorded():
        expected = forward(model.model)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert played_prompts == [64]


def test_training_gets_the_memory_of_what_was_recorded_before_it(model, played_prompts):
    """Once: later there was room beside it."""
    for number in range(2):
        warm_up(model)
        check(model)
        assert len(recordings_of(model)) == 1
        model.train()
        with pytest.warns(UserWarning, match="learn nothing") if number == 0 else nullcontext():
            model(prompt(14), use_cache=False)
        model.eval()
        assert len(recordings_of(model)) == number
