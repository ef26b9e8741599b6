"""A patched model's forward in every form: whole, in chunks, token by token, padded, in beams, with its cache."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.cache_utils import DynamicLayer

from hf_sparse import SparsefinderConfig, SparseKCache, SparseKConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.methods.sparsek import SparseKCacheLayer
from hf_sparse.patches import sparse_layers, unpatch

pytestmark = pytest.mark.versions

BUDGET = {"k": 6, "window": 8, "sinks": 2}
LENGTH = 60
IDS = torch.randint(2, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_llama):
    return patch(tiny_llama(), SparseKConfig(**BUDGET, position_slope=1e-3))


@torch.no_grad()
def whole(model, ids=IDS, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_chunks(model, chunks, ids=IDS, mask=None, cache=None):
    position = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    parts, begin = [], 0
    for length in chunks:
        end = begin + length
        output = model(
            ids[:, begin:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if position is None else position[:, begin:end],
            **with_cache(cache),
            use_cache=True,
        )
        parts.append(output.logits)
        cache, begin = cache_of(output), end
    return torch.cat(parts, 1), cache


CHUNKS = {
    "token by token": [1] * LENGTH,
    "prefill and decode": [25] + [1] * 35,
    "short prefill": [3] + [1] * 57,
    "two halves": [30, 30],
    "odd pieces": [1, 2, 17, 1, 1, 30, 8],
    "large then small": [50, 3, 7],
}


@pytest.mark.parametrize("chunks", CHUNKS)
def test_any_split_equals_one_forward_at_every_position(model, chunks):
    logits, cache = in_chunks(model, CHUNKS[chunks])
    torch.testing.assert_close(logits, whole(model), rtol=1e-5, atol=1e-5)
    assert all(type(layer) is SparseKCacheLayer for layer in cache.layers)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 8))])
def test_repeated_tokens_are_told_apart_by_their_order(tiny_llama, seed):
    """In the first layer every occurrence of a token has the same score, in a prefill and in a step alike."""
    torch.manual_seed(seed)
    model = patch(tiny_llama(), SparseKConfig(**BUDGET))
    ids = torch.randint(2, 20, (3, LENGTH))
    expected = whole(model, ids)
    for chunks in ([25] + [1] * 35, [30, 30], [1] * LENGTH):
        logits, _ = in_chunks(model, chunks, ids)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_all_that_changes_the_outcome_is_noticed(model, tiny_llama):
    """The tolerances above mean something: another budget or another scorer is far away."""
    expected = whole(model)
    assert (whole(patch(tiny_llama(), SparseKConfig(**{**BUDGET, "k": 5}))) - expected).abs().max() > 0.1
    with torch.no_grad():
        sparse_layers(model)[0].sparsek_scorer["default"].weight.normal_()
    assert (whole(model) - expected).abs().max() > 0.1


MASKS = {
    "left": torch.arange(LENGTH) >= torch.tensor([0, 17, 45])[:, None],
    "right": torch.arange(LENGTH) < torch.tensor([LENGTH, 31, 9])[:, None],
    "interior": torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6,
}


@pytest.mark.cross("values")
@pytest.mark.parametrize("chunks", [[LENGTH], [20, 40], [20, 1, 1, 38], [1] * LENGTH], ids=len)
@pytest.mark.parametrize("padding", MASKS)
def test_padding_anywhere_equals_each_row_alone(model, padding, chunks):
    mask = MASKS[padding].long()
    logits, _ = in_chunks(model, chunks, mask=mask)
    for row in range(3):
        real = MASKS[padding][row]
        alone = whole(model, IDS[row : row + 1, real])
        torch.testing.assert_close(logits[row : row + 1, real], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", MASKS)
def test_thirty_steps_after_padding_equal_each_row_alone(model, padding):
    more = torch.randint(2, 64, (3, 30), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([IDS, more], 1)
    mask = torch.cat([MASKS[padding], torch.ones(3, 30, dtype=torch.bool)], 1)
    logits, _ = in_chunks(model, [LENGTH] + [1] * 30, ids, mask.long())
    for row in range(3):
        alone = whole(model, ids[row : row + 1, mask[row]])
        torch.testing.assert_close(logits[row, -30:], alone[0, -30:], rtol=1e-5, atol=1e-5)


def test_a_left_padded_batch_generates_what_each_row_generates_alone(model):
    mask = MASKS["left"].long()
    together = model.generate(IDS, attention_mask=mask, max_new_tokens=30, do_sample=False)
    for row in range(3):
        ids = IDS[row : row + 1, MASKS["left"][row]]
        alone = model.generate(ids, max_new_tokens=30, do_sample=False)
        assert torch.equal(together[row, LENGTH:], alone[0, ids.shape[1] :])


@pytest.mark.parametrize("padding", ["left", "interior"])
def test_training_with_padding_equals_each_row_alone(model, padding):
    model.train()
    mask = MASKS[padding]
    position = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = whole(model, attention_mask=mask.long(), position_ids=position)
    for row in range(3):
        alone = whole(model, IDS[row : row + 1, mask[row]])
        torch.testing.assert_close(logits[row : row + 1, mask[row]], alone, rtol=1e-5, atol=1e-5)


def test_a_mask_of_ones_is_no_mask(model):
    assert torch.equal(whole(model, attention_mask=torch.ones_like(IDS)), whole(model))


# generate


def test_greedy_generation_follows_the_forward(model):
    tokens = model.generate(IDS, max_new_tokens=40, do_sample=False)
    logits = whole(model, tokens)
    assert torch.equal(logits[:, LENGTH - 1 : -1].argmax(-1), tokens[:, LENGTH:])
    assert len(tokens[:, LENGTH:].unique()) > 5


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_scores_are_those_of_a_replay(model, beams):
    output = model.generate(
        IDS,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=25,
        do_sample=False,
        length_penalty=1.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    logits, _ = in_chunks(model, [LENGTH] + [1] * 24, output.sequences)
    new = output.sequences[:, LENGTH:]
    chosen = logits[:, LENGTH - 1 :].log_softmax(-1).gather(-1, new[..., None]).squeeze(-1)
    torch.testing.assert_close(output.sequences_scores, chosen.mean(-1), rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3 * beams


def test_sampled_sequences_follow_the_uncached_forward(model):
    mask = MASKS["left"].long()
    outcomes = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outcomes.append(
            model.generate(
                IDS,
                attention_mask=mask,
                do_sample=True,
                num_return_sequences=3,
                max_new_tokens=20,
                use_cache=use_cache,
            )
        )
    assert torch.equal(*outcomes)
    assert len({tuple(row) for row in outcomes[0][:, LENGTH:].tolist()}) == 9


class _Watch(LogitsProcessor):
    """Called once a step: notes the bytes of the cache."""

    def __init__(self, cache):
        self.cache, self.seen = cache, []

    def __call__(self, input_ids, scores):
        layers = self.cache.layers
        self.seen.append([(layer.nbytes, layer.keys.untyped_storage().nbytes()) for layer in layers])
        return scores


def test_generation_keeps_the_kv_bytes_constant(model):
    cache = DynamicCache(config=model.config)
    watch = _Watch(cache)
    model.generate(
        IDS[:, :4],
        **with_cache(cache),
        max_new_tokens=100,
        do_sample=False,
        logits_processor=LogitsProcessorList([watch]),
    )
    slots = sum(BUDGET.values())
    bytes_of_keys = 3 * 2 * slots * 8 * 4
    assert len(watch.seen) == 100
    assert all(step == [(2 * bytes_of_keys, bytes_of_keys)] * 2 for step in watch.seen)
    assert cache.get_seq_length() == 103


def test_generation_goes_on_with_a_returned_cache(model):
    first = model.generate(IDS, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    longer = model.generate(first.sequences, **with_cache(cache_of(first)), max_new_tokens=10, do_sample=False)
    assert torch.equal(longer, model.generate(IDS, max_new_tokens=20, do_sample=False))


def test_a_cache_without_a_configuration_grows_as_layers_ask(model):
    logits, cache = in_chunks(model, [20, 40], cache=DynamicCache())
    torch.testing.assert_close(logits, whole(model), rtol=1e-5, atol=1e-5)
    assert [type(layer) for layer in cache.layers] == [SparseKCacheLayer] * 2


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_static_cache_gets_our_slots_too(model, padding):
    mask = MASKS[padding].long() if padding in MASKS else torch.ones_like(IDS)
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 20)
    static = model.generate(IDS, attention_mask=mask, **with_cache(cache), max_new_tokens=20, do_sample=False)
    assert [type(layer) for layer in cache.layers] == [SparseKCacheLayer] * 2
    assert torch.equal(static, model.generate(IDS, attention_mask=mask, max_new_tokens=20, do_sample=False))


def test_some_layers_dense_with_padding(tiny_llama):
    """The dense layer comes after a sparse one, and needs the whole padding mask at every step."""
    model = patch(tiny_llama(), SparseKConfig(**BUDGET, layers=[0]))
    mask = MASKS["left"].long()
    logits, cache = in_chunks(model, [20, 20] + [1] * 20, mask=mask)
    assert [type(layer).__name__ for layer in cache.layers] == ["SparseKCacheLayer", "DynamicLayer"]
    for row in range(3):
        alone = whole(model, IDS[row : row + 1, MASKS["left"][row]])
        torch.testing.assert_close(logits[row, MASKS["left"][row]], alone[0], rtol=1e-5, atol=1e-5)


class _Stream:
    """Does what a stream of an accelerator does, where there is none."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def wait_stream(self, other):
        return None


