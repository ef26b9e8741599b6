"""A replay that begins before the host has looked at the model is used only if the look finds the same recording.

Without a GPU a recording is imitated (`played_prompts` in tests/conftest.py).
"""

import gc
import runpy
import time
import weakref
from functools import partial
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sparse import SparseKCache, SparseKConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.patches import recorded_prompts
from hf_sparse.patches.recorded_prompts import RecordedPrompts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
(
    NEW_NUMBERS, NEW_TENSORS, check, choosing, generate, in_threads, over_lora, prompt, prompts_of, recordings_of,
    use, warm_up,
) = itemgetter(
    "NEW_NUMBERS", "NEW_TENSORS", "check", "choosing", "generate", "in_threads", "over_lora", "prompt",
    "prompts_of", "recordings_of", "use", "warm_up",
)(runpy.run_path(str(Path(__file__).with_name("prompts.py"))))  # fmt: skip
check, generate, in_threads = (partial(do, max_new_tokens=4) for do in (check, generate, in_threads))
warm_up = partial(warm_up, times=5, max_new_tokens=4)  # recorded and compared, and played twice


@pytest.fixture
def model(tiny_llama):
    return choosing(tiny_llama())


@pytest.fixture
def begun(played_prompts, monkeypatch):
    """List for every prompt that may be played whether a replay began before the model was looked at."""
    begun: list[bool] = []
    begin = RecordedPrompts._begin

    def note(*args):
        recording = begin(*args)
        begun.append(recording is not None)
        return recording

    monkeypatch.setattr(RecordedPrompts, "_begin", note)
    return begun


def test_prompts_begin_once_there_is_a_recording(model, begun, played_prompts):
    for length in (40, 40, 40, 40, 17, 64):
        check(model, prompt(length))
    assert begun == [False] * 2 + [True] * 3 and played_prompts == [64] * 3  # the first one is not looked at


def test_of_several_rows_with_a_mask_and_positions(model, begun):
    ids = prompt(50, 2)
    options = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(50, device=DEVICE).expand(2, -1)}
    for _ in range(5):
        check(model, ids, **options)
    assert begun[-2:] == [True, True]


def new_weight(model):
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach() * 1.5, requires_grad=False)


def smaller_in_place(model):
    """Leave the address and the object: only the extent says that the rest may be gone."""
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[:32]
    mlp.up_proj.weight.data = mlp.up_proj.weight.data[:32]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :32]


def new_module(model):
    """Free a layer, with all of its tensors."""
    layer = nn.Linear(32, 64, bias=False, device=DEVICE).requires_grad_(False)
    model.model.layers[1].mlp.up_proj = layer


@pytest.mark.parametrize("change", [*NEW_TENSORS, new_weight, smaller_in_place, new_module])
def test_nothing_begins_where_a_recording_would_read_what_is_gone(model, begun, change):
    warm_up(model)
    assert begun[-1]
    change(model)
    check(model)
    assert not begun[-1]


def hook(model):
    model.model.norm.register_forward_hook(lambda module, args, output: output * 2)


def hook_before_embeddings(model):
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))


def new_adapter(model):
    patch(model, SparseKConfig(k=5, window=4, sinks=1), adapter="other")
    use(model, "other")


def swapped(model):
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


@pytest.mark.parametrize("change", [*NEW_NUMBERS, hook, hook_before_embeddings, new_adapter, swapped])
def test_nothing_is_used_of_a_replay_for_a_model_that_has_changed(model, begun, played_prompts, change):
    """And the next prompt does not begin so."""
    warm_up(model)
    played = len(played_prompts)
    change(model)
    check(model)
    assert begun[-1] and len(played_prompts) == played
    count = len(begun)
    check(model, prompt(seed=9))
    assert not any(begun[count:]) and len(played_prompts) == played


