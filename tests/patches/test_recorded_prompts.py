"""Prompts of an ordinary `generate` that are played leave what prompts leave that run: logits, slots, and all after.

Without a GPU a recording is imitated (`played_prompts` in tests/conftest.py).
"""

import copy
import gc
import inspect
import runpy
import weakref
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, DynamicCache, LogitsProcessor, LogitsProcessorList

from hf_sparse import SparsefinderConfig, SparseKCache, SparseKConfig, patch, unpatch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.core.overrides import overwrite
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.methods.sparsek.baselines import Recency
from hf_sparse.patches import prompt_recording, recorded_prompts, sparse_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_A_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
(
    NEW_NUMBERS, NEW_TENSORS, SLOTS, assert_same, both, check, choosing, generate, in_threads, over_lora, prompt,
    prompts_of, recordings_of, refuse_to_record, runs_as_ever, use, warm_up,
) = itemgetter(
    "NEW_NUMBERS", "NEW_TENSORS", "SLOTS", "assert_same", "both", "check", "choosing", "generate", "in_threads",
    "over_lora", "prompt", "prompts_of", "recordings_of", "refuse_to_record", "runs_as_ever", "use", "warm_up",
)(runpy.run_path(str(Path(__file__).with_name("prompts.py"))))  # fmt: skip


@pytest.fixture
def settings_of_torch():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def model(tiny_llama):
    return choosing(tiny_llama())


SHARES = {
    "equal": {},
    "layers": {"layer_shares": [1.5, 0.5]},
    "heads": {"head_shares": [[0.5, 1.0], [1.75, 0.75]]},
    "pinned": {"pin_prompt": 5},
    "another scorer": {"scorer": "mlp", "scorer_hidden_size": 16},
    "slopes": {"position_slope": 0.01, "learn_slope": True},
    "slopes with a length": {"position_slope": 0.2, "slope_length": 9},
}


@pytest.mark.versions
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_and_slots_are_those_of_prompts_that_run(tiny_llama, played_prompts, shares, rows):
    """In buckets of up to 64 tokens and of more, on both sides of the slots, and long after the prompt."""
    model = choosing(tiny_llama(), **shares)
    slots = [layer.prompt_edge for layer in sparse_layers(model, SparseKAttention)]
    for length in (max(slots) + 1, 64, 65, 100, 128, *{slots[0] - 1, slots[0], slots[-1] - 1, slots[-1]}):
        warm_up(model, length, rows)
        ids = prompt(length, rows)
        before = len(played_prompts)
        found = generate(model, ids, max_new_tokens=40)
        assert len(played_prompts) == before + 1 and played_prompts[-1] >= length
        assert_same(found, generate(model, ids, max_new_tokens=40, disable_compile=True))
        assert len(played_prompts) == before + 1


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=name, marks=pytest.mark.full if family.kin else ())
        for name, family in FAMILIES.items()
        if family.causal
    ],
)
def test_every_family(family, played_prompts):
    """Heads take the place of the last token as a tensor, and nothing else tells a text from what stands behind it.

    Layers with a window of their own are not recorded, nor is an older OPT, which looks into a mask of its own. Experts
    may wait for the device on a GPU."""
    model = choosing(family.make())
    warm_up(model, 60, 2)
    for length in (60, 37):
        ids = prompt(length, 2)
        found, expected = both(model, ids, max_new_tokens=9)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    waits = family.name == "opt" and "past_key_values" in with_cache(None)
    if family.local or waits:
        assert not played_prompts
    elif DEVICE == "cpu" or "num_experts" not in family.settings:
        assert played_prompts == [64, 64]


def test_lengths_of_a_bucket_share_a_recording(model, played_prompts):
    """Whatever order they come in: a shorter text sees nothing of a longer one before it."""
    warm_up(model, 64)
    for number, length in enumerate((64, 17, 40, 63, 18, 64)):
        check(model, prompt(length, seed=number), max_new_tokens=5)
    assert played_prompts == [64] * 6 and prompts_of(model).played == 6
    assert len(recordings_of(model)) == 1


@pytest.mark.parametrize("length", [12, 40])
def test_nothing_of_an_earlier_prompt_is_left(model, played_prompts, length):
    """Not even where it is no number: values of NaN would be seen through a weight of 0."""
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = float("nan")
    ids = prompt(length) % 60
    warm_up(model, length)
    longer = prompt(16 if length == 12 else 64)
    longer[:, -1] = 63
    assert generate(model, longer).logits[0].isnan().any()
    found, expected = both(model, ids)
    assert not expected.logits[0].isnan().any() and len(played_prompts) == 2
    assert_same(found, expected)


