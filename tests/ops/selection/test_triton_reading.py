"""A text that is read in few launches, against the functions that do the same one after another."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from hf_sparse.core.backbone_call import BackboneCall
from hf_sparse.core.cache import ModelCall
from hf_sparse.core.new_tokens import NewTokens
from hf_sparse.methods.sparsek import SparseKCacheLayer, known_layer, reading, without_cache
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.methods.sparsek.fixed_memory import SharedSlots
from hf_sparse.methods.sparsek.known_layer import Scoring, layer_to_read
from hf_sparse.methods.sparsek.ragged_cache import RaggedCacheLayer
from hf_sparse.ops import causal_attention, sparsek_attention
from hf_sparse.ops.causal_attention import attend_by_sdpa
from hf_sparse.ops.selection import ragged
from hf_sparse.ops.selection import slots as reference
from hf_sparse.ops.selection.linear_scores import Slopes, normalised, slope_positions
from hf_sparse.ops.selection.triton import reading as kernels
from hf_sparse.ops.selection.triton.reading import ReadingSettings, attend_text, places_of_slots, read_text
from hf_sparse.ops.triton import causal_attention as of_short_texts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter", "nothing_noted")


def inputs(batch, heads, kv_heads, length, dim, columns, dtype, learned):
    """Query, key, value as a model has them, `[B, T, H, D]` in memory; states, weight and slope."""
    torch.manual_seed(length)
    query, key, value = (
        torch.randn(batch, length, number, dim, device=DEVICE, dtype=dtype).transpose(1, 2)
        for number in (heads, kv_heads, kv_heads)
    )
    states = torch.randn(batch, length, columns, device=DEVICE, dtype=dtype)
    weight = torch.randn(kv_heads, columns, device=DEVICE)
    return query, key, value, states, weight, torch.randn(kv_heads, device=DEVICE) if learned else None


@pytest.mark.cross("values")
@pytest.mark.parametrize("learned, slope_length", [(False, 0), (True, 0), (True, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "dim"),
    [
        (1, 4, 2, 25, 16),  # fits into the slots, and leaves some empty
        (2, 3, 3, 38, 24),  # fills them
        (2, 3, 1, 39, 16),  # one key leaves
        (1, 6, 2, 150, 40),
        (2, 2, 2, 2, 16),
    ],
)
def test_reading(batch, heads, kv_heads, length, dim, dtype, learned, slope_length, poisoned_memory):
    settings = ReadingSettings(k=13, window=21, sinks=4, scaling=0.2, slopes=Slopes(0.01, 256, slope_length))
    query, key, value, states, weight, slope = inputs(batch, heads, kv_heads, length, dim, 48, dtype, learned)
    slopes = 0.01 + (0 if slope is None else slope.double()[:, None] / 256)
    scores = torch.einsum("btc,hc->bht", normalised(states), weight.double())
    scores = (scores + slope_positions(torch.arange(length, device=DEVICE), slope_length) * slopes).float()
    shape = (batch, kv_heads, settings.slots)
    keys, values = (torch.zeros(*shape, dim, device=DEVICE, dtype=dtype) for _ in range(2))
    kept, positions = torch.zeros(shape, device=DEVICE), torch.full(shape, -1, device=DEVICE)
    seen = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    for _ in range(2 if DEVICE == "cuda" else 1):  # the second time by the launches that the first one noted
        output, slots = read_text(query, key, value, states, weight, slope, settings)
        torch.testing.assert_close(slots.scores, slots.scores.nan_to_num(7.0, 7.0, 7.0), rtol=0, atol=0)
        expected = sparsek_attention(
            query.double(), key.double(), value.double(), scores.double(), k=13, window=21, sinks=4, scaling=0.2,
            implementation="dense",
        )  # fmt: skip
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-3, "atol": 5e-3}
        torch.testing.assert_close(output.double(), expected, **tolerance)
        if length > settings.slots:
            assert torch.equal(attend_text(query, key, value, states, weight, slope, settings), output)
        with pytest.MonkeyPatch.context() as plain:
            plain.setattr(reference, "_TRITON", False)
            reference.fill_slots(keys, values, kept, positions, seen, key, value, scores, window=21, sinks=4)
        assert torch.equal(slots.positions, positions) and torch.equal(slots.seen, seen)
        assert torch.equal(slots.keys, keys) and torch.equal(slots.values, values)
        torch.testing.assert_close(slots.scores, kept, rtol=1e-6, atol=1e-6)
        assert not slots.padded_late.any() and slots.padded_late.dtype == torch.bool
        assert slots.tokens == length and slots.tokens.shape == ()


@pytest.mark.cross("values")
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("length", "k_of_heads"),
    [
        (25, (2, 30, 13)),  # fits into the slots of every head, and leaves some empty
        (27, (2, 30, 13)),  # fills the head that has the fewest
        (28, (2, 30, 13)),  # of which one key leaves
        (150 if DEVICE == "cuda" else 75, (2, 30, 13)),  # more than the slots of any head
        (60, (40, 1)),
        (1, (3, 1)),
    ],
)
def test_heads_with_different_numbers_of_slots(length, k_of_heads, learned, poisoned_memory):
    """Each as alone; `k` may be larger than that of any head, so that layers share the launches."""
    budget = {"window": 21, "sinks": 4, "scaling": 0.2}
    settings = ReadingSettings(k=45, slopes=Slopes(0.01, 256, 0), k_of_heads=k_of_heads, **budget)
    heads, group = len(k_of_heads), 2
    tensors = inputs(2, heads * group, heads, length, 16, 48, torch.float32, learned)
    for _ in range(2 if DEVICE == "cuda" else 1):  # the second time by the launches that the first one noted
        output, slots = read_text(*tensors, settings)
        if length > settings.fewest_slots:
            assert torch.equal(attend_text(*tensors, settings), output)
        tables = (slots.keys, slots.values, slots.scores, slots.positions)
        parts = zip(k_of_heads, *(ragged.of_heads(table, settings.counts) for table in tables), strict=True)
        for head, (k, *kept) in enumerate(parts):
            query, key, value, states, weight, slope = tensors
            one, of_group = slice(head, head + 1), slice(head * group, (head + 1) * group)
            alone = (query[:, of_group], key[:, one], value[:, one], states, weight[one].contiguous())
            slope = None if slope is None else slope[one].contiguous()
            of_one, expected = read_text(*alone, slope, ReadingSettings(k, **budget, slopes=Slopes(0.01, 256, 0)))
            for mine, theirs in zip(kept, expected[:4], strict=True):
                assert torch.equal(mine, theirs)
            torch.testing.assert_close(output[:, of_group], of_one, rtol=0, atol=1e-5)
        assert slots.seen.tolist() == [length] * 2 and slots.tokens == length and not slots.padded_late.any()


@pytest.mark.cross("values")
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k_of_heads", [None, (13, 13), (9, 30)], ids=str)
@pytest.mark.parametrize(
    ("length", "ends"),
    [
        (30, (1, 2, 29, 30)),  # fits into the slots of every head
        (150, (39, 40, 64, 127, 128, 129, 150)),  # more than fit, on both sides of the edge of a tile
        (64, (35, 38, 39, 63)),
        *([(300, range(40, 301))] if DEVICE == "cuda" else []),
    ],
)
def test_slots_of_a_text_that_ends_early(length, ends, k_of_heads, ties, poisoned_memory):
    """They are those of a text without the tokens behind its end, and so is the output up to there."""
    budget = {
        "window": 21,
        "sinks": 4,
        "scaling": 0.2,
        "slopes": Slopes(0.0 if ties else 0.01, 256, 0),
    }
    settings = ReadingSettings(k=30 if k_of_heads else 13, k_of_heads=k_of_heads, **budget)
    query, key, value, states, weight, _ = inputs(2, 4, 2, length, 16, 48, torch.float32, False)
    weight = weight * (0 if ties else 1)
    for number in ends:
        end = torch.tensor([number], device=DEVICE)
        output, slots = read_text(query, key, value, states, weight, None, settings, end)
        tensors = (query[:, :, :number], key[:, :, :number], value[:, :, :number], states[:, :number].contiguous())
        shorter, expected = read_text(*tensors, weight, None, settings)
        for name, mine, theirs in zip(expected._fields, slots, expected, strict=True):
            if name == "scores":
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(mine, theirs), (name, number)
        assert slots.tokens == number
        assert (output is None) == (length <= settings.fewest_slots)  # a recorded text, which SDPA attends to then
        if output is not None:
            torch.testing.assert_close(output[:, :, :number], shorter, rtol=1e-5, atol=1e-5)


@pytest.mark.cross("values")
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("k", "window", "sinks"), [(5, 7, 2), (3, 1, 0), (4, 16, 1)])
def test_every_place_of_a_tile_may_be_the_end(k, window, sinks, ties, monkeypatch, poisoned_memory):
    """The slots are those that plain PyTorch fills with the tokens before it."""
    monkeypatch.setattr(kernels, "TILE", 16)
    budget = {"scaling": 0.2, "slopes": Slopes(0.0, 256, 0)}
    settings = ReadingSettings(k, window, sinks, **budget)
    length = settings.slots + 33
    query, key, value, states, weight, _ = inputs(1, 2, 2, length, 16, 32, torch.float32, False)
    if ties:
        states = states[:, :1].expand(-1, length, -1).contiguous()
        states[:, ::3] *= -1
    scores = torch.einsum("btc,hc->bht", normalised(states), weight.double()).float()
    shape = (1, 2, settings.slots)
    for number in range(settings.slots + 1, length + 1):
        end = torch.tensor([number], device=DEVICE)
        _, slots = read_text(query, key, value, states, weight, None, settings, end)
        keys, values = (torch.zeros(*shape, 16, device=DEVICE) for _ in range(2))
        kept, positions = torch.zeros(shape, device=DEVICE), torch.full(shape, -1, device=DEVICE)
        tokens = (key[:, :, :number], value[:, :, :number], scores[:, :, :number])
        with pytest.MonkeyPatch.context() as plain:
            plain.setattr(reference, "_TRITON", False)
            seen = torch.zeros(1, dtype=torch.int64, device=DEVICE)
            reference.fill_slots(keys, values, kept, positions, seen, *tokens, window=window, sinks=sinks)
        assert torch.equal(slots.positions, positions), number
        assert torch.equal(slots.keys, keys) and torch.equal(slots.values, values)
        assert slots.seen.tolist() == [number] and slots.tokens == number and not slots.padded_late.any()


@pytest.mark.parametrize("end", [20, 33, 60])
@pytest.mark.parametrize("k", [12, (4, 20)], ids=str)
def test_a_cache_layer_takes_the_slots_of_a_text_that_ends_early(k, end, monkeypatch, poisoned_memory):
    """It heeds the end that the call of the model has, in both ways to read, and attends as without it."""
    monkeypatch.setattr(reading, "is_on_gpu", lambda query: True)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    attention = SimpleNamespace(uses_scorer=True, active="a", identities={"a": "id"})
    query, key, value, states, weight, _ = inputs(1, 4, 2, 60 if end > 30 else 24, 16, 48, torch.float32, False)
    scoring = Scoring(weight, None, Slopes(0.0, 256, 0), (weight.data_ptr(), 0), "layout")
    results = []
    for tokens in (query.shape[2], end):
        kind = SparseKCacheLayer if isinstance(k, int) else RaggedCacheLayer
        cache = kind(k, 10, 3, owner=("id", None))
        cache.scoring = scoring
        kinds = [layer_to_read(cache, scoring)]
        cache.call = ModelCall(kinds, end=torch.tensor([end], device=DEVICE) if tokens != end else None)
        cut = [tensor[:, :, :tokens] for tensor in (query, key, value)]
        with torch.no_grad():
            new = NewTokens(*cut, states[:, :tokens].contiguous(), None, 0.25)
            output = reading.read_in_few_launches(attention, new, cache)
        results.append((output[:, :, :end], cache))
    (ours, read), (expected, alone) = results
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for name in ("keys", "values", "positions", "seen", "padded_late", "cumulative_length"):
        assert torch.equal(getattr(read, name), getattr(alone, name)), name
    torch.testing.assert_close(read.scores, alone.scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("counts", [7, (3, 5)])
def test_slots_of_several_layers(counts):
    """They are as if each was allocated alone: contiguous, where kernels expect them, apart from the others."""
    shared = SharedSlots(places_of_slots(3, 2, 5, torch.bfloat16, (counts,) * 3), torch.device("cpu"))
    layers = [shared.tensors(number) for number in range(3)]
    shape = (3, 2, 7) if counts == 7 else (3, 8)
    for number, slots in enumerate(layers):
        assert [tensor.shape for tensor in slots] == [(*shape, 5), (*shape, 5), shape, shape, (3,), (3,), ()]
        assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in slots)
        assert shared.addresses(number) == [tensor.data_ptr() for tensor in slots]
        assert all(vars(tensor)["_dynamo_static_input_type"] == "unguarded" for tensor in slots)
        for tensor in slots:
            tensor.fill_(number % 2)
    for number, slots in enumerate(layers):
        assert all(bool((tensor == number % 2).all()) for tensor in slots)


def test_writing_to_the_slots_of_a_layer_leaves_what_autograd_saved_of_another():
    shared = SharedSlots(places_of_slots(1, 2, 5, torch.float32, (7, 7)), torch.device("cpu"))
    (first, *_), (second, *_) = (shared.tensors(number) for number in range(2))
    first.fill_(3)
    factor = torch.ones((), requires_grad=True)
    product = (factor * first).sum()
    second.zero_()
    product.backward()
    assert factor.grad == 3 * first.numel()


def layer_of(call, counts, scoring="one"):
    """Make a cache layer as a call of the model does."""
    cache = SparseKCacheLayer(counts - 4, 3, 1) if isinstance(counts, int) else RaggedCacheLayer(counts, 0, 0)
    scoring = scoring and Scoring(None, None, (), (1, 2), scoring)
    cache.call, cache.scoring, cache.number_in_call = call, scoring, len(call.kinds)
    call.kinds.append(layer_to_read(cache, scoring))
    return cache


def shared_by(cache, length=9, heads=2, layout="layout"):
    """Return what a layer reads with, whose launches are known."""
    key = torch.zeros(1, heads, length, 5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "_programs", SimpleNamespace(get=lambda key: NotedLaunches(key=key)))
        return reading._shared_reading(cache, key, layout, cache.scoring)


@pytest.mark.parametrize("counts", [(8, 8, 8), (8, 9, 7), ((3, 5), (4, 4), (2, 6))], ids=["alike", "layers", "heads"])
def test_layers_of_a_call_are_allocated_together(counts):
    call = ModelCall()
    layers = [layer_of(call, one) for one in counts]
    shared = shared_by(layers[0])
    assert shared is call.shared and shared.first == 0 and shared.layout == "layout"
    for number, (one, tables) in enumerate(zip(counts, shared.tables, strict=True)):
        slots = shared.slots.tensors(number)
        assert slots[0].shape == ((1, 2, one, 5) if isinstance(one, int) else (1, sum(one), 5))
        assert shared.slots.addresses(number) == [tensor.data_ptr() for tensor in slots]
        assert (tables[:2] == (0, 0)) == isinstance(one, int) and tables[2] == 0
    if isinstance(counts[0], int):
        keys = [("layout", "one", one - 4, 3, 1, True) for one in counts]
    else:
        keys = [("layout", "one", (64, False), 0, 0, True)] * 3
    assert [program.key for program in shared.programs] == keys


def test_layers_of_a_recorded_prompt_read_where_it_ends():
    call = ModelCall(end=torch.tensor([5]))
    layers = [layer_of(call, 8) for _ in range(2)]
    shared = shared_by(layers[0])
    assert shared.tables == [(0, 0, call.end.data_ptr())] * 2
    assert [program.key for program in shared.programs] == [("layout", "one", 4, 3, 1, False)] * 2


def test_layers_of_other_budgets_share_launches_where_all_keys_have_slots():
    """The kernel reads the numbers of slots from a table, so launches may be for more of them."""
    call = ModelCall()
    layers = [layer_of(call, counts) for counts in ((300, 500), (400, 400), (290, 510))]
    keys = [program.key for program in shared_by(layers[0], length=290).programs]
    assert keys == [("layout", "one", (512, True), 0, 0, True)] * 3
    keys = [program.key for program in shared_by(layer_of(ModelCall(), (300, 500)), length=301).programs]
    assert keys == [("layout", "one", (512, False), 0, 0, True)]
    assert reading.most_selected((300, 700)) == 704 and reading.most_selected((300, 700), fits=True) == 1024
    assert reading.most_selected(700) == reading.most_selected(700, fits=True) == 700


def test_a_layer_that_others_look_at_does_not_read_as_the_one_before(monkeypatch):
    monkeypatch.setattr(reading, "known_scoring", None)  # nothing is asked beyond
    cache = layer_of(ModelCall(shared=object()), 8)
    attention = SimpleNamespace(uses_scorer=False)
    new = NewTokens(*inputs(1, 4, 2, 9, 16, 48, torch.float32, False)[:4], None, 1.0)
    with torch.no_grad():
        assert reading.read_in_few_launches(attention, new, cache) is None


def test_a_layer_that_comes_out_of_turn_has_slots_of_its_size():
    call = ModelCall()
    first, second = layer_of(call, 5), layer_of(call, 300)
    shared = shared_by(second)
    assert shared.first == 1 and [shared.slots.tensors(0)[0].shape] == [(1, 2, 300, 5)]
    late = shared_by(first)  # it stands before those that share
    assert late is not shared is call.shared and (late.first, late.slots.tensors(0)[0].shape) == (0, (1, 2, 5, 5))


@pytest.mark.parametrize("other", ["another", None], ids=["device", "no scores"])
def test_layers_that_differ_otherwise_take_slots_of_their_own(other):
    call = ModelCall()
    first, second = layer_of(call, 8), layer_of(call, 8, other)
    shared = shared_by(first)
    assert shared is call.shared and len(shared.programs) == len(shared.tables) == 1
    if other:
        alone = shared_by(second, heads=3)
        assert alone is not shared is call.shared and alone.first == 1 and len(alone.programs) == 1


def test_a_layer_whose_launches_are_noted_later_has_shared_slots(monkeypatch):
    """Memory is that of the layer that needs most, of those whose launches are known."""
    call = ModelCall()
    layers = [layer_of(call, count) for count in (8, 9, 10)]
    used = {4: 100, 5: 300, 6: 500}
    programs = {
        ("layout", "one", k, 3, 1, True): SimpleNamespace(used=size, memory=lambda size=size: torch.empty(size))
        for k, size in used.items()
    }
    known = dict(list(programs.items())[:2])
    monkeypatch.setattr(reading, "_programs", known)
    key = torch.zeros(1, 2, 9, 5)
    shared = reading._shared_reading(layers[0], key, "layout", layers[0].scoring)
    assert len(shared.memory) == 300 and shared.programs == [*known.values(), None]
    assert reading._shared_reading(layers[2], key, "layout", layers[2].scoring) is None  # its launches are not known
    known |= programs
    assert reading._shared_reading(layers[2], key, "layout", layers[2].scoring) is shared is call.shared
    assert len(shared.memory) == 500 and shared.programs == [*programs.values()]


def test_offsets_found_while_a_step_is_traced_are_those_that_stay():
    cache = RaggedCacheLayer((3, 5), 1, 1)
    places = places_of_slots(1, 2, 5, torch.float32, (cache.counts,))
    cache.take_shared(SharedSlots(places, torch.device("cpu")), 0)

    @torch.compile(fullgraph=True, backend="eager")
    def read(tensor):
        cache.begin_attention()
        return cache.offsets.sum() + tensor

    assert read(torch.zeros(())) == sum((0, 5, 12))
    assert cache.offsets is ragged.offsets_of(cache.counts, torch.device("cpu"))
    assert vars(cache.offsets)["_dynamo_static_input_type"]


class NotedLaunches:
    """Take the place of launches: list the addresses that they get."""

    used = 0

    def __init__(self, output=None, key=None):
        self.order, self.output, self.bases, self.key = (() if output is None else (0,)), output, [], key

    def memory(self):
        return None

    def launch(self, bases, memory):
        self.bases.append(list(bases))
        return () if self.output is None else (self.output,)


def test_a_text_that_is_not_short_is_left_to_sdpa(monkeypatch, poisoned_memory):
    settings = ReadingSettings(k=13, window=21, sinks=4, scaling=0.2, slopes=Slopes(0.01, 256, 0))
    tensors = inputs(1, 4, 2, 30, 16, 48, torch.float32, False)
    output, slots = read_text(*tensors, settings)
    assert output is not None
    monkeypatch.setattr("hf_sparse.ops.causal_attention._MOST_PRODUCTS", 64 * 30 * 30 - 1)
    output, same = read_text(*tensors, settings)
    assert output is None and all(torch.equal(one, other) for one, other in zip(slots, same, strict=True))


@pytest.mark.parametrize("fits", [True, False], ids=["fits", "beyond"])
@pytest.mark.parametrize("counts", [(12, 12, 12), ((5, 7), (6, 6), (5, 7))], ids=["equal", "heads"])
def test_a_layer_reads_by_the_launches_of_the_one_before(counts, fits, monkeypatch):
    """The short way launches with the same addresses as the long one, and leaves the same to the cache layer."""
    query, key, value, states, weight, _ = inputs(1, 4, 2, 5 if fits else 30, 16, 48, torch.float32, False)
    program = NotedLaunches(None if fits else query + 1)
    monkeypatch.setattr(reading, "is_on_gpu", lambda query: True)
    monkeypatch.setattr(reading, "_programs", SimpleNamespace(get=lambda layout: program))
    scoring = Scoring(weight, None, Slopes(0.01, 256, 0), (weight.data_ptr(), 0), "layout of the scorer")
    attention = SimpleNamespace(uses_scorer=True, active="a", identities={"a": None})
    call, outputs = ModelCall(), []
    caches = [layer_of(call, count) for count in counts]
    call.kinds[:] = [kind._replace(scoring=scoring) for kind in call.kinds]
    new = NewTokens(query, key, value, states, None, 0.25)
    with torch.no_grad():
        for number, cache in enumerate(caches):
            cache.scoring, cache.owner = scoring, (None, None)
            short = reading.read_fast(*new[:4], cache, 0.25)
            assert (short is None) == (number == 0)  # no layer has read before the first
            outputs.append(reading.read_in_few_launches(attention, new, cache) if short is None else short)
            assert cache.is_initialized and not cache.empty
    first, second, third = program.bases
    begin = 5 if fits else 6  # without the query
    for number, bases in enumerate(program.bases):
        assert bases[:begin] == [*([] if fits else [query.data_ptr()]), *first[begin - 5 : begin]]
        assert bases[begin : begin + 7] == caches[0].shared[0].addresses(number)
        assert caches[number].shared == (caches[0].shared[0], number)
        assert len(bases) == begin + 10 and (bases[-2] == 0) == (counts[0] == 12) and bases[-1] == 0
    assert first[begin + 7 :] == third[begin + 7 :] and (first[-3:] == second[-3:]) == (counts[0] == 12)
    for output in outputs:
        assert output.shape == query.shape and torch.equal(output, outputs[0])


@pytest.mark.parametrize("change", ["keys", "address", "gradients", "scorer", "used"])
def test_another_layer_does_not_read_as_the_one_before(change, monkeypatch):
    query, key, value, states, weight, _ = inputs(1, 4, 2, 30, 16, 48, torch.float32, False)
    program = NotedLaunches(query)
    monkeypatch.setattr(reading, "is_on_gpu", lambda query: True)
    monkeypatch.setattr(reading, "_programs", SimpleNamespace(get=lambda layout: program))
    scoring = Scoring(weight, None, Slopes(0.01, 256, 0), (weight.data_ptr(), 0), "layout of the scorer")
    attention = SimpleNamespace(uses_scorer=True, active="a", identities={"a": None})
    call = ModelCall()
    first, second = layer_of(call, 12), layer_of(call, 12)
    of_second = None if change == "scorer" else scoring  # as for a baseline, or where others look on
    call.kinds[:] = [kind._replace(scoring=one) for kind, one in zip(call.kinds, (scoring, of_second), strict=True)]
    first.scoring, second.scoring = scoring, of_second
    first.owner = (None, None)
    with torch.no_grad():
        reading.read_in_few_launches(attention, NewTokens(query, key, value, states, None, 0.25), first)
    if change == "keys":
        key, value = (tensor[:, :1] for tensor in (key, value))
    elif change == "address":
        room = torch.zeros(key.numel() + 1, device=DEVICE)
        key = room[1:].view_as(key).copy_(key)
    elif change == "used":
        second.is_initialized = True
    with torch.set_grad_enabled(change == "gradients"):
        assert reading.read_fast(query, key, value, states, second, 0.25) is None
    assert len(program.bases) == 1 and second.shared is None


@pytest.mark.parametrize("k", [8, (5, 7)], ids=["equal", "heads"])
def test_a_layer_that_keeps_nothing_attends_by_known_launches(k, monkeypatch):
    query, key, value, states, weight, _ = inputs(1, 4, 2, 30, 16, 48, torch.float32, False)
    program = NotedLaunches(query + 1)
    monkeypatch.setattr(without_cache, "is_on_gpu", lambda query: True)
    monkeypatch.setattr(without_cache, "_programs", SimpleNamespace(get=lambda layout: program))
    scoring = Scoring(weight, None, Slopes(0.01, 256, 0), (weight.data_ptr(), 0), "layout of the scorer")
    monkeypatch.setattr(without_cache, "known_scoring", lambda attention: scoring)
    attention = SimpleNamespace(training=False, causal=True, uses_scorer=True, budget=Budget(k, 3, 1))
    call = BackboneCall()
    with torch.no_grad():
        expected = without_cache.attend_without_cache(attention, NewTokens(query, key, value, states, None, 0.25))
        ready = without_cache.ready_layer(attention, 30)
        for _ in range(2):
            found = without_cache.attend_fast_alone(query, key, value, states, ready, call, 0.25)
            assert torch.equal(found, expected)
        assert [*call.shared.programs.values()] == [program]
        assert program.bases[0] == program.bases[1] == program.bases[2]
        monkeypatch.setattr(without_cache, "_programs", {})
        other = ready._replace(launches=("another scorer",))
        assert without_cache.attend_fast_alone(query, key, value, states, other, call, 0.25) is None
        longer = [torch.cat([tensor, tensor], 2) for tensor in (query, key, value)]
        assert without_cache.attend_fast_alone(*longer, states, ready, call, 0.25) is None
        elsewhere = scoring._replace(layout=None)  # a weight that begins at no multiple of 16 bytes
        monkeypatch.setattr(without_cache, "known_scoring", lambda attention: elsewhere)
        assert without_cache.ready_layer(attention, 30) is None
    assert without_cache.attend_fast_alone(query, key, value, states, ready, call, 0.25) is None  # gradients
    for name, value in (("training", True), ("causal", False), ("uses_scorer", False)):
        with monkeypatch.context() as changed:
            changed.setattr(attention, name, value)
            assert without_cache.ready_layer(attention, 9) is None


@pytest.mark.parametrize("is_short", [True, False])
def test_a_layer_that_keeps_nothing_attends_to_all_keys_that_fit(is_short, monkeypatch):
    """By the launch of the kernel for short texts, or by SDPA; the scorer is not asked for."""
    query, key, value, states, _, _ = inputs(1, 4, 2, 9, 16, 48, torch.float32, False)
    program = NotedLaunches(query + 1) if is_short else None
    monkeypatch.setattr(without_cache, "_programs", {} if program is None else {(LAYOUT_OF_SHORT, None): program})
    monkeypatch.setattr(without_cache, "layout_of", lambda *_: LAYOUT_OF_SHORT)
    monkeypatch.setattr(without_cache, "takes_kernel", lambda *_: is_short)
    monkeypatch.setattr(without_cache, "is_on_gpu", lambda query: True)
    attention = SimpleNamespace(training=False, causal=True, uses_scorer=True, budget=Budget(8, 3, 1))
    ready, call = without_cache.ready_layer(attention, 9), BackboneCall()
    with torch.no_grad():
        expected = without_cache.attend_without_cache(attention, NewTokens(query, key, value, states, None, 0.25))
        found = [without_cache.attend_fast_alone(query, key, value, states, ready, call, 0.25) for _ in range(2)]
    assert all(torch.equal(one, expected) for one in found) and call.shared.programs == {None: program}
    if program is None:
        mine = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.25, enable_gqa=True
        )
        assert torch.equal(expected, mine)
    else:
        assert program.bases == 3 * [[tensor.data_ptr() for tensor in (query, key, value)]]


LAYOUT_OF_SHORT = ("layout",)


class InterpretedLaunches:
    """Run in Triton's interpreter what a GPU launches, on the tensors at the addresses that come."""

    used = 0

    def __init__(self, function, tensors, settings, order):
        self.function, self.settings, self.order = function, settings, order
        self.tensors = [tensor if tensor is None else tensor.detach() for tensor in tensors]

    def memory(self):
        return None

    def launch(self, bases, memory):
        tensors = [
            None if tensor is None else tensor_at(address, tensor)
            for address, tensor in zip(bases, self.tensors, strict=True)
        ]
        return self.function(*tensors, self.settings)