def test_an_offloaded_cache(model, monkeypatch):
    cache = DynamicCache(config=model.config, offloading=True)
    cache.prefetch_stream = _Stream()
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: _Stream())
    moves = []
    each = SparseKCacheLayer._each
    monkeypatch.setattr(
        SparseKCacheLayer, "_each", lambda layer, change: (moves.append(layer.in_attention), each(layer, change))
    )
    offloaded = model.generate(IDS, **with_cache(cache), max_new_tokens=10, do_sample=False)
    assert torch.equal(offloaded, model.generate(IDS, max_new_tokens=10, do_sample=False))
    assert moves == [False] * 20  # each of two layers after each of ten forwards, never before its attention


def test_a_cache_layer_of_another_kind_is_refused(model):
    """As those of `cache_implementation="quantized"`, whose packages are not here."""
    cache = DynamicCache(config=model.config)
    cache.layers = [type("TheirLayer", (DynamicLayer,), {})() for _ in cache.layers]
    with pytest.raises(ValueError, match=r"empty cache; layer 0 is a TheirLayer: generate without this cache$"):
        model.generate(IDS, **with_cache(cache), max_new_tokens=2)


# A cache of one's own.


def test_a_chat_of_three_turns_equals_one_text(model):
    cache = SparseKCache(model)
    text = IDS[:1, :20]
    for turn in (1, 2, None):
        ones = torch.ones_like(text)  # the model says the pad token too
        answer = model.generate(text, attention_mask=ones, **with_cache(cache), max_new_tokens=12, do_sample=False)
        if turn:
            text = torch.cat([answer, IDS[turn : turn + 1, :25]], 1)
    logits = whole(model, answer)
    at = answer.shape[1] - 12
    assert torch.equal(logits[:, at - 1 : -1].argmax(-1), answer[:, at:])
    assert cache.get_seq_length() == answer.shape[1] - 1


