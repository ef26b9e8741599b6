"""The KV slots: what is kept equals the definition, whichever way the tokens came."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from hf_sparse.core.cache import ModelCall
from hf_sparse.methods.sparsek import SparseKCacheLayer
from hf_sparse.methods.sparsek.fixed_memory import SharedSlots
from hf_sparse.methods.sparsek.known_layer import Scoring
from hf_sparse.ops.stacked import places_of

BATCH, HEADS, DIM = 3, 2, 4
K, WINDOW, SINKS = 4, 5, 2
SLOTS = K + WINDOW + SINKS


def stream(length: int, kind: str = "normal"):
    """Keys, values `[B, H, T, D]` and scores `[B, H, T]`."""
    keys, values = torch.randn(2, BATCH, HEADS, length, DIM)
    scores = torch.randn(BATCH, HEADS, length)
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = torch.zeros_like(scores)
    elif kind == "rising":
        scores = scores + torch.arange(length) * 0.2
    return keys, values, scores


def update(layer, keys, values):
    layer.begin_attention()
    updated = layer.update(keys, values)
    layer.end_attention()
    return updated


def new_layer(keys, values) -> SparseKCacheLayer:
    layer = SparseKCacheLayer(K, WINDOW, SINKS)
    update(layer, keys, values)
    return layer


def insert(layer, keys, values, scores, valid=None, tokens=None):
    for t in range(scores.shape[-1]) if tokens is None else tokens:
        at = slice(t, t + 1)
        layer.insert(keys[:, :, at], values[:, :, at], scores[:, :, at], None if valid is None else valid[:, t])


def fill(layer, keys, values, scores, valid):
    index = (valid.cumsum(-1) - 1).masked_fill(~valid, -1)
    layer.fill(keys, values, scores, index[:, None].expand_as(scores), valid.sum(-1))


def kept_by_definition(scores: torch.Tensor) -> list[int]:
    """Of one row and head, `[T]` scores: sinks, window and the best K of the rest, lower index first on ties."""
    length = len(scores)
    near = {j for j in range(length) if j < SINKS or j >= length - WINDOW}
    rest = sorted(set(range(length)) - near, key=lambda j: (-float(scores[j]), j))
    return sorted(near | set(rest[:K]))


def assert_holds(layer, keys, values, scores, valid):
    """The layer holds what the definition wants of the valid tokens, row by row."""
    got_keys, got_values, got_scores, positions = layer.ordered()
    for row in range(len(scores)):
        real = valid[row].nonzero().squeeze(-1)
        assert int(layer.seen[row]) == len(real)
        for head in range(HEADS):
            kept = kept_by_definition(scores[row, head, real])
            empty = SLOTS - len(kept)
            assert positions[row, head].tolist() == [-1] * empty + kept
            assert torch.equal(got_keys[row, head, empty:], keys[row, head, real[kept]])
            assert torch.equal(got_values[row, head, empty:], values[row, head, real[kept]])
            assert torch.equal(got_scores[row, head, empty:], scores[row, head, real[kept]])


def every(length):
    return torch.ones(BATCH, length, dtype=torch.bool)


PADDING = {
    "none": lambda length: every(length),
    "left": lambda length: torch.arange(length) >= torch.tensor([0, 6, 20])[:, None],
    "right": lambda length: torch.arange(length) < torch.tensor([length, 9, 1])[:, None],
    "interior": lambda length: torch.rand(BATCH, length) < 0.6,
}


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "rising"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("length", [1, 3, SLOTS, SLOTS + 1, 40])
def test_fill_and_insert_keep_what_the_definition_says(length, padding, kind):
    keys, values, scores = stream(length, kind)
    valid = PADDING[padding](length)
    filled, inserted = new_layer(keys, values), new_layer(keys, values)
    fill(filled, keys, values, scores, valid)
    assert_holds(filled, keys, values, scores, valid)
    insert(inserted, keys, values, scores, valid)
    assert_holds(inserted, keys, values, scores, valid)


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("split", [1, 7, SLOTS, 30])
def test_insert_goes_on_after_fill(split, kind):
    keys, values, scores = stream(40, kind)
    layer = new_layer(keys, values)
    fill(layer, keys[:, :, :split], values[:, :, :split], scores[:, :, :split], every(split))
    for t in range(split, 40):
        insert(layer, keys, values, scores, tokens=[t])
        assert_holds(layer, keys[:, :, : t + 1], values[:, :, : t + 1], scores[:, :, : t + 1], every(t + 1))


def test_scores_are_float32_whatever_the_default_is():
    keys, values, scores = stream(SLOTS + 1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = new_layer(keys, values)
    finally:
        torch.set_default_dtype(torch.float32)
    insert(layer, keys, values, scores)
    assert layer.scores.dtype == torch.float32


def test_every_head_has_the_same_empty_slots():
    """Attention reads the mask of the filled slots off the first head."""
    for padding in PADDING.values():
        keys, values, scores = stream(25)
        layer = new_layer(keys, values)
        valid = padding(25)
        fill(layer, keys[:, :, :8], values[:, :, :8], scores[:, :, :8], valid[:, :8])
        for t in range(8, 25):
            assert ((layer.positions >= 0) == (layer.positions[:, :1] >= 0)).all()
            insert(layer, keys, values, scores, valid, tokens=[t])


def test_bytes_are_those_of_the_slots_from_the_start():
    keys, values, scores = stream(60)
    layer = SparseKCacheLayer(K, WINDOW, SINKS)
    assert layer.nbytes == 0
    update(layer, keys[:, :, :1], values[:, :, :1])
    expected = 2 * BATCH * HEADS * SLOTS * DIM * keys.element_size()
    for t in range(60):
        insert(layer, keys, values, scores, tokens=[t])
        assert layer.nbytes == expected
    assert layer.keys.untyped_storage().nbytes() * 2 == expected


def test_the_cache_keeps_the_dtype_of_the_keys_and_scores_in_float32():
    keys, values, scores = stream(5)
    layer = new_layer(keys.bfloat16(), values.bfloat16())
    fill(layer, keys.bfloat16(), values.bfloat16(), scores, every(5))
    assert layer.keys.dtype == layer.values.dtype == torch.bfloat16
    assert layer.scores.dtype == torch.float32


def test_no_gradient_is_kept():
    keys, values, scores = (tensor.requires_grad_() for tensor in stream(20))
    layer = new_layer(keys, values)
    fill(layer, keys, values, scores, every(20))
    insert(layer, keys, values, scores, tokens=[3])
    assert not any(t.requires_grad for t in (layer.keys, layer.values, layer.scores))


def filled_layer(length=30):
    keys, values, scores = stream(length)
    layer = new_layer(keys, values)
    fill(layer, keys, values, scores, every(length))
    return layer, (keys, values, scores)


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_rows_move_with_everything_that_belongs_to_them(change, rows):
    layer, tensors = filled_layer()
    change(layer)
    keys, values, scores = (tensor[rows] for tensor in tensors)
    assert_holds(layer, keys, values, scores, torch.ones(len(rows), 30, dtype=torch.bool))
    more = [torch.randn(len(rows), *t.shape[1:2], 1, *t.shape[3:]) for t in (keys, values, scores)]
    insert(layer, *more)
    joined = [torch.cat([old, new], 2) for old, new in zip((keys, values, scores), more, strict=True)]
    assert_holds(layer, *joined, torch.ones(len(rows), 31, dtype=torch.bool))


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices"])
def test_an_empty_layer_can_be_reordered(change):
    layer = SparseKCacheLayer(K, WINDOW, SINKS)
    getattr(layer, change)(torch.tensor([0]))
    assert layer.get_seq_length() == 0


STATE = ("keys", "values", "scores", "positions", "seen", "cumulative_length")


def addresses(layer):
    return [getattr(layer, name).data_ptr() for name in STATE]


def test_everything_stays_at_its_address():
    """CUDA graphs write to the addresses they have recorded."""
    layer, (keys, values, scores) = filled_layer(SLOTS - 2)
    at = addresses(layer)
    insert(layer, keys, values, scores)
    fill(layer, keys, values, scores, every(SLOTS - 2))
    layer.crop(-2)
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    layer.batch_select_indices(torch.tensor([1, 0, 0]))
    layer.reset()
    update(layer, keys, values)
    assert addresses(layer) == at
    assert all(getattr(layer, name)._dynamo_static_input_type == "unguarded" for name in STATE)
    layer.batch_repeat_interleave(2)
    assert layer.keys._dynamo_static_input_type == layer.seen._dynamo_static_input_type == "unguarded"


def test_a_copy_has_its_own_slots_where_layers_lie_in_one_piece_of_memory():
    """A prefill on a GPU allocates the slots of all layers together."""
    keys, values, scores = stream(20)
    layer = new_layer(keys, values)
    insert(layer, keys, values, scores)
    alone = len(pickle.dumps(layer))
    for name in ("keys", "values", "positions"):
        setattr(layer, name, torch.stack([getattr(layer, name)] * 9)[4])
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert len(pickle.dumps(copied)) < 1.1 * alone
        for name in ("keys", "values", "positions"):
            tensor = getattr(copied, name)
            assert torch.equal(tensor, getattr(layer, name)) and tensor.untyped_storage().nbytes() == tensor.nbytes


def read_one(layer, name):
    return getattr(layer, name)


def read_a_copy(layer, name):
    return getattr(copy.deepcopy(layer), name)


def read_of_a_lent_one(layer, name):
    return getattr(layer.lent_to(SimpleNamespace(owner=None)), name)


@pytest.mark.parametrize("read", [read_one, read_a_copy, read_of_a_lent_one])
@pytest.mark.parametrize("name", ["keys", "values", "scores", "positions", "seen", "padded_late", "cumulative_length"])
def test_tensors_in_shared_memory_are_made_when_one_is_read(name, read):
    keys, values, scores = stream(20)
    alone = [new_layer(keys, values) for _ in range(3)]
    for number, layer in enumerate(alone):
        layer.fill_whole(keys + number, values, scores + number)
        layer.padded_late.fill_(number % 2)
    names = ("keys", "values", "scores", "positions", "seen", "padded_late", "cumulative_length")
    tensors = [[getattr(layer, name) for name in names] for layer in alone]
    shared = SharedSlots(
        places_of([(tensor.shape, tensor.dtype) for of_layer in tensors for tensor in of_layer]), keys.device
    )
    for number, of_layer in enumerate(tensors):
        torch._foreach_copy_(shared.tensors(number), of_layer)
    layers = [SparseKCacheLayer(K, WINDOW, SINKS) for _ in alone]
    assert all(layer.keys is None for layer in layers)
    for number, layer in enumerate(layers):
        layer.take_shared(shared, number)
        assert layer.is_initialized and (layer.dtype, layer.device) == (keys.dtype, keys.device)
    for layer, expected in zip(layers, alone, strict=True):
        assert not vars(layer).keys() & {"keys", "values", "_scores", "positions", "seen"}
        assert torch.equal(read(layer, name), getattr(expected, name))
        assert layer.shared is None and layer.keys is vars(layer)["keys"]
        assert layer.seen._dynamo_static_input_type == "unguarded"
    layers[0].keys.zero_()
    assert torch.equal(layers[1].keys, alone[1].keys)


def test_slots_that_are_lent_keep_the_counters_of_their_kernel():
    """A compiled step would make them anew for each layer otherwise, also in a cache that a user has made."""
    layer, _ = filled_layer()
    rows, before = len(layer.keys), layer.arrived
    first, second = (layer.lent_to(SimpleNamespace(owner=None)) for _ in range(2))
    assert before is None and layer.arrived.dtype == torch.int32
    assert layer.arrived.tolist() == [0] * (rows * HEADS + 1)
    assert first.arrived.data_ptr() == second.arrived.data_ptr() == layer.arrived.data_ptr()
    layer.batch_repeat_interleave(3)
    assert len(layer.arrived) == 3 * rows * HEADS + 1


def test_a_copy_is_without_the_scorer():
    keys, values, scores = stream(20)
    layer = new_layer(keys, values)
    layer.fill_whole(keys, values, scores)
    size = len(pickle.dumps(layer))
    layer.scoring = Scoring(torch.randn(HEADS, 4096), None, None, (0, 0), None)  # as a prefill on a GPU leaves it
    assert len(pickle.dumps(layer)) == size and copy.deepcopy(layer).scoring is None


def test_reset_forgets_everything_but_the_buffers():
    layer, (keys, values, scores) = filled_layer()
    size = layer.nbytes
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.empty and layer.nbytes == size
    assert not layer.keys.any() and not layer.seen.any() and (layer.positions == -1).all()
    update(layer, keys[:, :, :5], values[:, :, :5])
    assert layer.get_seq_length() == 5
    fill(layer, keys[:, :, :5], values[:, :, :5], scores[:, :, :5], every(5))
    assert_holds(layer, keys[:, :, :5], values[:, :, :5], scores[:, :, :5], every(5))


def test_reset_forgets_an_attention_that_an_error_ended():
    keys, values, scores = stream(8)
    layer = new_layer(keys, values)
    layer.fill_whole(keys, values, scores)
    layer.begin_attention()
    layer.update(keys[:, :, :1], values[:, :, :1])
    layer.reset()
    assert layer.get_seq_length() == 0
    with pytest.raises(RuntimeError, match="continues it with dense attention"):
        layer.update(keys, values)


def test_a_reset_layer_takes_another_batch():
    layer, (keys, values, _) = filled_layer()
    layer.reset()
    update(layer, keys[:1, :, :2], values[:1, :, :2])
    assert layer.keys.shape[0] == len(layer.seen) == 1 and layer.get_seq_length() == 2


def test_another_batch_in_the_middle_is_refused():
    layer, (keys, values, _) = filled_layer()
    with pytest.raises(ValueError, match="the cache holds 3 rows, and 2 rows came: start a new cache"):
        update(layer, keys[:2], values[:2])


def test_padding_leaves_nothing_behind():
    keys, values, scores = stream(6)
    valid = PADDING["right"](6)
    for tensor in (keys, values):
        tensor.masked_fill_(~valid[:, None, :, None], torch.nan)
    layer = new_layer(keys, values)
    fill(layer, keys, values, scores, valid)
    assert layer.keys.isfinite().all() and layer.values.isfinite().all()


def test_prefetch_moves_every_slot_tensor():
    layer, _ = filled_layer()
    layer.device = torch.device("meta")  # stands for an accelerator
    layer.prefetch()
    assert {getattr(layer, name).device.type for name in STATE[:-1]} == {"meta"}


def test_offloading_waits_for_the_attention():
    """transformers offloads a layer after `update`, when the attention function has not run yet."""
    layer, (keys, values, _) = filled_layer()
    moves = []
    layer._each = lambda change: moves.append(change)
    layer.begin_attention()
    layer.update(keys, values)
    layer.offload()
    assert not moves
    layer.end_attention()
    assert len(moves) == 1
    assert moves[0](torch.zeros(1)).device.type == "cpu"
    update(layer, keys, values)
    assert len(moves) == 1
    layer.offload()
    assert len(moves) == 2


def test_an_empty_layer_is_not_moved():
    layer = SparseKCacheLayer(K, WINDOW, SINKS)
    layer.offload()
    layer.prefetch()
    assert layer.keys is None


def test_a_mask_may_not_change_what_has_come():
    layer, _ = filled_layer(30)
    mask = torch.ones(3, 35, dtype=torch.bool)
    update(layer, torch.zeros(3, HEADS, 5, DIM), torch.zeros(3, HEADS, 5, DIM))
    assert layer.check_mask(mask, 5).shape == (3, 5)
    assert layer.check_mask(None, 5) is None
    mask[1, 3:5] = False
    with pytest.raises(ValueError, match=r"\[30, 28, 30\] real tokens .* taken in \[30, 30, 30\] as real"):
        layer.check_mask(mask, 5)
    assert torch.equal(layer.check_mask(mask, 1), mask[:, -1:])  # a single step does not wait for the device


def test_a_mask_has_a_column_for_each_new_token():
    layer, _ = filled_layer(30)
    with pytest.raises(ValueError, match="must have a column for each of 5 tokens, got 4"):
        layer.check_mask(torch.ones(3, 4, dtype=torch.bool), 5)
    empty = SparseKCacheLayer(K, WINDOW, SINKS)
    with pytest.raises(ValueError, match="must have a column for each of 5 tokens, got 6"):
        empty.check_mask(torch.ones(3, 6, dtype=torch.bool), 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    assert empty.check_mask(mask, 5) is mask and empty.check_mask(None, 5) is None


def test_counts():
    keys, values, _ = stream(7)
    layer = SparseKCacheLayer(K, WINDOW, SINKS)
    assert layer.slots == SLOTS
    new_keys, new_values = update(layer, keys, values)
    assert new_keys is keys and new_values is values
    assert layer.get_seq_length() == 7
    assert layer.get_mask_sizes(3) == (3, 0)
    layer.share_mask_sizes()
    assert layer.get_mask_sizes(3) == (10, 0)
    assert layer.get_max_length() == -1


@pytest.mark.parametrize("removed", [0, 1, 4, 9])
def test_crop_before_anything_was_evicted(removed):
    layer, (keys, values, scores) = filled_layer(SLOTS)
    layer.crop(-removed)
    left = SLOTS - removed
    assert layer.get_seq_length() == left
    assert_holds(layer, keys[:, :, :left], values[:, :, :left], scores[:, :, :left], every(left))
    keys2, values2, scores2 = stream(20)
    insert(layer, keys2, values2, scores2)
    joined = [torch.cat([a[:, :, :left], b], 2) for a, b in ((keys, keys2), (values, values2), (scores, scores2))]
    assert_holds(layer, *joined, every(left + 20))


def test_crop_after_eviction_is_refused():
    layer, _ = filled_layer(SLOTS + 1)
    layer.crop(0)
    with pytest.raises(RuntimeError, match=f"has {SLOTS} slots and has seen {SLOTS + 1} tokens.*cannot be cropped"):
        layer.crop(-1)


def test_crop_takes_a_negative_count():
    layer, _ = filled_layer(5)
    with pytest.raises(ValueError, match="crop takes a negative count of tokens to remove, got 2"):
        layer.crop(2)


def test_dense_attention_may_not_use_the_slots():
    keys, values, _ = stream(3)
    layer = new_layer(keys, values)
    with pytest.raises(RuntimeError, match=r"holds the KV slots of sparse attention.*start a new cache"):
        layer.update(keys, values)


def test_the_length_is_a_number():
    keys, values, _ = stream(3)
    layer = new_layer(keys, values)
    assert (type(layer.get_seq_length()), layer.get_seq_length(), layer.get_mask_sizes(1)) == (int, 3, (1, 0))
    update(layer, keys, values)
    layer.cumulative_length.add_(4)
    assert layer.get_seq_length() == 6  # counted along, so that no step waits for the device
    layer.crop(-2)
    assert layer.get_seq_length() == 4
    layer.reset()
    assert type(layer.get_seq_length()) is int and layer.get_seq_length() == 0


def test_after_compiled_steps_the_length_is_read_off_the_tensor():
    keys, values, _ = stream(1)
    layer = new_layer(keys, values)
    lengths = []

    @torch.compile(backend="eager", fullgraph=True)
    def step(keys, values):
        layer.begin_attention()
        layer.update(keys, values)
        return layer.get_seq_length() + 0

    for _ in range(4):
        lengths.append(int(step(keys, values)))
        layer.end_attention()
    assert lengths == [2, 3, 4, 5]
    assert type(layer.get_seq_length()) is int and layer.get_seq_length() == 5
    update(layer, keys, values)
    assert layer.get_seq_length() == 6


def test_it_says_whether_it_can_be_cropped():
    keys, values, scores = stream(SLOTS + 1)
    layer = new_layer(keys[:, :, :SLOTS], values[:, :, :SLOTS])
    valid = torch.ones(BATCH, SLOTS, dtype=torch.bool)
    fill(layer, keys[:, :, :SLOTS], values[:, :, :SLOTS], scores[:, :, :SLOTS], valid)
    assert layer.is_croppable
    insert(layer, keys, values, scores, tokens=[SLOTS])
    assert not layer.is_croppable


@pytest.mark.parametrize("number", [1, K + WINDOW + SINKS, K + WINDOW + SINKS + 7])
def test_a_text_without_padding_fills_the_same_slots_with_fewer_kernels(number):
    layers = []
    keys, values = torch.randn(2, 2, 3, number, 4)
    scores, positions = torch.randn(2, 3, number), torch.arange(number).expand(2, 3, -1)
    for whole in (True, False):
        layer = SparseKCacheLayer(K, WINDOW, SINKS)
        layer.lazy_initialization(keys, values)
        if whole:
            layer.fill_whole(keys, values, scores)
        else:
            layer.fill(keys, values, scores, positions, torch.tensor([number, number]))
        assert not layer.empty
        layers.append(layer)
    for name in STATE:
        assert torch.equal(*(getattr(layer, name) for layer in layers)), name


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "rising"])
@pytest.mark.parametrize("length", [SLOTS - 3, SLOTS, SLOTS + 1, 40])
def test_a_text_that_ends_before_what_is_read(length, kind):
    """Whatever stands behind its end, the slots are those of the text alone."""
    keys, values, scores = stream(40, kind)
    whole, part = SparseKCacheLayer(K, WINDOW, SINKS), SparseKCacheLayer(K, WINDOW, SINKS)
    part.call = ModelCall(end=torch.tensor([length]))
    whole.fill_whole(keys[:, :, :length], values[:, :, :length], scores[:, :, :length])
    whole.cumulative_length.fill_(length)
    part.fill_whole(keys, values, scores)
    for name in ("keys", "values", "scores", "positions", "seen", "padded_late", "cumulative_length"):
        assert torch.equal(getattr(part, name), getattr(whole, name)), name


@pytest.mark.parametrize("budgets", [(K, K, K), (K, 1, K), (3, 2, 1)], ids=str)
def test_copies_of_texts_are_apart(budgets):
    """Slots of one shape share an allocation, and copies that have memory keep it."""
    sources, targets = ([SparseKCacheLayer(k, WINDOW, SINKS) for k in budgets] for _ in range(2))
    for length in (30, 8):
        for layer in sources:
            layer.reset()
            layer.fill_whole(*stream(length))
        before = [layer.keys for layer in targets]
        SparseKCacheLayer.copy_texts(sources, targets, length)
        for mine, theirs, old in zip(targets, sources, before, strict=True):
            assert not mine.empty and (old is None or mine.keys is old)
            for name in ("keys", "values", "scores", "positions", "seen", "padded_late", "cumulative_length"):
                one, other = getattr(mine, name), getattr(theirs, name)
                assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
    assert len({layer.keys.untyped_storage().data_ptr() for layer in targets}) == len(set(budgets))
    targets[0].keys.zero_()
    assert all(bool(layer.keys.any()) for layer in targets[1:])
