"""Steps of an ordinary `generate` that were recorded generate what steps that run generate.

Without a GPU a recording is imitated (`played` in tests/conftest.py).
"""

import gc
import runpy
import time
import weakref
from pathlib import Path
from threading import Thread

import pytest
import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from hf_sparse import CapturedDecoding, SparsefinderConfig, SparseKCache, SparseKConfig, patch, unpatch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.methods.sparsefinder import SparsefinderAttention, fit_predictors
from hf_sparse.patches import recorded_steps, sparse_layers
from hf_sparse.patches.recorded_steps import RecordedSteps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
refuse_to_record = runpy.run_path(str(Path(__file__).with_name("prompts.py")))["refuse_to_record"]
IDS = torch.randint(2, 64, (3, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
LEFT = (torch.arange(40) >= torch.tensor([0, 17, 30])[:, None]).long().to(DEVICE)
GREEDY = {"do_sample": False, "max_new_tokens": 30}


@pytest.fixture
def model(tiny_llama):
    return patch(tiny_llama().to(DEVICE), SparseKConfig(k=6, window=8, sinks=2))


@pytest.mark.versions
@pytest.mark.parametrize(
    "options", [{}, {"attention_mask": LEFT}, {"prefill_chunk_size": 11}], ids=["whole", "padded", "in chunks"]
)
def test_tokens_are_those_of_steps_that_run(model, played, options):
    """Count 2 steps that run among the 29 after the first token; `disable_compile` lets all run."""
    options = GREEDY | options
    expected = model.generate(IDS, disable_compile=True, **options)
    assert not played
    for number in (27, 54):
        assert torch.equal(model.generate(IDS, **options), expected)
        assert len(played) == number


@pytest.mark.versions
@pytest.mark.parametrize(
    "options", [{}, {"attention_mask": LEFT}, {"prefill_chunk_size": 11}], ids=["one length", "padded", "in chunks"]
)
@pytest.mark.parametrize("grows", [False, True])
def test_inputs_of_a_step_are_made_after_the_step_before(tiny_llama, played, monkeypatch, grows, options):
    """All but the token, of all played steps but the first; and nothing holds the cache when the loop is done."""
    config = SparsefinderConfig(predictor="full") if grows else SparseKConfig(k=6, window=8, sinks=2)
    model = patch(tiny_llama().to(DEVICE), config)
    expected, caches = [], []
    play = RecordedSteps._play_expected

    def note(steps, inputs, step):
        expected.append(play(steps, inputs, step))
        caches.append(weakref.ref(steps.layout[0]))
        return expected[-1]

    monkeypatch.setattr(RecordedSteps, "_play_expected", note)
    options = GREEDY | options | {"max_new_tokens": 12}
    tokens = model.generate(IDS, **options)
    assert len(played) == 9 and expected == [True] * 8
    gc.collect()
    assert not any(cache() for cache in caches)
    assert torch.equal(tokens, model.generate(IDS, disable_compile=True, **options))


@pytest.mark.parametrize("change", ["positions", "mask", "cropped"])
def test_a_step_that_was_not_expected_gets_its_own_inputs(model, played, change):
    positions = [torch.full_like(IDS[:, :1], number) for number in range(14)]
    real = torch.ones_like(positions[0])

    def run(expects, change):
        steps, cache, logits = RecordedSteps(model), DynamicCache(), []

        def prepare(ids, next_sequence_length, **arguments):
            return {"input_ids": ids, **arguments, **with_cache(cache)}

        model(IDS[:, :4], **with_cache(cache))
        for number in range(4, 13):
            arguments = {"position_ids": positions[number], "attention_mask": real}
            if number == 8 and change == "positions":
                arguments["position_ids"] = positions[number] + 3
            if number == 8 and change == "mask":
                arguments["attention_mask"] = torch.tensor([[1], [1], [0]], device=DEVICE)
            if number >= 8 and change == "cropped":
                arguments["position_ids"] = positions[number - 2]
                if number == 8:
                    cache.crop(-2)
            logits.append(steps(**prepare(IDS[:, number : number + 1], 1, **arguments)).logits.clone())
            if expects and steps.replay is not None:
                arguments = {"position_ids": positions[number + 1], "attention_mask": real}
                steps.expect(prepare, arguments | {"next_sequence_length": 1}, {})
                assert steps.expected is not None
        return torch.stack(logits)

    with torch.no_grad():
        expected = run(False, change)
        assert torch.equal(run(True, change), expected)
        assert not torch.equal(run(True, None), expected)


class Call(LogitsProcessor):
    """Call something between two steps."""

    def __init__(self, call):
        self.call = call

    def __call__(self, input_ids, scores):
        self.call(input_ids.shape[1])
        return scores


def test_a_tensor_of_the_caller_may_change_between_two_steps(tiny_llama, played):
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, scale=None, **inputs):
            output = super().forward(*args, **inputs)
            output.logits = output.logits * scale
            return output

    plain = tiny_llama()
    model = Scaled(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    patch(model.to(DEVICE), SparseKConfig(k=6, window=8, sinks=2))
    found = []
    for disable in (True, False):
        scale = torch.ones((), device=DEVICE)
        processor = LogitsProcessorList([Call(lambda length, scale=scale: scale.fill_((-1) ** (length // 7)))])
        options = GREEDY | {"logits_processor": processor, "scale": scale, "disable_compile": disable}
        found.append(model.generate(IDS, **options))
    assert torch.equal(*found) and len(played) == 27


@pytest.mark.parametrize("change", ["adapter", "off", "LoRA"])
def test_adapters_that_are_switched_between_two_steps(tiny_llama, played, change):
    """The next two steps run, and then a new recording is played."""
    model = patch(tiny_llama().to(DEVICE), SparsefinderConfig(predictor="full", initial_scale=0.3))
    patch(model, SparsefinderConfig(predictor="full", initial_scale=3.0), "other")
    LoraModel(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False), "default").eval()
    lora = [module for module in model.modules() if isinstance(module, LoraLayer)]

    def switch(length):
        for layer in lora if change == "LoRA" else sparse_layers(model):
            if change == "adapter":
                layer.set_adapter("default" if length < 50 else "other")
            else:
                layer.enable_adapters(length < 50)

    processor = LogitsProcessorList([Call(switch)])
    tokens = model.generate(IDS, logits_processor=processor, **GREEDY)
    switch(0)
    assert torch.equal(tokens, model.generate(IDS, logits_processor=processor, disable_compile=True, **GREEDY))
    assert played == [0] * 8 + [1] * 17


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation"])
def test_what_others_set_in_the_model_may_change_inputs_in_place(tiny_llama, played, name, grows):
    config = SparsefinderConfig(predictor="full") if grows else SparseKConfig(k=6, window=8, sinks=2)
    model = patch(tiny_llama().to(DEVICE), config)
    held, method = [], getattr(model, name)

    def note(*args, **kwargs):
        inputs = method(*args, **kwargs)
        held[:] = [inputs["position_ids"]]
        if name.startswith("prepare"):
            inputs["position_ids"] += 5
        return inputs

    setattr(model, name, note)
    processor = LogitsProcessorList([Call(lambda length: held[0].add_(3))])
    options = GREEDY | {"logits_processor": processor}
    expected = model.generate(IDS, disable_compile=True, **options)
    assert torch.equal(model.generate(IDS, **options), expected) and len(played) == 27


def test_generate_within_a_step_of_generate(model, played):
    inner, options = [], {"do_sample": False, "max_new_tokens": 8}
    processor = LogitsProcessorList([Call(lambda length: inner.append(model.generate(IDS[:2, :20], **options)))])
    expected = model.generate(IDS, disable_compile=True, **GREEDY)
    assert torch.equal(model.generate(IDS, logits_processor=processor, **GREEDY), expected)
    assert len(played) == 27 + 30 * 5 and all(torch.equal(one, inner[0]) for one in inner)


def test_generate_in_another_thread_between_question_and_call(model, played):
    config = model.generation_config
    assert model._valid_auto_compile_criteria({}, config)
    thread = Thread(target=lambda: model.generate(IDS, **GREEDY))
    thread.start()
    thread.join()
    assert isinstance(model.get_compiled_call(None), RecordedSteps)


def test_samples_and_processors_are_those_of_the_loop(model, played):
    class Seen(LogitsProcessor):
        def __init__(self):
            self.logits = []

        def __call__(self, input_ids, scores):
            self.logits.append(scores.clone())
            return scores

    logits, found = [], []
    for plain in (True, False):
        torch.manual_seed(0)
        seen = Seen()
        options = {"do_sample": True, "max_new_tokens": 20, "top_k": 9, "disable_compile": plain}
        result = model.generate(
            IDS,
            logits_processor=LogitsProcessorList([seen]),
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        assert all(torch.equal(a, b) for a, b in zip(result.logits, seen.logits, strict=True))
        found.append(result.sequences)
        logits.append(torch.stack(seen.logits))
        assert cache_of(result).get_seq_length() == 59
    assert len(played) == 17
    if DEVICE == "cpu":
        assert torch.equal(*found) and torch.equal(*logits)


def test_a_cache_goes_on_after_recorded_steps(model, played):
    """Its positions are those of a cache whose steps ran, and so are the tokens of a second turn."""
    results = []
    for plain in (True, False):
        options = {"do_sample": False, "return_dict_in_generate": True, "disable_compile": plain}
        first = model.generate(IDS, max_new_tokens=12, **options)
        cache = cache_of(first)
        assert [layer.get_seq_length() for layer in cache.layers] == [51] * len(cache.layers)
        more = torch.cat([first.sequences, IDS[:, :7]], 1)
        second = model.generate(more, max_new_tokens=12, **with_cache(cache), **options)
        results.append((second.sequences, torch.stack([layer.positions for layer in cache.layers])))
    assert played
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_model_that_was_asked_for_its_hidden_states_goes_on_recording(model, played):
    """transformers leaves its hooks in such a model."""
    expected = model.generate(IDS, disable_compile=True, **GREEDY)
    assert model(IDS, output_hidden_states=True).hidden_states is not None
    assert any(layer._forward_hooks for layer in model.model.layers)
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    assert len(played) == 27


def test_hooks_of_others_are_called_in_every_step(model, played):
    calls = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.generate(IDS, **GREEDY)
    assert len(calls) == 30 and not played
    handle.remove()
    model.generate(IDS, **GREEDY)
    assert len(calls) == 30 and len(played) == 27


def test_what_cannot_be_recorded_runs(model, played, monkeypatch):
    expected = model.generate(IDS, disable_compile=True, **GREEDY)
    attempts = refuse_to_record(monkeypatch, recorded_steps, sparse_layers(model)[0])
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    assert attempts == [1]


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
def test_a_recording_that_fails_leaves_the_device_as_it_was():
    """Draw random numbers, and get back the memory of the recording, after a call that waits for the device."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.manual_seed(0)
    expected = torch.randn(3, device=device)
    torch.manual_seed(0)

    def call():
        large = torch.empty(1 << 26, device=device)
        torch.randn(3, device=device)
        return large.sum().item()

    for _ in range(3):
        with pytest.raises(RuntimeError):
            recorded_steps.record(call, device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    assert torch.equal(torch.randn(3, device=device), expected)
    assert torch.cuda.memory_reserved() - before < 1 << 26


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
def test_threads_record_one_after_the_other():
    """They share a stream, and what one launches there would become a part of what the other records."""
    device = torch.device("cuda", torch.cuda.current_device())
    found = {}

    def work(number):
        numbers = torch.full((4,), float(number), device=device)

        def call():
            time.sleep(0.05)
            return numbers * 2 + 1

        recorded_steps.run_beside(call, device)
        output, replay = recorded_steps.record(call, device)
        numbers += 10
        replay()
        found[number] = output.tolist()

    threads = [Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [2.0 * (number + 10) + 1] * 4 for number in range(4)}


GRAPH = {"tile": 8, "tiles_per_query": 3, "window": 1, "clusters": 6, "initial_scale": 3.0}
GROWING = {
    "all keys": {"predictor": "full"},
    "clusters": {"query_tile": 4},
    "the first layer dense": {"query_tile": 4, "layers": [1]},
    "parts, budgets of heads": {
        "query_tile": 1,
        "rank": 4,
        "cluster_parts": 2,
        "top_clusters": 1,
        "head_budgets": True,
    },
}


@pytest.mark.cross("values")
@pytest.mark.parametrize("settings", GROWING.values(), ids=GROWING)
@pytest.mark.parametrize("mask", [None, LEFT], ids=["one length", "padded"])
def test_a_cache_grows_between_recordings(tiny_llama, played, monkeypatch, settings, mask):
    """Run two of 15 steps, and those that find no room; the cache is then as if all steps had run."""
    monkeypatch.setattr("hf_sparse.methods.sparsefinder.rooms.ROOM", 5)
    model = patch(tiny_llama().to(DEVICE), SparsefinderConfig(**GRAPH, **settings))
    fit_predictors(sparse_layers(model, SparsefinderAttention), lambda: model(IDS, use_cache=False))
    results = []
    for plain in (True, False):
        options = {"do_sample": False, "return_dict_in_generate": True, "disable_compile": plain}
        first = model.generate(IDS, attention_mask=mask, max_new_tokens=16, output_logits=True, **options)
        layers = cache_of(first).layers
        state = [getattr(layer, name) for layer in layers for name in ("keys", "values", "query_codes", "key_codes")]
        more = torch.cat([first.sequences, IDS[:, :7]], 1)
        seen = None if mask is None else torch.cat([mask, torch.ones_like(IDS[:, :23])], 1)
        second = model.generate(more, attention_mask=seen, max_new_tokens=8, **with_cache(cache_of(first)), **options)
        results.append((*first.logits, *[part for part in state if part is not None], second.sequences))
        assert layers[0].get_seq_length() == 40 + 16 + 7 + 7
    assert len(played) == 3 + 4 + 4 + 5
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_beams_that_move_the_keys_of_a_growing_cache_run(tiny_llama, played):
    model = patch(tiny_llama().to(DEVICE), SparsefinderConfig(predictor="full"))
    expected = model.generate(IDS, num_beams=2, disable_compile=True, **GREEDY)
    assert torch.equal(model.generate(IDS, num_beams=2, **GREEDY), expected) and not played


def test_a_step_that_needs_the_length_runs(tiny_llama, played):
    """A predictor without codes looks at the keys that there are, not at those that there is room for."""
    config = SparsefinderConfig(predictor="pooled", tile=8, query_tile=1, window=8, exact_up_to=8)
    model = patch(tiny_llama().to(DEVICE), config)
    expected = model.generate(IDS, disable_compile=True, **GREEDY)
    assert torch.equal(model.generate(IDS, **GREEDY), expected) and not played


def test_steps_with_adapters_that_transformers_manages_are_recorded(model, played):
    """There a token may be the first of its text, and whether it is so is asked before it is taken."""
    for layer in sparse_layers(model):
        layer.is_managed = lambda: True
    expected = model.generate(IDS, disable_compile=True, **GREEDY)
    assert torch.equal(model.generate(IDS, **GREEDY), expected) and len(played) == 27
    decode = CapturedDecoding(model)
    assert torch.equal(model.generate(IDS, custom_generate=decode, **GREEDY), expected)


@pytest.mark.parametrize("complete", [False, True])
def test_steps_that_are_certified_run(tiny_llama, played, complete):
    """Complete attention is that over all keys, certified or not."""
    model = patch(tiny_llama().to(DEVICE), SparsefinderConfig(**GRAPH, query_tile=4, complete=complete))
    layers = sparse_layers(model, SparsefinderAttention)
    fit_predictors(layers, lambda: model(IDS, use_cache=False))
    for layer in layers:
        layer.certify = True
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(IDS, disable_compile=True, **options)
    result = model.generate(IDS, **options)
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)
    assert not played


def test_a_growing_cache_gives_its_memory_back_where_steps_are_not_recorded(tiny_llama, played, monkeypatch):
    monkeypatch.setattr("hf_sparse.methods.sparsefinder.rooms.ROOM", 5)
    model = patch(tiny_llama().to(DEVICE), SparsefinderConfig(predictor="full"))
    rooms: list[weakref.ref] = []  # in the order in which they were made

    def note(model, args, inputs):
        held = next(value for value in inputs.values() if isinstance(value, Cache))
        room = held.layers[0].rooms[0] if held.get_seq_length() > len(IDS[0]) else None
        if room is not None and (not rooms or rooms[-1]() is not room):
            rooms.append(weakref.ref(room))
            assert all(earlier() is None for earlier in rooms[:-1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(IDS, **GREEDY)
    assert len(rooms) > 3 and not played


def test_a_cache_with_layers_of_transformers_runs(tiny_llama, played):
    patch(tiny_llama().to(DEVICE), SparseKConfig(k=6, window=8, sinks=2, layers=[1])).generate(IDS, **GREEDY)
    assert not played


def test_dense_steps_run(model, played):
    """With the method switched off, and after it was taken off the model has its own methods again."""
    for layer in model.modules():
        if hasattr(layer, "sparse_attention"):
            layer.sparse_attention.enable_adapters(False)
    model.generate(IDS, **GREEDY)
    assert not played
    unpatch(model)
    ours = {"get_compiled_call", "_valid_auto_compile_criteria", "_prefill", "save_pretrained"}
    ours |= {"prepare_inputs_for_generation", "_update_model_kwargs_for_generation"}
    assert not ours & vars(model).keys()


def test_a_cache_that_the_user_holds(model, played):
    """On a GPU `generate` compiles its steps, so nothing is recorded there."""
    cache = SparseKCache(model)
    found = model.generate(IDS, **with_cache(cache), **GREEDY)
    assert torch.equal(found, model.generate(IDS, disable_compile=True, **GREEDY))
    assert cache.get_seq_length() == 69