def test_lengths_that_never_come_again(model, played_prompts):
    """The first prompts of other lengths may compile kernels, so one more of them is timed."""
    for length in (40, 41, 42, 43, 44, 45):
        generate(model, prompt(length))
    assert played_prompts == [64, 64]


def test_a_prompt_that_an_error_ended_does_not_count(model, played_prompts, monkeypatch):
    generate(model, prompt(40))
    with monkeypatch.context() as broken:
        for name in ("attend", "attend_fast"):
            broken.setattr(SparseKAttention, name, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(model, prompt(40))
    for number in (0, 0, 1, 2):
        generate(model, prompt(40))
        assert len(played_prompts) == number


def test_masks_and_positions_of_the_caller(model, played_prompts):
    """Positions are read by the recording; a mask without padding is left out, and one with padding runs."""
    ids, length = prompt(50, 2), 50
    mask = torch.ones_like(ids)
    positions = torch.arange(3, length + 3, device=DEVICE).expand(2, -1)
    for options in ({"attention_mask": mask}, {"attention_mask": mask, "position_ids": positions}):
        for _ in range(3):
            generate(model, ids, **options)
        before = len(played_prompts)
        found = generate(model, ids, max_new_tokens=5, **options)
        assert len(played_prompts) == before + 1
        assert_same(found, generate(model, ids, max_new_tokens=5, disable_compile=True, **options))
    before, mask = len(played_prompts), (torch.arange(length, device=DEVICE) >= 3).long().expand(2, -1)
    check(model, ids, attention_mask=mask, max_new_tokens=5)
    assert len(played_prompts) == before


def test_beams_and_samples(model, played_prompts):
    ids, options = prompt(30, 2), {"num_beams": 3, "max_new_tokens": 8, "output_logits": False}
    for _ in range(3):
        generate(model, ids, **options)
    found, expected = both(model, ids, **options)
    assert torch.equal(found.sequences, expected.sequences) and played_prompts == [64]
    sampled = []
    for plain in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "disable_compile": plain}
        sampled.append(generate(model, ids, **options).sequences)
    assert played_prompts == [64, 64]
    if DEVICE == "cpu":
        assert torch.equal(*sampled)


def test_logits_are_of_the_call(model, played_prompts):
    """Keep the logits of one call in a processor while the next one plays."""

    class Kept(LogitsProcessor):
        def __init__(self):
            self.logits = []

        def __call__(self, input_ids, scores):
            self.logits.append(scores)
            return scores

    warm_up(model, 30)
    kept = Kept()
    results = [
        generate(model, prompt(30, seed=seed), logits_processor=LogitsProcessorList([kept])) for seed in range(3)
    ]
    assert played_prompts == [64] * 3
    for logits, result in zip(kept.logits, results, strict=True):
        assert torch.equal(logits, result.logits[0])
    assert not torch.equal(kept.logits[0], kept.logits[1])


def test_a_cache_goes_on_after_another_prompt_was_played(model, played_prompts):
    """Its slots are its own: a second turn, a copy, and a crop find them as if no prompt had come between."""
    for length in (40, 12):
        warm_up(model, length)
        results = []
        for plain in (False, True):
            first = generate(model, prompt(length), max_new_tokens=3, disable_compile=plain)
            cache = cache_of(first)
            generate(model, prompt(length, seed=5), disable_compile=plain)
            copied = copy.deepcopy(cache)
            more = torch.cat([first.sequences, prompt(7, seed=6)], 1)
            if length == 12:
                cache.crop(-2)
                more = more[:, : length + 3]
            second = generate(model, more, max_new_tokens=12, disable_compile=plain, **with_cache(cache))
            third = generate(model, torch.cat([first.sequences, prompt(7, seed=6)], 1), **with_cache(copied))
            results.append((second, third))
        for found, expected in zip(*results, strict=True):
            assert_same(found, expected)
    assert played_prompts == [64, 64, 16, 16]