def test_another_adapter_of_peft(tiny_llama, begun, played_prompts):
    """LoRA below is switched off, deleted while its layers are kept, and gone."""
    model, layers = over_lora(tiny_llama())
    warm_up(model)
    assert begun[-1]
    for layer in layers:
        layer.enable_adapters(False)
    check(model)
    assert begun[-1] and len(played_prompts) == 2
    for layer in layers:
        layer.enable_adapters(True)
        layer.requires_grad_(False)
    for _ in range(2):
        check(model)
    check(model)
    assert begun[-3:] == [False, False, True] and len(played_prompts) == 5
    for layer in layers:
        layer.delete_adapter("default")
        layer.requires_grad_(False)
    check(model)
    assert not begun[-1] and len(played_prompts) == 5


def test_adapters_that_take_turns_begin_nothing(model, begun, played_prompts):
    """Otherwise each prompt would wait for a replay of the other one."""
    patch(model, SparseKConfig(k=5, window=4, sinks=1), adapter="other")
    for name in ("default", "other") * 7:
        use(model, name)
        check(model)
    assert sum(begun) == 1 and len(played_prompts) == 8  # the first of the two begins once for the second
    for number in range(3):
        check(model)
        assert begun[-1] == (number > 0)


def test_the_recording_that_the_look_finds_is_played(model, begun, played_prompts):
    patch(model, SparseKConfig(k=5, window=4, sinks=1), adapter="other")
    for number, name in enumerate(("default",) * 6 + ("other",) * 6 + ("default",) * 3):
        use(model, name)
        check(model, prompt(seed=number))
    assert begun[-4:] == [True, True, False, True]
    assert len(played_prompts) == 9  # where one was begun for the other, the other was played


def test_a_recording_that_is_not_compared_does_not_begin(model, begun, monkeypatch):
    """Another thread may ask for it before it is."""
    monkeypatch.setattr(RecordedPrompts, "_compare", lambda *_: None)
    warm_up(model)
    assert recordings_of(model) and not any(begun)


def test_texts_for_which_a_replay_takes_longer_do_not_begin(model, begun, monkeypatch):
    times = iter([64e6, 50e6])  # of a prompt that ran, and of a replay
    monkeypatch.setattr(recorded_prompts.Timing, "ms", lambda self: next(times))
    for length in (64, 64, 64, 64, 60, 49, 51, 33):
        generate(model, prompt(length))
    assert begun == [False] * 2 + [True, True, False, True, False]


def test_what_a_recording_has_no_embedding_for(model, begun):
    """A larger table may have taken the place of one that is still there: indices beyond that end a CUDA context."""
    warm_up(model)
    old = model.get_input_embeddings()
    larger = nn.Embedding(80, 32, device=DEVICE)
    with torch.no_grad():
        larger.weight[:64] = old.weight
    model.set_input_embeddings(larger)
    ids = prompt()
    ids[0, 3] = 70
    check(model, ids)
    assert not begun[-1] and old.weight is not None
    check(model)
    assert begun[-1]  # its tokens can be looked up, and nothing of the result is used


@pytest.mark.parametrize("shift", [-1, 30])
def test_positions_that_there_may_be_no_embedding_for(model, begun, shift):
    positions = torch.arange(40, device=DEVICE)[None]
    for _ in range(4):
        check(model, position_ids=positions)
    assert begun[-1]
    check(model, position_ids=positions + shift)
    assert not begun[-1]


def test_padding_begins_nothing(model, begun):
    ids = prompt(40, 2)
    for _ in range(4):
        check(model, ids, attention_mask=torch.ones_like(ids))
    assert begun[-1]
    check(model, ids, attention_mask=(torch.arange(40, device=DEVICE) >= 3).long().expand(2, -1))
    assert not begun[-1]