def test_turns_of_different_lengths_in_one_batch(model):
    """Each turn is padded on the left; every row goes on as it would alone."""
    generator = torch.Generator().manual_seed(5)
    lengths = [[20, 9, 14], [3, 17, 8]]
    cache, ids, mask = SparseKCache(model), torch.empty(3, 0, dtype=torch.int64), torch.empty(3, 0, dtype=torch.int64)
    alone = [torch.empty(1, 0, dtype=torch.int64) for _ in range(3)]
    for turn in lengths:
        new = torch.randint(2, 64, (3, max(turn)), generator=generator)
        real = torch.arange(max(turn)) >= max(turn) - torch.tensor(turn)[:, None]
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, real.long()], 1)
        output = model.generate(ids, attention_mask=mask, **with_cache(cache), max_new_tokens=10, do_sample=False)
        for row in range(3):
            prompt = torch.cat([alone[row], new[row : row + 1, real[row]]], 1)
            alone[row] = model.generate(prompt, max_new_tokens=10, do_sample=False)
            assert torch.equal(output[row, -10:], alone[row][0, -10:])
        mask = torch.cat([mask, torch.ones(3, 10, dtype=torch.int64)], 1)
        ids = output


def test_bytes_of_the_cache(model, tiny_llama):
    cache = SparseKCache(model)
    assert cache.nbytes == 0 and cache.is_compileable
    in_chunks(model, [LENGTH], cache=cache)
    of_a_layer = 2 * 3 * 2 * sum(BUDGET.values()) * 8 * 4
    assert cache.nbytes == 2 * of_a_layer
    cache.reset()
    logits, _ = in_chunks(model, [30, 30], cache=cache)
    torch.testing.assert_close(logits, whole(model), rtol=1e-5, atol=1e-5)
    assert cache.nbytes == 2 * of_a_layer

    partly = patch(tiny_llama(), SparseKConfig(**BUDGET, layers=[1]))
    cache = SparseKCache(partly)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "SparseKCacheLayer"]
    assert not cache.is_compileable
    in_chunks(partly, [LENGTH], cache=cache)
    assert cache.nbytes == of_a_layer + 2 * 3 * 2 * LENGTH * 8 * 4