def test_a_cache_that_the_user_made(model, played_prompts):
    """Its layers stay those that the user sees; a second turn, and a cache with a token in it, run."""
    results = []
    for plain in (True, False, False, False, False):
        cache = SparseKCache(model)
        layers = list(cache.layers)
        first = generate(model, prompt(40), disable_compile=plain, **with_cache(cache))
        more = torch.cat([first.sequences, prompt(7, seed=6)], 1)
        results.append(generate(model, more, max_new_tokens=9, disable_compile=True, **with_cache(cache)))
        assert all(one is other for one, other in zip(cache.layers, layers, strict=True))
    assert_same(results[-1], results[0])
    assert played_prompts == [64]
    for _ in range(4):
        cache.reset()
        generate(model, prompt(40), **with_cache(cache))
    assert played_prompts == [64]


def test_caches_of_each_call_are_apart(model, played_prompts):
    warm_up(model, 30)
    first, second = (cache_of(generate(model, prompt(30, seed=seed))) for seed in (3, 4))
    before = [layer.keys.clone() for layer in first.layers]
    for layer in second.layers:
        layer.keys.zero_()
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(first.layers, before, strict=True))
    assert played_prompts == [64, 64]


OPTIONS = {
    "told not to": {"disable_compile": True},
    "compiled as told": {"compile_config": CompileConfig()},
    "in chunks": {"prefill_chunk_size": 11},
    "hidden states": {"output_hidden_states": True},
    "static": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_with_which_prompts_run(tiny_llama, played_prompts, options):
    model = choosing(tiny_llama(), k=60)  # a draft is taken back by a crop
    runs_as_ever(model, played_prompts, **options)


def test_embeddings_and_caches_of_others_run(model, played_prompts):
    ids = prompt(40)
    embeddings = model.get_input_embeddings()(ids).detach()
    for _ in range(4):
        model.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=3)
        model.generate(ids, do_sample=False, max_new_tokens=3, **with_cache(DynamicCache()))
    assert not played_prompts


def test_autocast_and_gradients_run(model, played_prompts):
    ids = prompt(40)
    for _ in range(4):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            generate(model, ids)
    raw = inspect.unwrap(type(model).generate)  # without its no_grad
    for _ in range(4):
        raw(model, ids, do_sample=False, max_new_tokens=1)
    assert not played_prompts


def train(model):
    model.train()


def hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def replace_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = mlp.forward


def observe(model):
    sparse_layers(model)[0].observer = lambda *_: None


def choose_by_a_baseline(model):
    for layer in sparse_layers(model):
        layer.baseline = Recency()


def spread(model):
    model.hf_device_map = {"model": 0, "lm_head": 1}


def switch_off(model):
    for layer in sparse_layers(model):
        layer.enable_adapters(False)


def quantise(model):
    model.config.quantization_config = {"quant_method": "fp8"}


@pytest.mark.parametrize("change", [hook, replace_forward, observe, choose_by_a_baseline, spread, switch_off])
def test_models_whose_prompts_run(model, played_prompts, change):
    change(model)
    runs_as_ever(model, played_prompts)


@pytest.mark.parametrize("change", [train, quantise])
def test_models_that_are_not_looked_at(model, played_prompts, change):
    change(model)
    for _ in range(4):
        with torch.no_grad():
            model(prompt(40))
    assert not played_prompts


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}], ids=lambda rope: rope["rope_type"]
)
def test_positions_that_depend_on_the_length_run(tiny_llama, played_prompts, rope):
    model = choosing(tiny_llama(rope_parameters=rope))
    runs_as_ever(model, played_prompts)


def test_layers_that_are_not_the_methods_run(tiny_llama, played_prompts):
    runs_as_ever(choosing(tiny_llama(), layers=[1]), played_prompts)


def test_methods_that_do_not_support_it_run(tiny_llama, played_prompts):
    model = patch(tiny_llama().to(DEVICE), SparsefinderConfig(tile=8, tiles_per_query=3, window=1, clusters=6))
    fit_predictors(sparse_layers(model, SparsefinderAttention), lambda: model(prompt(40), use_cache=False))
    runs_as_ever(model, played_prompts)


def test_prompts_beyond_the_positions_of_the_model_run(tiny_llama, played_prompts):
    """A bucket ends with the positions that there are: GPT-2 has no others."""
    model = choosing(FAMILIES["gpt2"].make(n_positions=100))
    warm_up(model, 90)
    check(model, prompt(97))
    assert played_prompts == [100]