def test_other_inputs_begin_nothing(model, begun):
    """Other rows and lengths have recordings of their own; hidden states, autocast and a second turn run as ever."""
    warm_up(model)
    count = len(begun)
    for ids in (prompt(40, 2), prompt(100)):
        for _ in range(2):
            check(model, ids)
            assert not any(begun[count:])
    count = len(begun)
    generate(model, prompt(), output_hidden_states=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        generate(model, prompt())
    first = generate(model, prompt(), disable_compile=True)
    generate(model, torch.cat([first.sequences, prompt(7)], 1), **with_cache(cache_of(first)))
    assert len(begun) == count


def test_a_cache_of_the_user(model, begun):
    """A new one is filled; one of another adapter's budget is found by the look, and gets nothing of the replay."""
    warm_up(model)
    cache = SparseKCache(model)
    layers = list(cache.layers)
    found, expected = generate(model, prompt(), **with_cache(cache)), generate(model, prompt(), disable_compile=True)
    assert begun[-1] and torch.equal(found.sequences, expected.sequences)
    assert all(one is other and one.is_initialized for one, other in zip(cache.layers, layers, strict=True))
    cache = SparseKCache(model)
    cache.layers[1].window += 1
    generate(model, prompt(), max_new_tokens=1, **with_cache(cache))
    assert begun[-1] and cache.layers[1].keys.shape[2] == 6 + 9 + 2


def test_threads_take_turns(model, begun, monkeypatch):
    """No other replay comes between the launch of one and the copies of what it computes."""
    warm_up(model)
    order, look = [], RecordedPrompts._prompt
    launch, finish = RecordedPrompts._launch, RecordedPrompts._finish

    def slowly(*args):
        time.sleep(0.02)
        return look(*args)

    monkeypatch.setattr(RecordedPrompts, "_prompt", slowly)
    monkeypatch.setattr(RecordedPrompts, "_launch", lambda *args: (order.append("launch"), launch(*args))[1])
    monkeypatch.setattr(RecordedPrompts, "_finish", lambda *args: (order.append("finish"), finish(*args))[1])
    found, expected = in_threads(model)
    assert order == ["launch", "finish"] * 4 and begun[-4:] == [True] * 4
    assert all(torch.equal(*(one.sequences for one in pair)) for pair in zip(found, expected, strict=True))


def test_the_next_replay_waits_for_one_of_which_nothing_is_used(model, begun, monkeypatch):
    """It may come on another stream, and they write to the same memory."""
    warm_up(model)
    prompts, order = prompts_of(model), []
    note, (recording,) = prompts._note_last, recordings_of(model).values()
    replay = recording.replay
    recording.replay = lambda: (order.append("replay"), replay())
    monkeypatch.setattr(prompts, "_note_last", lambda device: (order.append("note"), note(device)))
    monkeypatch.setattr(prompts, "_prompt", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, prompt())
    assert order == ["replay", "note"]


def test_too_little_memory_for_what_is_copied(model, begun, monkeypatch):
    """Recordings give their memory back, and the prompt runs."""
    warm_up(model)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = generate(model, prompt(), disable_compile=True)
    with monkeypatch.context() as full:
        full.setattr(RecordedPrompts, "_finish", fail)
        found = generate(model, prompt())
    assert begun[-1] and torch.equal(found.sequences, expected.sequences)
    assert not recordings_of(model)


def test_the_look_is_not_counted_where_the_replay_does_not_wait_for_it(model, begun, monkeypatch):
    look = RecordedPrompts._prompt

    def slowly(*args):
        time.sleep(0.05)
        return look(*args)

    monkeypatch.setattr(RecordedPrompts, "_prompt", slowly)
    warm_up(model)
    (recording,) = recordings_of(model).values()
    assert 0 < recording.wait_ms < 50


def test_a_recording_that_makes_room_is_not_kept(model, begun, monkeypatch):
    monkeypatch.setattr(recorded_prompts, "_MOST_RECORDINGS", 1)
    monkeypatch.setattr(recorded_prompts, "_IDLE", 2)
    warm_up(model)
    (recording,) = (weakref.ref(one) for one in recordings_of(model).values())
    gc.disable()
    try:
        warm_up(model, 100)
        assert recording() is None
    finally:
        gc.enable()
    count = len(begun)
    check(model)
    assert not any(begun[count:])