def test_a_copied_cache_shares_nothing(model):
    """One prefix, several continuations."""
    _, prefix = in_chunks(model, [40], cache=SparseKCache(model))
    for _ in range(2):
        output = model(IDS[:, 40:], **with_cache(copy.deepcopy(prefix)))
        torch.testing.assert_close(output.logits, whole(model)[:, 40:], rtol=1e-5, atol=1e-5)


def test_a_cache_for_a_dense_model_is_refused(model, tiny_llama):
    with pytest.raises(TypeError, match="expected a patched model, or a PeftModel of one, got Sequential"):
        SparseKCache(torch.nn.Sequential(model))
    with pytest.raises(TypeError, match="expected a patched model, or a PeftModel of one, got str"):
        SparseKCache("my-adapter")
    with pytest.raises(ValueError, match="no attention of the model is sparse now: patch it"):
        SparseKCache(tiny_llama())
    sparse_layers(model)[0].enable_adapters(False)
    sparse_layers(model)[1].enable_adapters(False)
    with pytest.raises(ValueError, match="no attention of the model is sparse now"):
        SparseKCache(model)


def test_a_base_with_eager_attention(tiny_llama):
    eager, sdpa = (tiny_llama(attn_implementation=name) for name in ("eager", "sdpa"))
    for model in (eager, sdpa):
        patch(model, SparseKConfig(**BUDGET))
    for ours, theirs in zip(sparse_layers(eager), sparse_layers(sdpa), strict=True):
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(whole(eager), whole(sdpa), rtol=1e-5, atol=1e-5)
    unpatch(eager)
    assert eager.config._attn_implementation == "eager"


def test_lookup_decoding_within_the_budget(tiny_llama):
    ids = IDS[:1, :8].repeat(1, 3)  # repeated text, so that guesses are made, and some are wrong
    model = patch(tiny_llama(), SparseKConfig(k=30, window=30, sinks=2))
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=3), expected)


# Refusals.


def test_assisted_decoding_past_the_budget_is_refused(model, tiny_llama):
    message = "keys were evicted for good, so it cannot be cropped|requires a cache that can be cropped"
    with pytest.raises((RuntimeError, ValueError), match=message):
        model.generate(IDS[:1], max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)


