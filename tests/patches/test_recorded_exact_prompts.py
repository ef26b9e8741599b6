"""Prompts of Sparsefinder that are played leave what prompts leave that run: logits, keys and values, and all after.

Without a GPU a recording is imitated (`played_prompts` in tests/conftest.py), and attention to more keys than a step
takes is that of `attend_in_one_piece`: plain PyTorch asks the host about its thresholds, which kernels do not.
"""

import copy
import runpy
from operator import itemgetter
from pathlib import Path

import pytest
import torch

from hf_sparse import SparseCache, SparsefinderConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.methods.sparsefinder import SparsefinderAttention, attention, fit_predictors, in_place
from hf_sparse.methods.sparsefinder.rooms import ROOM
from hf_sparse.ops.entmax import entmax_attention, threshold
from hf_sparse.ops.tiles import tiles
from hf_sparse.patches import sparse_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_A_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
(
    assert_same, assert_same_layers, both, check, generate, prompt, recordings_of, runs_as_ever, warm_up,
) = itemgetter(
    "assert_same", "assert_same_layers", "both", "check", "generate", "prompt", "recordings_of", "runs_as_ever",
    "warm_up",
)(runpy.run_path(str(Path(__file__).with_name("prompts.py"))))  # fmt: skip
POOLED = {"predictor": "pooled", "tile": 8, "pool": 2, "choices": 1, "window": 8, "exact_up_to": 40}
KINDS = {
    "pooled": POOLED,
    "lists of KV heads": POOLED | {"per_group": True, "query_tile": 4, "exact_up_to": 0},
    "large tiles": POOLED | {"tile": 16, "pool": 4, "exact_up_to": 0},
    "full": {"predictor": "full", "alpha": 2.0},
    "bound, complete": {"predictor": "bound", "complete": True, "alpha": 1.3},
    "clusters, complete": {"predictor": "clustering", "complete": True},
    "trained with entmax": {"predictor": "full", "entmax_native": 1.5},
}