def test_texts_that_would_wait_longer_for_padding_than_for_python_run(model, played_prompts, monkeypatch):
    times = iter([64e6, 50e6])  # of a prompt that ran, and of a replay: that of 50 tokens and the look at the model
    monkeypatch.setattr(recorded_prompts.Timing, "ms", lambda self: next(times))
    warm_up(model, 64)
    for length in (64, 64, 64, 60, 50, 49, 51, 33):
        generate(model, prompt(length))
    assert played_prompts == [64] * 5


def test_a_recording_that_is_slower_than_the_prompt_goes(model, played_prompts, monkeypatch):
    times = iter([40.0, 63.99])  # the replay reads 64 tokens, and there is the look at the model beside
    monkeypatch.setattr(recorded_prompts.Timing, "ms", lambda self: next(times))
    for seed in range(8):
        generate(model, prompt(40, seed=seed))
    assert played_prompts == [64]  # one is timed
    assert not recordings_of(model)


@pytest.mark.parametrize("part", ["states", "keys", "values"])
def test_a_recording_that_differs_from_a_prompt_that_ran_is_refused(model, played_prompts, monkeypatch, part):
    """On a GPU a recording may go wrong in silence, so the first time it plays beside a prompt that runs."""
    play = recorded_prompts.RecordedPrompts._play

    def differ(self, recording, prompt, inputs):
        output = play(self, recording, prompt, inputs)
        wrong = output.last_hidden_state if part == "states" else getattr(prompt.layers[1], part)
        wrong.copy_(torch.randn_like(wrong))
        return output

    monkeypatch.setattr(recorded_prompts.RecordedPrompts, "_play", differ)
    expected = generate(model, prompt(40), max_new_tokens=4, disable_compile=True)
    for _ in range(2):
        generate(model, prompt(40))
    with pytest.warns(UserWarning, match="recorded as a CUDA graph differs from one that ran, so all of the model run"):
        assert_same(generate(model, prompt(40), max_new_tokens=4), expected)
    for _ in range(4):
        assert_same(generate(model, prompt(40), max_new_tokens=4), expected)
    assert not played_prompts and not recordings_of(model)