def test_a_static_cache_needs_every_layer_patched(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET, layers=[0]))
    with pytest.raises(ValueError, match=r"a static cache needs every full-attention layer patched.*`layers`"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")


def test_a_mask_that_changes_its_mind_is_refused(model):
    """A row that ended early has been fed padding as real tokens; masking that later would come too late."""
    _, cache = in_chunks(model, [30])
    mask = torch.ones_like(IDS)
    mask[1, 25:30] = 0
    with pytest.raises(ValueError, match=r"\[30, 25, 30\] real tokens .* a mask cannot be changed later"):
        model(IDS[:, 30:], attention_mask=mask, **with_cache(cache))


def test_a_mask_that_forgets_the_padding_is_refused(model):
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[0, :5] = 0
    cache = cache_of(model(IDS[:, :20], attention_mask=mask[:, :20]))
    for later in (None, torch.ones_like(mask)):
        with pytest.raises(ValueError, match=r"\[20, 20, 20\] real tokens .* \[15, 20, 20\]"):
            model(IDS[:, 20:24], attention_mask=later, **with_cache(cache))


def test_crop_after_padding_on_the_right_is_refused(model):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    cache = cache_of(model(IDS[:2, :12], attention_mask=mask))
    with pytest.raises(RuntimeError, match="padding after its first real token"):
        cache.crop(-2)
    left = cache_of(model(IDS[:2, :12], attention_mask=mask.flip(1)))
    left.crop(-2)
    assert left.layers[0].seen.tolist() == [6, 10]


def test_the_cache_of_another_model_is_refused(model, tiny_llama):
    other = patch(tiny_llama(), SparseKConfig(k=2, window=12, sinks=2))
    cache = cache_of(model(IDS[:, :40]))
    with pytest.raises(ValueError, match="another adapter"):
        other(IDS[:, 40:41], **with_cache(cache))
    copied, later = copy.deepcopy((model, cache))
    assert copied(IDS[:, 40:41], **with_cache(later)).logits.shape == (3, 1, 64)


def test_a_cache_of_dense_keys_is_refused(model, tiny_llama):
    _, cache = in_chunks(tiny_llama(), [20])
    with pytest.raises(ValueError, match=r"DynamicLayer that holds dense keys.*start a new cache after switching"):
        model(IDS[:, 20:], **with_cache(cache))


def test_a_sparse_cache_in_a_dense_model_is_refused(model):
    _, cache = in_chunks(model, [20])
    unpatch(model)
    with pytest.raises(RuntimeError, match=r"KV slots of sparse attention.*start a new cache"):
        model(IDS[:, 20:21], **with_cache(cache))


def test_the_cache_of_an_encoder_and_decoder_is_refused(model):
    with pytest.raises(ValueError, match="sparse attention cannot use a EncoderDecoderCache; pass no cache"):
        model(IDS, **with_cache(EncoderDecoderCache(DynamicCache(), DynamicCache())))


def test_a_mask_of_four_dimensions_is_refused(model):
    mask = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"takes a padding mask \[B, T\], got .*\(3, 1, 60, 60\)"):
        whole(model, attention_mask=mask)


METHODS = {
    "slots": SparseKConfig(**BUDGET),
    "slots of heads": SparseKConfig(**BUDGET, head_shares=[[0.5, 1.5], [1.2, 0.8]]),
    "all keys": SparsefinderConfig(predictor="bound"),
}


@pytest.mark.parametrize("first", [0, 6, 30])
@pytest.mark.parametrize("kind", ["ordinary", "static", "made before"])
@pytest.mark.parametrize("method", METHODS)
def test_a_refused_forward_leaves_the_cache_as_it_was(tiny_llama, method, kind, first):
    model = patch(tiny_llama(), METHODS[method])
    make = {
        "ordinary": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=LENGTH),
        "made before": lambda: SparseKCache(model),
    }
    cache = make[kind]()
    if first:
        in_chunks(model, [first], cache=cache)
    for new in (1, 5):
        mask = torch.ones(3, 1, new, LENGTH, dtype=torch.bool)
        with torch.no_grad(), pytest.raises(ValueError, match="takes a padding mask"):
            model(IDS[:, first : first + new], attention_mask=mask, **with_cache(cache))
        assert int(cache.get_seq_length()) == first
    tail = IDS[:, first : first + 7]
    with torch.no_grad():
        found = [model(part, **with_cache(cache)).logits for part in (tail[:, :5], tail[:, 5:6], tail[:, 6:])]
    expected = whole(model, IDS[:, : first + 7])[:, first:]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_does_not_fit_leaves_the_cache_empty(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET, pin_prompt=-1))
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="cannot hold its 20 tokens"):
        model(IDS[:, :20], **with_cache(cache))
    found, _ = in_chunks(model, [5, 1], cache=cache)
    torch.testing.assert_close(found, whole(model, IDS[:, :6]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [LENGTH - 20, LENGTH + 20])
@pytest.mark.parametrize("caching", [False, True])
def test_a_mask_of_another_length_is_refused(model, columns, caching):
    mask = torch.ones(3, columns, dtype=torch.long)
    mask[:, :5] = 0
    with pytest.raises(ValueError, match=f"a column for each of {LENGTH} tokens, got {columns}"):
        model(IDS, attention_mask=mask, use_cache=caching)


def test_a_mask_of_fewer_columns_than_new_tokens_is_refused(model):
    cache = SparseKCache(model)
    model(IDS[:, :20], **with_cache(cache))
    for mask in (torch.ones(3, 10, dtype=torch.long), torch.arange(10).expand(3, -1).gt(4).long()):
        with pytest.raises(ValueError, match=f"a column for each of {LENGTH - 20} tokens, got 10"):
            model(IDS[:, 20:], attention_mask=mask, **with_cache(cache))


@pytest.mark.full
def test_compiled_without_mask_and_cache(tiny_llama):
    """transformers cannot see then whether sequences are packed."""
    model = patch(tiny_llama(num_hidden_layers=1), SparseKConfig(**BUDGET))  # one layer: tracing takes seconds
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="unless it gets an attention_mask"):
        compiled(IDS, use_cache=False)
    found = compiled(IDS, use_cache=False, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, whole(model), rtol=1e-5, atol=1e-5)