def tensor_at(address, alike):
    """Make a tensor of the shape, strides and dtype of another one in memory of this process."""
    size = 1 + sum((number - 1) * stride for number, stride in zip(alike.shape, alike.stride(), strict=True))
    memory = (ctypes.c_char * (size * alike.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=alike.dtype).as_strided(alike.shape, alike.stride())


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Let models on a CPU take the paths of a GPU, and note launches for the interpreter."""
    if DEVICE == "cuda":
        return

    def program_of(function, tensors, settings):
        return InterpretedLaunches(function, tensors, settings, () if function is kernels._take_all else (0,))

    def scoring_of(scorer):
        weight = scorer.weight
        return Scoring(weight, None, scorer.slopes, (weight.data_ptr(), 0), "layout")

    for module in (kernels, of_short_texts):
        monkeypatch.setattr(module, "program_of", program_of)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for module in (reading, without_cache, causal_attention):
        monkeypatch.setattr(module, "is_on_gpu", lambda tensor: True)
    for module in (reading, without_cache):
        monkeypatch.setattr(module, "_programs", {})
    monkeypatch.setattr(known_layer, "scoring_of", scoring_of)


@pytest.mark.parametrize(
    "shares",
    [{}, {"layer_shares": [1.2, 0.8, 1.0]}, {"head_shares": [[0.5, 1.0], [1.75, 0.75], [0.75, 1.25]]}],
    ids=["equal", "layers", "heads"],
)
@pytest.mark.parametrize("length, is_short", [(17, True), (17, False), (90, True)])
def test_a_model_reads_as_by_the_longer_path(length, is_short, shares, as_on_gpu, monkeypatch):
    """Logits of the text and of the tokens after it, and what the cache holds; a copy of the cache goes on too.

    The first call of a length notes launches, and the second one makes the slots of all layers but the first together.
    """
    import copy

    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_sparse import SparseKConfig, patch, unrecorded
    from hf_sparse._compat import cache_of, with_cache
    from hf_sparse.methods.sparsek import attention

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=100,
    )  # fmt: skip
    torch.manual_seed(0)
    budget = SparseKConfig(k=8, window=12, sinks=2, **shares)
    if not is_short:
        monkeypatch.setattr(causal_attention, "_MOST_PRODUCTS", 0)
    model = patch(LlamaForCausalLM(config).to(DEVICE).eval(), budget)
    ids = torch.randint(0, 100, (2, length + 30), device=DEVICE)
    results = []
    ways = ["read_fast", "attend_fast_alone"]
    taken = dict.fromkeys(ways, 0)

    def counted(name, do):
        def count(*args):
            output = do(*args)
            taken[name] += output is not None
            return output

        return count

    for name in ways:
        monkeypatch.setattr(attention, name, counted(name, getattr(attention, name)))
    by_sdpa = []
    for module in (reading, without_cache):
        monkeypatch.setattr(module, "_programs", {})
        monkeypatch.setattr(module, "attend_by_sdpa", lambda *args: by_sdpa.append(1) or attend_by_sdpa(*args))
    for path in ("first call", "second call", "longer path"):
        taken |= dict.fromkeys(ways, 0)
        if path == "longer path":
            for name in (*ways, "read_in_few_launches", "attend_without_cache"):
                monkeypatch.setattr(attention, name, lambda *_: None)
        with torch.inference_mode(), unrecorded():
            output = model(ids[:, :length], use_cache=True)
            alone = model(ids[:, :length], use_cache=False)
        if path == "second call":
            assert len(by_sdpa) == (12 if length == 17 and not is_short else 0)  # three layers, two calls each
            assert taken == {"read_fast": 3, "attend_fast_alone": 3}
        torch.testing.assert_close(alone.logits, output.logits, rtol=1e-3, atol=1e-3)
        logits, caches = [output.logits], [cache_of(output)]
        with torch.no_grad():
            caches.append(copy.deepcopy(caches[0]))
            for cache in caches:
                for token in ids[:, length:].split(1, 1):
                    logits.append(model(token, **with_cache(cache)).logits)
        layers = caches[0].layers
        assert layers[0].get_seq_length() == length + 30 == layers[0].cumulative_length
        state = [torch.cat([getattr(layer, name).flatten() for layer in layers]) for name in ("positions", "seen")]
        results.append((torch.cat(logits, 1), *state))
    *short, longer = results
    for result in short:
        torch.testing.assert_close(result[0], longer[0], rtol=1e-3, atol=1e-3)
        assert all(torch.equal(one, other) for one, other in zip(result[1:], longer[1:], strict=True))


def test_scores_that_are_no_numbers_leave_slots_in_order(poisoned_memory):
    """Every slot holds a position of the text in rising order or none, and nothing beside the slots is written."""
    settings = ReadingSettings(k=5, window=7, sinks=2, scaling=0.2, slopes=Slopes(0.0, 256, 0))
    inputs_ = list(inputs(2, 2, 2, 60, 16, 32, torch.float32, False))
    inputs_[3][0, 10:30] = torch.nan
    _, slots = read_text(*inputs_, settings)
    for row in slots.positions.flatten(0, 1).tolist():
        kept = [position for position in row if position >= 0]
        assert kept == sorted(set(kept)) and all(position < 60 for position in kept)
        assert row == kept + [-1] * (len(row) - len(kept)) and row[:2] == [0, 1]
    assert slots.keys.isfinite().all() and slots.seen.tolist() == [60, 60]
