"""KV heads with different numbers of keys: each is what it would be alone in a model with its own number."""

import copy
import pickle

import pytest
import torch

import hf_sparse
from hf_sparse import SparseKConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.core.overrides import override
from hf_sparse.evaluation import using
from hf_sparse.methods.sparsek import SparseKAttention, SparseKCacheLayer
from hf_sparse.methods.sparsek.baselines import BASELINES
from hf_sparse.methods.sparsek.budget import HeadShares
from hf_sparse.methods.sparsek.kept_keys import kept_keys
from hf_sparse.methods.sparsek.ragged_cache import RaggedCacheLayer
from hf_sparse.ops.selection.ragged import counts_of
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.cache import kv_bytes

HIDDEN, HEADS, GROUP, DIM, LENGTH = 16, 3, 2, 4, 40
SHARES, COUNTS, WINDOW, SINKS = [0.5, 1.75, 0.75], (2, 7, 3), 8, 2
SLOTS = tuple(count + WINDOW + SINKS for count in COUNTS)


def method(heads=None, **settings) -> SparseKAttention:
    """The attention of all heads, or of one of them alone, with the scorer that it has there."""
    config = SparseKConfig(k=4, window=WINDOW, sinks=SINKS, head_shares=[SHARES], position_slope=0.03, **settings)
    if heads is not None:
        config = SparseKConfig(**{**config.to_dict(), "k": COUNTS[heads], "head_shares": None, "peft_type": None})
    module = SparseKAttention(HIDDEN, HEADS if heads is None else 1, layer=0)
    module.add_adapter("default", config)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(HEADS, HIDDEN, generator=generator)
    with torch.no_grad():
        module.sparsek_scorer["default"].weight.copy_(weight if heads is None else weight[heads : heads + 1])
    return module.eval()


def inputs(rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "query": random(rows, HEADS * GROUP, LENGTH, DIM),
        "key": random(rows, HEADS, LENGTH, DIM),
        "value": random(rows, HEADS, LENGTH, DIM),
        "hidden_states": random(rows, LENGTH, HIDDEN),
    }


def of_head(tensors: dict[str, torch.Tensor], head: int) -> dict[str, torch.Tensor]:
    group, one = slice(head * GROUP, (head + 1) * GROUP), slice(head, head + 1)
    parts = {"query": group, "key": one, "value": one}
    return {name: tensor[:, parts[name]] if name in parts else tensor for name, tensor in tensors.items()}


def attend(module, tensors, chunks, valid=None, with_cache=True):
    """The output of a text in pieces, and the cache."""
    cache, outputs, begin = module.cache_layer() if with_cache else None, [], 0
    for length in chunks:
        tokens = slice(begin, begin + length)
        part = {
            name: tensor[:, tokens] if name == "hidden_states" else tensor[:, :, tokens]
            for name, tensor in tensors.items()
        }
        if cache is not None:
            cache.begin_attention()
            cache.update(part["key"], part["value"])
        mask = None if valid is None else valid[:, tokens]
        outputs.append(module.attend(**part, valid=mask, cache=cache, scaling=0.7))
        if cache is not None:
            cache.end_attention()
        begin += length
    return torch.cat(outputs, 2), cache


VALID = {
    "none": None,
    "left": torch.arange(LENGTH) >= torch.tensor([0, 6, 25])[:, None],
    "right": torch.arange(LENGTH) < torch.tensor([LENGTH, 25, 13])[:, None],
    "interior": torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7,
}
CHUNKS = {"one pass": [LENGTH], "pieces": [5, 12, 1, 9, 13], "prefill and steps": [14] + [1] * 26, "steps": [1] * 40}


def assert_each_head_is_one_alone(module, tensors, chunks, valid=None, with_cache=True, **settings):
    output, cache = attend(module, tensors, chunks, valid, with_cache)
    real = torch.ones(3, LENGTH, dtype=torch.bool) if valid is None else valid
    assert torch.isfinite(output).all()
    for head in range(HEADS):
        single = method(head, **settings)
        single.baseline, single.training = module.baseline, module.training
        expected, other = attend(single, of_head(tensors, head), chunks, valid, with_cache)
        actual = output[:, head * GROUP : (head + 1) * GROUP]
        difference = (actual - expected)[real[:, None].expand(-1, GROUP, -1)].abs().max()
        assert difference <= 1e-5, (head, difference)
        if cache is not None:
            mine = cache.by_head(cache.positions)[head].sort(-1).values
            assert torch.equal(mine, other.positions[:, 0].sort(-1).values)
    return output, cache