def test_attention_matrices_are_refused(model):
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        model(IDS, output_attentions=True)


def test_generating_in_train_mode_is_as_in_eval_mode(model):
    """As GRPO and every online trainer do."""
    expected = model.generate(IDS, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.train().generate(IDS, max_new_tokens=10, do_sample=False), expected)
    assert model.training


def test_a_cache_of_a_training_forward_is_not_continued(model):
    cache = cache_of(model.train()(IDS[:, :20]))
    for mode in (True, False):
        with torch.set_grad_enabled(mode), pytest.raises(ValueError, match=r"use torch.no_grad\(\) before generating"):
            model.train(mode)(IDS[:, 20:21], **with_cache(cache))


@torch.no_grad()
def test_a_cache_of_inference_mode_is_continued(model):
    expected = model(IDS[:, :45]).logits[:, 40:]
    for change in (lambda cache: None, lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2])), copy.deepcopy):
        with torch.inference_mode():
            cache = cache_of(model(IDS[:, :40]))
            cache = change(cache) or cache
        steps = [model(IDS[:, t : t + 1], **with_cache(cache)).logits for t in range(40, 45)]
        torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("is_short", [True, False])
def test_a_layer_makes_the_cache_layers_of_all_others(is_short, tiny_llama, monkeypatch):
    """The first one does, or the second one of a long text, for which the GPU has nothing to do before the first.

    They belong to the call until they are filled; a cache that was made before keeps its own.
    """
    if not is_short:
        monkeypatch.setattr("hf_sparse.patches.interface._MOST_PRODUCTS", 0)
    model = patch(tiny_llama(num_hidden_layers=4), SparseKConfig(**BUDGET))
    made = []

    def look(module, args, output):
        made.append([getattr(layer, "call", None) is not None for layer in cache.layers])

    modules = [layer.self_attn for layer in model.model.layers]
    handles = [module.register_forward_hook(look) for module in modules]
    cache = DynamicCache(config=model.config)
    model(IDS, **with_cache(cache))
    layers = len(modules)
    later = [[False] * (number + 1) + [True] * (layers - number - 1) for number in range(layers)]
    assert made == (later if is_short else [[False] * layers, *later[1:]])
    assert all(isinstance(layer, SparseKCacheLayer) and layer.get_seq_length() == LENGTH for layer in cache.layers)
    made.clear()
    cache = SparseKCache(model)
    before = list(cache.layers)
    model(IDS, **with_cache(cache))
    assert cache.layers == before and not any(map(any, made))
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_layers_that_are_added_later_get_cache_layers_too(tiny_llama):
    model = patch(tiny_llama(), SparseKConfig(**BUDGET, layers=[0]), adapter="one")
    model(IDS)
    patch(model, SparseKConfig(**BUDGET), adapter="all")
    for layer in sparse_layers(model):
        layer.set_adapter("all")
    cache = cache_of(model(IDS))
    assert all(isinstance(layer, SparseKCacheLayer) for layer in cache.layers)