def test_prompts_run_while_there_is_too_little_memory_for_a_recording(model, played_prompts, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(recorded_prompts, "_has_room", lambda device: False)
        warm_up(model, 40)
        generate(model, prompt(40))
    assert not recordings_of(model)
    for number in (0, 1):
        generate(model, prompt(40))
        assert len(played_prompts) == number


def test_an_error_while_recording_lets_all_prompts_run(model, played_prompts, monkeypatch):
    attempts = refuse_to_record(monkeypatch, prompt_recording, sparse_layers(model)[0])
    runs_as_ever(model, played_prompts)
    runs_as_ever(model, played_prompts, length=90)
    assert attempts == [1]


def test_too_little_memory_lets_the_prompts_of_a_bucket_run(model, played_prompts, monkeypatch):
    def fail(call, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as full:
        full.setattr(prompt_recording, "run_beside", fail)
        runs_as_ever(model, played_prompts)
    runs_as_ever(model, played_prompts)
    warm_up(model, 90)
    generate(model, prompt(90))
    assert played_prompts == [128]


def needs_the_memory_of_recordings(model, monkeypatch):
    """Let forwards run out of memory in the last layer, once keys and values of the others are in the cache."""
    mlp, failed = type(model.model.layers[-1].mlp), []
    forward = mlp.forward

    def fail(self, states):
        if self is model.model.layers[-1].mlp and recordings_of(model):
            failed.append(states.shape)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, states)

    monkeypatch.setattr(mlp, "forward", fail)
    return failed


@pytest.mark.parametrize("length", [30, 90])
def test_a_prompt_gets_the_memory_of_recordings(model, played_prompts, monkeypatch, length):
    """One that was generated before, or too long to be recorded, would fail for what makes others faster."""
    warm_up(model, 40)
    generate(model, prompt(40))
    expected = generate(model, prompt(length), max_new_tokens=5, disable_compile=True)
    failed = needs_the_memory_of_recordings(model, monkeypatch)
    assert_same(generate(model, prompt(length), max_new_tokens=5), expected)
    assert len(failed) == 1 and not recordings_of(model)


def test_a_prompt_in_a_cache_of_the_user_fails_once(model, played_prompts, monkeypatch):
    """Its layers hold a part of the text, so that it cannot run again; with a new cache there is room."""
    warm_up(model, 40)
    generate(model, prompt(40))
    failed = needs_the_memory_of_recordings(model, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, prompt(90), **with_cache(SparseKCache(model)))
    assert len(failed) == 1 and not recordings_of(model)
    expected = generate(model, prompt(90), disable_compile=True)
    assert_same(generate(model, prompt(90), **with_cache(SparseKCache(model))), expected)


def transpose(model):
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data = weight.data.t()


def new_scorer(model):
    for layer in sparse_layers(model):
        weight = layer.sparsek_scorer["default"].weight
        weight.data = torch.randn_like(weight)


def new_slope_length(model):
    """As `finetune` sets it, in place."""
    overwrite([sparse_layers(model)[0].config], slope_length=3)


def new_adapter(model):
    patch(model, SparseKConfig(k=5, window=4, sinks=1), adapter="other")
    use(model, "other", inference_mode=False)


def patched_again(model):
    unpatch(model)
    patch(model, SparseKConfig(k=8, window=7, sinks=3))


def new_setting(model):
    torch.use_deterministic_algorithms(True, warn_only=True)


CHANGES = [
    *NEW_TENSORS, *NEW_NUMBERS, transpose, new_scorer, new_slope_length, new_adapter, patched_again, new_setting,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_recorded_anew(model, played_prompts, settings_of_torch, change):
    warm_up(model, 40)
    generate(model, prompt(40))
    assert len(played_prompts) == 1
    change(model)
    ids = prompt(40)
    for number in (1, 1, 1, 2, 3):
        found = generate(model, ids, max_new_tokens=8)
        assert len(played_prompts) == number
        assert torch.equal(found.sequences, generate(model, ids, max_new_tokens=8, disable_compile=True).sequences)


def test_weights_that_change_in_place_are_read(model, played_prompts):
    warm_up(model, 40)
    before = generate(model, prompt(40))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)
    found, expected = both(model, prompt(40))
    assert_same(found, expected)
    assert not torch.allclose(found.logits[0], before.logits[0]) and played_prompts == [64, 64]


def test_adapters_of_peft_are_told_apart(tiny_llama, played_prompts):
    """LoRA of others below: switched off, another one, scaled, and merged."""
    model, layers = over_lora(tiny_llama())

    def generate_and_count(number):
        found = generate(model, prompt(40), max_new_tokens=4)
        assert len(played_prompts) == number
        assert_same(found, generate(model, prompt(40), max_new_tokens=4, disable_compile=True))

    for number in (0, 0, 0, 1):
        generate_and_count(number)
    changes = (
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.set_adapter("other", inference_mode=True),
        lambda layer: layer.scale_layer(2.0),
        lambda layer: layer.merge(),
    )
    undo = (
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.set_adapter("default", inference_mode=True),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.unmerge(),
    )
    for number, (change, back) in enumerate(zip(changes, undo, strict=True), 1):
        for layer in layers:
            change(layer)
        generate_and_count(number)
        for layer in layers:
            back(layer)
            layer.requires_grad_(False)
        generate_and_count(number + 1)


def test_adapters_switched_to_and_fro_find_their_recordings(model, played_prompts):
    patch(model, SparseKConfig(k=5, window=4, sinks=1), adapter="other")
    for number, name in enumerate(("default", "other") * 5):
        use(model, name)
        check(model, prompt(40, seed=number), max_new_tokens=4)
    assert len(played_prompts) == 4 and len(recordings_of(model)) == 2


def test_adapters_that_transformers_manages(model, played_prompts):
    for layer in sparse_layers(model):
        layer.is_managed = lambda: True
    warm_up(model, 40)
    check(model, prompt(40))
    assert played_prompts == [64]


def test_the_prompts_that_are_pinned_whole(tiny_llama, played_prompts):
    """They fit into sinks and selected keys, and so does their bucket."""
    model = choosing(tiny_llama(), k=26, pin_prompt=-1)
    warm_up(model, 20)
    for length in (20, 28):
        check(model, prompt(length), max_new_tokens=30)
    assert played_prompts == [28, 28]
    with pytest.raises(ValueError, match="pin_prompt keeps the whole prompt"):
        generate(model, prompt(29))


def test_the_recording_used_least_recently_makes_room(model, played_prompts, monkeypatch):
    """Only one that was not used for a while; otherwise prompts of many lengths would be recorded again and again.

    Until then the host does not look at the model for the others.
    """
    monkeypatch.setattr(recorded_prompts, "_MOST_RECORDINGS", 2)
    monkeypatch.setattr(recorded_prompts, "_IDLE", 8)
    for length in (40, 100):
        warm_up(model, length)
        generate(model, prompt(length))
    warm_up(model, 160)
    for _ in range(5):
        generate(model, prompt(160))
        generate(model, prompt(100))
    # By the first round the first was not used for eight prompts: one is timed there, and one recorded in the next.
    assert played_prompts == [64, 128, 128, 128, *[192, 128] * 3]
    assert [length for _, length in recordings_of(model)] == [192, 128]


def test_recordings_go_with_the_patch(model, played_prompts):
    warm_up(model, 40)
    generate(model, prompt(40))
    (recording,) = (weakref.ref(one) for one in recordings_of(model).values())
    unpatch(model)
    assert recording() is None


def test_recordings_go_with_the_model(tiny_llama, played_prompts):
    """No cycle keeps them."""
    model = choosing(tiny_llama())
    warm_up(model, 40)
    generate(model, prompt(40))
    (recording,) = (weakref.ref(one) for one in recordings_of(model).values())
    gc.disable()
    try:
        del model
        assert recording() is None
    finally:
        gc.enable()


def test_a_copied_model_has_recordings_of_its_own(model, played_prompts):
    warm_up(model, 40)
    generate(model, prompt(40))
    twin = copy.deepcopy(model)
    assert not recordings_of(twin)
    generate(twin, prompt(40))
    assert len(played_prompts) == 1


def test_threads_take_turns(model, played_prompts):
    """Prompts of several threads are played one after the other, each with a cache of its own."""
    warm_up(model, 40)
    for found, expected in zip(*in_threads(model, 40), strict=True):
        assert_same(found, expected)
    assert played_prompts == [64] * 4


def test_recordings_and_replays_wait_for_copies_on_other_streams(model, played_prompts, monkeypatch):
    """Recordings of one state fill the same layers, from which the last prompt may not have been copied yet."""
    warm_up(model, 40)
    generate(model, prompt(40))
    order, wait, run = [], prompts_of(model)._wait_for_copies, prompt_recording.run_beside
    monkeypatch.setattr(prompts_of(model), "_wait_for_copies", lambda device: (order.append("waits"), wait(device)))
    monkeypatch.setattr(prompt_recording, "run_beside", lambda *args: (order.append("writes"), run(*args)))
    warm_up(model, 100)
    assert order == ["waits", "writes", "waits"]  # the recording, and the replay that is compared


def test_inference_mode_may_come_and_go(model, played_prompts):
    warm_up(model, 40)
    for is_on in (True, False, True):
        with torch.inference_mode(is_on):
            found = generate(model, prompt(40), max_new_tokens=3)
        assert_same(found, generate(model, prompt(40), max_new_tokens=3, disable_compile=True))
    assert played_prompts == [64] * 3


@ON_A_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_graphs_in_half_precision(tiny_llama, played_prompts, dtype, shares):
    """A prompt as long as its bucket launches the same kernels, so that all is equal bit by bit."""
    model = choosing(tiny_llama(hidden_size=128).to(dtype), **shares)
    for length in (64, 128, 512):
        warm_up(model, length, rows=2)
        found, expected = both(model, prompt(length, 2))
        assert torch.equal(found.logits[0], expected.logits[0])
        for mine, theirs in zip(cache_of(found).layers, cache_of(expected).layers, strict=True):
            assert all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in SLOTS)
    assert played_prompts == [64, 128, 512]


@ON_A_GPU
def test_steps_are_recorded_after_a_prompt_that_was_played(model, played_prompts, played):
    warm_up(model, 40)
    check(model, prompt(40), max_new_tokens=30)
    assert played_prompts == [64] and len(played) == 27


@ON_A_GPU
def test_memory_of_recordings_is_shared_and_given_back(tiny_llama, played_prompts):
    model = choosing(tiny_llama(hidden_size=512, intermediate_size=4096))

    def reserved():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    for plain in (True, False):  # libraries allocate what they keep for each stream
        for _ in range(3):
            generate(model, prompt(64, 8), disable_compile=plain)
    prompts_of(model).clear()
    before, taken = reserved(), []
    for length in (512, 448, 384, 320):
        warm_up(model, length, 8)
        generate(model, prompt(length, 8))
        taken.append(reserved() - before)
    assert len(played_prompts) == 4 and taken[0] >= 1 << 24
    assert taken[-1] <= 1.5 * taken[0]
    unpatch(model)
    assert reserved() <= before