class TestAgainstEachHeadAlone:
    @pytest.mark.cross
    @pytest.mark.parametrize("learns", [False, True])
    @pytest.mark.parametrize("padding", VALID)
    @pytest.mark.parametrize("chunks", CHUNKS)
    def test_any_pieces_and_any_padding(self, chunks, padding, learns):
        module = method()
        with torch.set_grad_enabled(learns):  # with gradients, the CPU takes steps one by one
            _, cache = assert_each_head_is_one_alone(module, inputs(), CHUNKS[chunks], VALID[padding])
        assert type(cache) is RaggedCacheLayer and cache.counts == SLOTS

    @pytest.mark.parametrize("support", [None, 2])
    @pytest.mark.parametrize("padding", VALID)
    def test_training(self, padding, support):
        module = method(support=support).train()
        args = (module, inputs(), [LENGTH], VALID[padding], False)
        output, _ = assert_each_head_is_one_alone(*args, support=support)
        module.eval()
        assert (attend(module, inputs(), [LENGTH], VALID[padding], False)[0] - output).abs().max() > 1e-3

    def test_gradients(self):
        module, tensors = method().train(), inputs()
        tensors["query"].requires_grad_()
        output, _ = attend(module, tensors, [LENGTH], None, False)
        output.square().sum().backward()
        weight = module.sparsek_scorer["default"].weight.grad
        assert (weight.abs().amax(-1) > 0).all()
        for head in range(HEADS):
            single, mine = method(head).train(), {k: v.detach() for k, v in of_head(tensors, head).items()}
            attend(single, mine, [LENGTH], None, False)[0].square().sum().backward()
            expected = single.sparsek_scorer["default"].weight.grad[0]
            torch.testing.assert_close(weight[head], expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.cross("values")
    @pytest.mark.parametrize("name", [name for name in BASELINES if "random" not in name and name != "oracle"])
    @pytest.mark.parametrize("chunks", ["one pass", "pieces", "prefill and steps"])
    def test_baselines(self, name, chunks):
        module = method()
        module.baseline = BASELINES[name]
        assert_each_head_is_one_alone(module, inputs(), CHUNKS[chunks])

    @pytest.mark.parametrize("name", ["oracle", "h2o", "snapkv"])
    def test_baselines_without_a_cache(self, name):
        module = method()
        module.baseline = BASELINES[name]
        assert_each_head_is_one_alone(module, inputs(), [LENGTH], VALID["left"], False)
        assert_each_head_is_one_alone(module, inputs(), [LENGTH], None, False)


class TestCache:
    def test_bytes_are_those_of_the_budget(self):
        _, cache = attend(method(), inputs(), [LENGTH])
        _, equal = attend(_equal(), inputs(), [LENGTH])
        assert cache.nbytes == equal.nbytes == 2 * 3 * sum(SLOTS) * DIM * 4
        assert cache.keys.shape == (3, sum(SLOTS), DIM) and cache.positions.shape == (3, sum(SLOTS))

    def test_the_fast_path_of_the_cpu_and_the_plain_one_keep_the_same(self):
        tensors, caches = inputs(), []
        for learns in (False, True):
            with torch.set_grad_enabled(learns):
                caches.append(attend(method(), tensors, [5] + [1] * 35)[1])
        for name in ("positions", "scores", "keys", "values", "seen"):
            assert torch.equal(getattr(caches[0], name), getattr(caches[1], name)), name

    def test_rows_move_together(self):
        module, tensors = method(), inputs()
        _, cache = attend(module, tensors, [LENGTH])
        order = torch.tensor([2, 0, 0])
        before = {name: getattr(cache, name).clone() for name in ("keys", "values", "scores", "positions", "seen")}
        cache.reorder_cache(order)
        for name, tensor in before.items():
            assert torch.equal(getattr(cache, name), tensor[order]), name
        cache.batch_repeat_interleave(2)
        assert cache.keys.shape[0] == 6
        cache.batch_select_indices(torch.tensor([0, 2, 4]))
        for name, tensor in before.items():
            assert torch.equal(getattr(cache, name), tensor[order]), name

    def test_crop_until_the_smallest_head_evicts(self):
        module, tensors = method(), inputs()
        short = {n: t[:, : min(SLOTS)] if n == "hidden_states" else t[:, :, : min(SLOTS)] for n, t in tensors.items()}
        _, cache = attend(module, short, [min(SLOTS)])
        cache.crop(-3)
        assert (cache.seen == min(SLOTS) - 3).all()
        for positions in cache.by_head(cache.positions):
            assert (positions >= 0).sum(-1).eq(min(SLOTS) - 3).all()
        _, cache = attend(module, tensors, [min(SLOTS) + 1] + [1] * 2)
        with pytest.raises(RuntimeError, match=f"has {min(SLOTS)} slots and has seen {min(SLOTS) + 3} tokens"):
            cache.crop(-1)

    def test_copies_and_reset(self):
        module, tensors = method(), inputs()
        _, cache = attend(module, tensors, [5] + [1] * 35)
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert torch.equal(other.positions, cache.positions) and other.counts == SLOTS
            assert torch.equal(other.offsets, cache.offsets) and other.keys.data_ptr() != cache.keys.data_ptr()
        cache.reset()
        assert (cache.positions == -1).all() and cache.empty

    def test_a_cache_of_another_layout_is_refused(self):
        module, tensors = method(), inputs()
        _, cache = attend(module, tensors, [LENGTH])
        refused = pytest.raises(ValueError, match="made for other shares of the heads: start a new cache")
        with override([module.config], head_shares=None), refused:
            module.check_cache(cache)

    def test_equal_heads_keep_their_layout(self):
        assert type(_equal().cache_layer()) is SparseKCacheLayer


def _equal() -> SparseKAttention:
    module = method()
    config = SparseKConfig(k=4, window=WINDOW, sinks=SINKS, head_shares=[[1.0] * HEADS])
    other = SparseKAttention(HIDDEN, HEADS, layer=0)
    other.add_adapter("default", config)
    assert module.budget.k == COUNTS and other.budget.k == 4
    return other.eval()


OF_MODEL = [[0.5, 1.25], [1.75, 0.5]]


class TestModel:
    def patched(self, tiny_llama, **settings):
        return patch(tiny_llama(), SparseKConfig(k=8, window=6, sinks=2, head_shares=OF_MODEL, **settings)).eval()

    @pytest.fixture
    def chunks(self):
        return torch.randint(0, 64, (2, 60), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def test_memory_is_the_budget_to_the_byte(self, tiny_llama, chunks):
        model = self.patched(tiny_llama)
        equal = patch(tiny_llama(), SparseKConfig(k=8, window=6, sinks=2)).eval()
        ours, theirs = (cache_of(m(input_ids=chunks, use_cache=True)) for m in (model, equal))
        assert kv_bytes(ours) == kv_bytes(theirs)
        assert [layer.counts for layer in ours.layers] == [(12, 18), (22, 12)]

    @torch.no_grad()
    def test_what_is_kept(self, tiny_llama, chunks):
        marks = kept_keys(self.patched(tiny_llama), chunks[:1])
        assert marks.sum(-1).tolist() == [12, 18, 22, 12]

    @torch.no_grad()
    def test_an_encoder(self, tiny_bert):
        model = patch(tiny_bert(), SparseKConfig(k=4, window=3, sinks=1, head_shares=self._of(tiny_bert()))).eval()
        ids = torch.randint(5, 60, (2, 40), generator=torch.Generator().manual_seed(0))
        output = model(input_ids=ids).logits
        marks = kept_keys(model, ids[:1])
        counts = [1 + k for layer in sparse_layers(model) for k in layer.budget.per_head(layer.num_key_value_heads)]
        assert marks.sum(-1).tolist() == counts and len(set(counts)) == 2
        mask = torch.ones_like(ids)
        mask[1, 25:] = 0
        padded = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:, :25]).logits
        torch.testing.assert_close(padded[1, :25], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(padded[0], output[0], rtol=0, atol=1e-5)
        with using(model, "window"):
            assert torch.isfinite(model(input_ids=ids).logits).all()

    @staticmethod
    def _of(model):
        config = model.config
        return [[0.5, 1.5] * (config.num_attention_heads // 2)] * config.num_hidden_layers

    def test_saved_and_loaded(self, tiny_llama, chunks, tmp_path):
        from peft import PeftModel, get_peft_model

        base = tiny_llama()
        model = get_peft_model(base, SparseKConfig(k=8, window=6, sinks=2, head_shares=OF_MODEL)).eval()
        with torch.no_grad():
            expected = model(chunks).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
        assert loaded.active_peft_config.head_shares == OF_MODEL
        with torch.no_grad():
            assert torch.equal(loaded(chunks).logits, expected)

    @pytest.mark.parametrize(
        "shares, message",
        [
            ([[1.0, 1.0]], "head_shares has 1 layers, and the model has 2 attention layers"),
            ([[1.0, 1.0], [1.0]], "head_shares has 1 shares for layer 1, and the model has 2 KV heads"),
        ],
    )
    def test_shares_of_another_model_are_refused(self, tiny_llama, shares, message):
        with pytest.raises(ValueError, match=message):
            patch(tiny_llama(), SparseKConfig(k=8, window=6, sinks=2, head_shares=shares))


class TestConfig:
    @pytest.mark.parametrize("k", [1, 7, 124, 188])
    def test_keys_add_up(self, k):
        generator = torch.Generator().manual_seed(k)
        shares = (1 / k + torch.rand(5, 3, generator=generator)).tolist()
        mean = sum(map(sum, shares)) / 15
        shares = [[round(1 / k + (share - 1 / k) * (1 - 1 / k) / (mean - 1 / k), 4) for share in row] for row in shares]
        if k == 1:
            shares = [[1.0] * 3] * 5
        divided = HeadShares(shares)
        counts = [divided.of_layer(layer, k) for layer in range(5)]
        assert sum(map(sum, counts)) == 15 * k and min(map(min, counts)) >= 1
        for row, numbers in zip(shares, counts, strict=True):
            assert all(abs(share * k - number) <= 1 for share, number in zip(row, numbers, strict=True))

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"head_shares": 1.0}, "must be None or a list of positive numbers for each layer, got 1.0"),
            ({"head_shares": []}, "must be None or a list of positive numbers for each layer"),
            ({"head_shares": [[]]}, "must be None or a list of positive numbers for each layer"),
            ({"head_shares": [1.0, 1.0]}, "must be None or a list of positive numbers for each layer"),
            ({"head_shares": [[1.0, -1.0]]}, "must be None or a list of positive numbers for each layer"),
            ({"head_shares": [[1.0, "1"]]}, "must be None or a list of positive numbers for each layer"),
            ({"head_shares": [[1.0, 1.5]]}, "must be 1 on average over all heads.*the mean is 1.2500"),
            (
                {"head_shares": [[0.01, 1.99]], "k": 50},
                "k is 50, so the smallest share must be at least 0.0200, got 0.01",
            ),
            ({"head_shares": [[1.0]], "layer_shares": [1.0]}, "give one of the two"),
        ],
    )
    def test_refusals(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SparseKConfig(**settings)

    def test_the_words_for_people(self):
        assert (
            "10 keys per query and KV head on average"
            in SparseKConfig(k=4, window=4, sinks=2, head_shares=[[0.5, 1.5]]).attended()
        )


def test_generation_with_beams(tiny_llama):
    model = TestModel().patched(tiny_llama)
    ids = torch.randint(4, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    whole = model.generate(ids, attention_mask=mask, num_beams=3, **options)
    alone = model.generate(ids[1:, 7:], num_beams=3, **options)
    assert whole[1, 30:].tolist() == alone[0, 23:].tolist()
    cache = hf_sparse.SparseKCache(model)
    model.generate(ids[:1], **with_cache(cache), **options)
    assert isinstance(cache.layers[0], RaggedCacheLayer)
    copied = copy.deepcopy(cache.layers[0])
    assert copied.offsets is cache.layers[0].offsets and counts_of(copied.offsets) == copied.counts