def attend_in_one_piece(query, key, value, *, alpha, scaling, causal, tiles=None, **others):
    """Attend as `entmax_attention` does with all pairs of a text in memory, which asks the host nothing."""
    if isinstance(alpha, torch.Tensor) or any(part is not None for part in others.values()):
        return entmax_attention(query, key, value, alpha=alpha, scaling=scaling, causal=causal, tiles=tiles, **others)
    (heads, length), keys = query.shape[1:3], key.shape[2]
    key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
    scaling = torch.as_tensor(scaling).expand(heads)[:, None, None]
    z = query @ key.transpose(-1, -2) * scaling * (alpha - 1)
    seen = torch.ones((length, keys), dtype=torch.bool).tril(keys - length)
    if tiles is not None:
        of_tiles = tiles.mask(-(-keys // tiles.size)).repeat_interleave(heads // tiles.index.shape[1], 1)
        seen = (
            seen & of_tiles.repeat_interleave(tiles.rows, 2)[:, :, :length].repeat_interleave(tiles.size, 3)[..., :keys]
        )
    return threshold.distribution(z.masked_fill(~seen, -torch.inf), 1 / (alpha - 1)) @ value


def keep_columns(tile):
    """Sort tiles as `_compact` does, with all columns."""
    last = torch.iinfo(tile.dtype).max
    ordered = tile.masked_fill(tile < 0, last).sort(dim=-1).values
    return ordered.masked_fill(ordered == last, -1)


def mask_of(self, number):
    listed = self.index.new_zeros((*self.index.shape[:3], number + 1), dtype=torch.bool)
    return listed.scatter_(-1, self.index.masked_fill(self.index < 0, number), True)[..., :number]


@pytest.fixture
def played_prompts(played_prompts, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "entmax_attention", attend_in_one_piece)
        monkeypatch.setattr(threshold, "_STEPS", 12)
        monkeypatch.setitem(threshold._UNSEEN, "cpu", 12)
        monkeypatch.setattr(tiles, "_compact", keep_columns)
        monkeypatch.setattr(tiles.Tiles, "mask", mask_of)
    return played_prompts


def sparse(base, **settings):
    """Patch a model, with scales that differ."""
    model = patch(base.to(DEVICE), SparsefinderConfig(**settings))
    with torch.no_grad():
        for layer in sparse_layers(model, SparsefinderAttention):
            scales = layer.parameters_in_use.log_scale
            scales.add_(torch.linspace(-0.5, 0.5, len(scales), device=DEVICE) * (layer.layer + 1))
    return model


@pytest.fixture
def model(tiny_llama):
    return sparse(tiny_llama(), **POOLED)


@pytest.mark.versions
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_and_caches_are_those_of_prompts_that_run(tiny_llama, played_prompts, kind, rows):
    """At the edges of buckets and of `exact_up_to`, and long after the prompt."""
    model = sparse(tiny_llama(), **kind)
    edges = {layer.prompt_edge or 0 for layer in sparse_layers(model, SparsefinderAttention)}
    for length, bucket in ((39, 64), (40, 64), (41, 64), (64, 64), (65, 128), (100, 128), (128, 128)):
        warm_up(model, length, rows)
        ids = prompt(length, rows)
        before = len(played_prompts)
        for new in (1, 24):
            check(model, ids, max_new_tokens=new)
        assert played_prompts[before:] == [min([bucket, *[edge for edge in edges if edge >= length]])] * 2


def test_gpt2(played_prompts):
    model = sparse(FAMILIES["gpt2"].make(n_positions=100), **POOLED)
    for length in (30, 41, 90):
        warm_up(model, length)
        check(model, prompt(length), max_new_tokens=9)
    assert played_prompts == [40, 64, 100]


@pytest.mark.parametrize("kind", ["pooled", "lists of KV heads", "large tiles", "full"])
def test_lengths_of_a_bucket_share_a_recording(tiny_llama, played_prompts, kind):
    """Whatever order they come in: what stood behind a shorter text before changes no tile of it."""
    model = sparse(tiny_llama(), **KINDS[kind])
    warm_up(model, 128)
    for number, length in enumerate((128, 66, 97, 127, 65, 121)):
        check(model, prompt(length, seed=number), max_new_tokens=5)
    assert played_prompts == [128] * 6


def test_recordings_between_powers_of_2_share_memory(tiny_llama, played_prompts):
    model = sparse(tiny_llama(), **POOLED)
    for length in (150, 256, 200, 300):
        warm_up(model, length)
        check(model, prompt(length))
    for length in (150, 200):
        check(model, prompt(length, seed=length))
    assert played_prompts == [192, *[256] * 5, 320, 192, 256]  # the prompts before those of 200 tokens too
    held = [recording.layers for _, recording in sorted(recordings_of(model).items(), key=lambda item: item[0][1])]
    assert len(held) == 3 and held[0] is held[1]
    assert [layers[0].rooms[0].shape[2] for layers in held] == [256, 256, 512]


def test_beams(model, played_prompts):
    ids, options = prompt(30, 2), {"num_beams": 3, "max_new_tokens": 8, "output_logits": False}
    for _ in range(3):
        generate(model, ids, **options)
    found, expected = both(model, ids, **options)
    assert torch.equal(found.sequences, expected.sequences) and played_prompts == [40]
    assert_same_layers(cache_of(found).layers, cache_of(expected).layers)


def test_a_cache_goes_on_after_another_prompt_was_played(model, played_prompts):
    """Its memory is its own: a second turn, a copy, and a crop find it as if no prompt had come between."""
    for length in (60, 12):
        warm_up(model, length)
        results = []
        for plain in (False, True):
            first = generate(model, prompt(length), max_new_tokens=3, disable_compile=plain)
            held = cache_of(first)
            generate(model, prompt(length, seed=5), disable_compile=plain)
            copied = copy.deepcopy(held)
            parts = [part for layer in copied.layers for part in (layer.keys, layer.values)]
            assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
            more = torch.cat([first.sequences, prompt(7, seed=6)], 1)
            held.crop(-2)
            cropped = torch.cat([more[:, :length], prompt(1, seed=7)], 1)
            second = generate(model, cropped, max_new_tokens=12, disable_compile=True, **with_cache(held))
            third = generate(model, more, max_new_tokens=3, disable_compile=True, **with_cache(copied))
            results.append((second, third))
        for found, expected in zip(*results, strict=True):
            assert_same(found, expected)
    assert played_prompts == [64, 64, 40, 40]


def test_a_cache_that_the_user_made(model, played_prompts):
    """Its layers stay those that the user sees; a second turn runs."""
    results = []
    for plain in (True, False, False, False, False):
        held = SparseCache(model)
        layers = list(held.layers)
        first = generate(model, prompt(50), max_new_tokens=4, disable_compile=plain, **with_cache(held))
        assert all(one is other for one, other in zip(held.layers, layers, strict=True))
        more = torch.cat([first.sequences, prompt(17, seed=6)], 1)
        results.append(generate(model, more, max_new_tokens=9, disable_compile=True, **with_cache(held)))
    assert_same(results[-1], results[0])
    assert played_prompts == [64]


def test_the_first_steps_copy_no_key(model, played_prompts, monkeypatch):
    """There is room for the tokens that a prompt that ran would get room for at the first step."""
    warm_up(model, 60)
    held = cache_of(generate(model, prompt(60)))
    before = [layer.rooms for layer in held.layers]
    assert {room.shape[2] for pair in before for room in pair} == {60 + ROOM}
    assert not any(room[:, :, 60:].any() for pair in before for room in pair)
    monkeypatch.delattr(in_place, "room_behind")
    ids = torch.cat([prompt(60), prompt(1)], 1)
    generate(model, ids, max_new_tokens=20, **with_cache(held))
    assert all(layer.rooms is rooms for layer, rooms in zip(held.layers, before, strict=True))


@pytest.mark.parametrize("kind", ["pooled", "full"])
def test_long_texts_lie_in_several_pieces(tiny_llama, played_prompts, monkeypatch, kind):
    """A piece goes with the last of its layers that outgrows it."""
    monkeypatch.setattr(in_place, "_PIECE", 3 * 2 * 100 * 8 * 4)  # of three tensors
    model = sparse(tiny_llama(num_hidden_layers=4), **KINDS[kind])
    warm_up(model, 100)
    found = check(model, prompt(100), max_new_tokens=4)
    rooms = [room for layer in cache_of(found).layers for room in layer.rooms]
    assert [room.untyped_storage().data_ptr() for room in rooms[:3]].count(rooms[0].untyped_storage().data_ptr()) == 3
    assert len({room.untyped_storage().data_ptr() for room in rooms}) == 3


def observe(layer):
    layer.observer = lambda *_: None


def put_a_pattern(layer):
    layer.pattern = lambda text: None


def keep_training(layer):
    layer.train()


@pytest.mark.parametrize("change", [observe, put_a_pattern, keep_training])
def test_layers_that_are_looked_at_run(model, played_prompts, change):
    change(sparse_layers(model)[0])
    runs_as_ever(model, played_prompts, 50)


def test_certified_layers_have_no_recording(model):
    layer = sparse_layers(model)[0]
    layer.certify = True
    assert layer.prompt_edge is None and layer.recording_key() is None


@pytest.mark.parametrize(
    "settings",
    [
        {"predictor": "clustering", "clusters": 6},
        {"predictor": "bound"},
        {"predictor": "full", "learn_alpha": True},
        {"predictor": "clustering", "clusters": 6, "entmax_native": 1.5},
    ],
    ids=["a learned graph", "extremes of keys", "a learned alpha", "a graph that may not be fitted"],
)
def test_settings_whose_prompts_wait_for_the_device_run(tiny_llama, played_prompts, settings):
    model = patch(tiny_llama().to(DEVICE), SparsefinderConfig(**{"tile": 8, "tiles_per_query": 3} | settings))
    layers = sparse_layers(model, SparsefinderAttention)
    assert {(layer.prompt_edge, layer.recording_key()) for layer in layers} == {(None, None)}
    if "clusters" in settings:
        fit_predictors(layers, lambda: model(prompt(40), use_cache=False))
    runs_as_ever(model, played_prompts, 50)


def test_layers_that_are_left_dense_run(tiny_llama, played_prompts):
    runs_as_ever(sparse(tiny_llama(), layers=[1], **POOLED), played_prompts, 50)


def test_padding_runs(model, played_prompts):
    mask = (torch.arange(50) >= torch.tensor([0, 7])[:, None]).long().to(DEVICE)
    for _ in range(4):
        model.generate(prompt(50, 2), attention_mask=mask, do_sample=False, max_new_tokens=3)
    assert not played_prompts


def new_setting(name, value):
    def change(model):
        for layer in sparse_layers(model):
            object.__setattr__(layer.config, name, value)

    return change


def new_scales(model):
    for layer in sparse_layers(model):
        layer.parameters_in_use.log_scale.data = layer.parameters_in_use.log_scale.data + 0.7


def new_adapter(model):
    patch(model, SparsefinderConfig(**KINDS["full"]), adapter="other")
    for layer in sparse_layers(model):
        layer.set_adapter("other", inference_mode=True)


CHANGES = {
    "alpha": (new_setting("alpha", 1.8), 64),
    "exact_up_to": (new_setting("exact_up_to", 55), 55),
    "choices": (new_setting("choices", 2), 64),
    "window": (new_setting("window", 20), 64),
    "complete": (new_setting("complete", True), 64),
    "scales": (new_scales, 64),
    "adapter": (new_adapter, 64),
}


@pytest.mark.parametrize(("change", "bucket"), CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_recorded_anew(model, played_prompts, change, bucket):
    warm_up(model, 50)
    before = generate(model, prompt(50))
    assert played_prompts == [64]
    change(model)
    ids = prompt(50)
    for number in (1, 1, 1, 2, 3):
        found = generate(model, ids, max_new_tokens=4)
        assert len(played_prompts) == number
        assert_same(found, generate(model, ids, max_new_tokens=4, disable_compile=True))
    assert played_prompts[-1] == bucket
    assert not torch.allclose(found.logits[0], before.logits[0])


def test_scales_that_change_in_place_are_read(model, played_prompts):
    warm_up(model, 50)
    before = generate(model, prompt(50))
    with torch.no_grad():
        for layer in sparse_layers(model):
            layer.parameters_in_use.log_scale.add_(0.7)
    found = generate(model, prompt(50))
    assert_same(found, generate(model, prompt(50), disable_compile=True))
    assert not torch.allclose(found.logits[0], before.logits[0]) and played_prompts == [64, 64]


def test_inference_mode_may_come_and_go(model, played_prompts):
    warm_up(model, 50)
    for is_on in (True, False, True):
        with torch.inference_mode(is_on):
            found = generate(model, prompt(50), max_new_tokens=3)
        ids = torch.cat([found.sequences, prompt(4)], 1)
        generate(model, ids, max_new_tokens=3, **with_cache(cache_of(found)))
        check(model, prompt(50))
    assert played_prompts == [64] * 6


@ON_A_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_graphs_in_half_precision(tiny_llama, played_prompts, dtype, kind):
    """A prompt shorter than its bucket rounds in another way, and may choose another tile."""
    model = sparse(tiny_llama(hidden_size=128, max_position_embeddings=1024).to(dtype), **kind)
    lengths = (64, 512) if kind["predictor"] == "pooled" else (64, 100, 512, 700)
    for length in lengths:
        warm_up(model, length, rows=2)
        found, expected = both(model, prompt(length, 2))
        apart = (found.logits[0] - expected.logits[0]).float().norm() / expected.logits[0].float().norm()
        assert apart < 0.03
    assert len(played_prompts) == len(lengths)


@pytest.mark.parametrize("kind", ["full", "clusters, complete", pytest.param("pooled", marks=ON_A_GPU)])
def test_steps_are_recorded_after_a_prompt_that_was_played(tiny_llama, played_prompts, played, kind):
    """In the room that the prompt came with; on a CPU steps of `pooled` run."""
    model = sparse(tiny_llama(), **KINDS[kind])
    warm_up(model, 60)
    found = generate(model, prompt(60), max_new_tokens=30)
    assert played_prompts == [64] and len(played) == 27
    assert_same(found, generate(model, prompt(60), max_new_tokens=30, disable_compile=True))


def test_steps_outgrow_the_room_of_a_prompt(tiny_llama, played_prompts, played, monkeypatch):
    monkeypatch.setattr("hf_sparse.methods.sparsefinder.rooms.ROOM", 4)  # or an eighth: for 67, 75, 84 and 94 tokens
    model = sparse(tiny_llama(), **KINDS["full"])
    warm_up(model, 60)
    found = generate(model, prompt(60), max_new_tokens=30)
    assert played_prompts == [64] and len(set(played)) == 4
    assert_same(found, generate(model, prompt(60), max_new_tokens=30, disable_compile=True))
