"""Adaptive baselines against plain loops: one token, one row and one head at a time, with lists for caches."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

from hf_sparse import SparseKConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.methods.sparsek.baselines import BASELINES, H2O, TOVA, AdaptiveBaseline, SnapKV
from hf_sparse.methods.sparsek.baselines.adaptive import attention, visible
from hf_sparse.methods.sparsek.budget import Budget
from hf_sparse.ops import sparsek_attention
from hf_sparse.patches import sparse_layers

HIDDEN, HEADS, GROUP, DIM = 16, 2, 2, 4
K, WINDOW, SINKS = 4, 5, 2
SLOTS = K + WINDOW + SINKS
BUDGET = {"k": K, "window": WINDOW, "sinks": SINKS}
LENGTH, SCALING = 40, 1.5
ADAPTIVE = [name for name, baseline in BASELINES.items() if baseline.block is not None]


def method(baseline) -> SparseKAttention:
    module = SparseKAttention(HIDDEN, HEADS, layer=0)
    module.add_adapter("default", SparseKConfig(**BUDGET))
    module.baseline = baseline
    return module.eval()


def inputs(batch: int = 2, length: int = LENGTH) -> dict[str, torch.Tensor]:
    return {
        "query": torch.randn(batch, HEADS * GROUP, length, DIM),
        "key": torch.randn(batch, HEADS, length, DIM),
        "value": torch.randn(batch, HEADS, length, DIM),
        "hidden_states": torch.randn(batch, length, HIDDEN),
    }


def take(tensors, rows, tokens):
    part = {}
    for name, tensor in tensors.items():
        tensor = tensor[rows]
        part[name] = tensor[:, tokens] if name == "hidden_states" else tensor[:, :, tokens]
    return part


def attend(module, tensors, valid=None, cache=None):
    if cache is not None:
        cache.begin_attention()
        cache.update(tensors["key"], tensors["value"])
    return module.attend(**tensors, valid=valid, cache=cache, scaling=SCALING)


def in_pieces(module, tensors, pieces, valid=None):
    cache = module.cache_layer()
    outputs, begin = [], 0
    for length in pieces:
        at = slice(begin, begin + length)
        part = take(tensors, slice(None), at)
        outputs.append(attend(module, part, None if valid is None else valid[:, at], cache))
        begin += length
    return torch.cat(outputs, 2), cache


def one_query(tensors, row, head, t, kept):
    """Weights `[len(kept)]` of query t over some keys, summed over the group, and its output `[GROUP, D]`."""
    key, value = tensors["key"][row, head, kept], tensors["value"][row, head, kept]
    query = tensors["query"][row, GROUP * head : GROUP * (head + 1), t]
    weights = (query @ key.T * SCALING).softmax(-1)
    return weights.sum(0), weights @ value


def simulated(tensors, row, head, rule):
    """One token after another; `rule` is 'h2o' or 'tova'. Outputs `[GROUP, T, D]` and the keys kept at the end."""
    kept: list[int] = []
    score: dict[int, float] = {}
    outputs = []
    for t in range(tensors["key"].shape[2]):
        if len(kept) == SLOTS:  # somebody leaves for the new token
            others = [j for j in kept if SINKS <= j <= t - WINDOW]
            kept.remove(min(others, key=lambda j: (score[j], -j)))
        kept.append(t)
        weights, output = one_query(tensors, row, head, t, kept)
        for j, weight in zip(kept, weights.tolist(), strict=True):
            score[j] = weight + (score.get(j, 0.0) if rule == "h2o" else 0.0)
        outputs.append(output)
    return torch.stack(outputs, 1), kept


RULES = {"h2o": H2O, "tova": TOVA}


@pytest.mark.parametrize("pieces", [None, [LENGTH], [17, 23], [10] + [1] * 30, [1] * LENGTH], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_blocks_of_one_are_the_method_token_by_token(rule, pieces):
    module, tensors = method(RULES[rule](block=1)), inputs()
    if pieces is None:
        output, cache = attend(module, tensors), None
    else:
        output, cache = in_pieces(module, tensors, pieces)
    for row in range(2):
        for head in range(HEADS):
            expected, kept = simulated(tensors, row, head, rule)
            got = output[row, GROUP * head : GROUP * (head + 1)]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            if cache is not None:
                assert cache.ordered()[3][row, head].tolist() == kept


def test_the_rules_differ_from_each_other_and_from_frozen_ones():
    tensors = inputs()
    outputs = [attend(method(baseline), tensors) for name, baseline in BASELINES.items()]
    for i, one in enumerate(outputs):
        assert all((one - other).abs().max() > 0.01 for other in outputs[:i])


def simulated_in_blocks(tensors, row, head, rule, block):
    """Every query selects by the scores that its block began with; afterwards the block's queries change them."""
    kept: list[int] = []
    score: dict[int, float] = {}
    outputs = []
    length = tensors["key"].shape[2]
    for begin in range(0, length, block):
        received: dict[int, float] = {}
        for t in range(begin, min(begin + block, length)):
            if len(kept) == SLOTS:
                others = [j for j in kept if SINKS <= j <= t - WINDOW]
                kept.remove(min(others, key=lambda j: (score[j], -j)))
            kept.append(t)
            weights, output = one_query(tensors, row, head, t, kept)
            for j, weight in zip(kept, weights.tolist(), strict=True):
                received[j] = weight + (received.get(j, 0.0) if rule == "h2o" else 0.0)
            outputs.append(output)
        for j in kept:
            score[j] = received[j] + (score.get(j, 0.0) if rule == "h2o" else 0.0)
    return torch.stack(outputs, 1), kept


@pytest.mark.parametrize("block", [3, 4, 16])
@pytest.mark.parametrize("rule", RULES)
def test_larger_blocks_select_by_the_scores_they_began_with(rule, block):
    module, tensors = method(RULES[rule](block=block)), inputs()
    steps = min(block, WINDOW)  # no longer than the window
    output, cache = in_pieces(module, tensors, [LENGTH])
    for row in range(2):
        for head in range(HEADS):
            expected, kept = simulated_in_blocks(tensors, row, head, rule, steps)
            got = output[row, GROUP * head : GROUP * (head + 1)]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            assert cache.ordered()[3][row, head].tolist() == kept
    without = attend(module, tensors)
    fed, _ = in_pieces(module, tensors, [steps] * (LENGTH // steps) + [LENGTH % steps] * (LENGTH % steps > 0))
    torch.testing.assert_close(without, output, rtol=0, atol=0)
    torch.testing.assert_close(fed, output, rtol=0, atol=2e-6)


VALID = {
    "left": torch.arange(LENGTH) >= torch.tensor([6, 30])[:, None],
    "right": torch.arange(LENGTH) < torch.tensor([25, 3])[:, None],
    "interior": torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7,
    "a row of padding": (torch.arange(2) > 0)[:, None].expand(2, LENGTH),
}


@pytest.mark.cross("values")
@pytest.mark.parametrize("pieces", [[LENGTH], [17, 23], [10] + [1] * 30], ids=str)
@pytest.mark.parametrize("padding", VALID)
@pytest.mark.parametrize("rule", RULES)
def test_blocks_of_one_with_any_padding_equal_each_row_alone(rule, padding, pieces):
    module, tensors, valid = method(RULES[rule](block=1)), inputs(), VALID[padding]
    output, _ = in_pieces(module, tensors, pieces, valid)
    assert torch.isfinite(output).all()
    for row in range(2):
        real = valid[row].nonzero().squeeze(-1)
        if len(real):
            alone = attend(module, take(tensors, slice(row, row + 1), real))
            torch.testing.assert_close(output[row : row + 1, :, real], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_larger_blocks_with_padding_keep_the_slots_and_stay_finite(name):
    module, tensors = method(BASELINES[name]), inputs()
    output, cache = in_pieces(module, tensors, [25, 1, 14], VALID["interior"])
    assert torch.isfinite(output).all()
    positions = cache.ordered()[3]
    for row, real in enumerate(VALID["interior"].sum(1).tolist()):
        for head in range(HEADS):
            held = [p for p in positions[row, head].tolist() if p >= 0]
            assert len(held) == len(set(held)) == min(real, SLOTS)
            assert {*range(SINKS), *range(real - WINDOW, real)} <= set(held)


def voted(tensors, row, head, observation, kernel):
    """SnapKV's votes of a whole prompt, each key's weights of the last queries, averaged over its neighbours."""
    length = tensors["key"].shape[2]
    votes = [0.0] * length
    for t in range(length - observation, length):
        weights, _ = one_query(tensors, row, head, t, list(range(t + 1)))
        for j in range(t + 1):
            votes[j] += float(weights[j])
    reach = kernel // 2
    return [sum(votes[max(0, j - reach) : j + reach + 1]) / kernel for j in range(length)]


@pytest.mark.parametrize(("observation", "kernel"), [(1, 1), (3, 5), (6, 3), (LENGTH, 1)])
def test_snapkv_keeps_what_the_last_queries_of_the_prompt_voted_for(observation, kernel):
    module, tensors = method(SnapKV(observation=observation, kernel=kernel)), inputs()
    output, cache = in_pieces(module, tensors, [LENGTH])
    dense = torch.nn.functional.scaled_dot_product_attention(
        tensors["query"], tensors["key"], tensors["value"], is_causal=True, scale=SCALING, enable_gqa=True
    )
    torch.testing.assert_close(output, dense, rtol=0, atol=2e-6)
    for row in range(2):
        for head in range(HEADS):
            votes = voted(tensors, row, head, observation, kernel)
            between = sorted(range(SINKS, LENGTH - WINDOW), key=lambda j: (-votes[j], j))
            expected = sorted([*range(SINKS), *between[:K], *range(LENGTH - WINDOW, LENGTH)])
            assert cache.ordered()[3][row, head].tolist() == expected


def test_snapkv_decodes_with_the_votes_of_the_prompt():
    """What was generated has no vote: once as many tokens came as the window has, nothing new stays behind it."""
    module, tensors = method(SnapKV(observation=3)), inputs()
    prompt = take(tensors, slice(None), slice(20))
    output, cache = in_pieces(module, tensors, [20] + [1] * 20)
    for row in range(2):
        for head in range(HEADS):
            votes = dict(enumerate(voted(prompt, row, head, 3, 5)))
            between = sorted(range(SINKS, 20 - WINDOW), key=lambda j: (-votes[j], j))
            kept = sorted([*range(SINKS), *between[:K], *range(20 - WINDOW, 20)])
            for t in range(20, LENGTH):
                others = [j for j in kept if SINKS <= j <= t - WINDOW]
                kept.remove(min(others, key=lambda j: (votes.get(j, 0.0), -j)))
                kept.append(t)
                _, expected = one_query(tensors, row, head, t, kept)
                got = output[row, GROUP * head : GROUP * (head + 1), t]
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
            assert cache.ordered()[3][row, head].tolist() == kept
            assert all(j < 20 for j in kept[:-WINDOW])


def test_snapkv_takes_a_text_without_a_cache_and_later_inputs_in_blocks():
    module, tensors = method(SnapKV(block=4, observation=2)), inputs()
    fed, cache = in_pieces(module, tensors, [4] * 10)
    torch.testing.assert_close(attend(module, tensors), fed, rtol=0, atol=2e-6)
    later, other = in_pieces(module, tensors, [4, LENGTH - 4])
    torch.testing.assert_close(later, fed, rtol=0, atol=2e-6)
    assert torch.equal(cache.ordered()[3], other.ordered()[3])


def test_snapkv_pools_over_positions_not_over_slots():
    votes = torch.tensor([[[[0.0, 0.0, 8.0, 1.0, 0.0]]]])
    positions = torch.tensor([[[-1, -1, 3, 9, 10]]])
    pooled = SnapKV(kernel=3).update(torch.zeros(1, 1, 5), votes, positions)
    torch.testing.assert_close(pooled[0, 0, 2:], torch.tensor([8.0, 1.0, 1.0]) / 3)


@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv"])
def test_the_attention_of_a_block_is_what_the_weights_say(name):
    """What is watched is what was attended: selection, group sum and masks are those of the operation."""
    query, key = torch.randn(1, HEADS * GROUP, 6, DIM), torch.randn(1, HEADS, 30, DIM)
    scores = torch.randn(1, HEADS, 30).round()  # with ties
    positions = torch.arange(30).expand(1, HEADS, -1)
    seen = visible(scores, torch.arange(24, 30)[None], positions, Budget(**BUDGET))
    assert (seen.sum(-1) == SLOTS).all()
    value = torch.eye(30).expand(1, HEADS, -1, -1)
    wide = torch.nn.functional.pad(key, (0, 26)), torch.nn.functional.pad(query, (0, 26))
    output = sparsek_attention(wide[1], wide[0], value, scores, **BUDGET, scaling=SCALING)  # the weights themselves
    expected = output.unflatten(1, (HEADS, GROUP)).sum(2)
    torch.testing.assert_close(attention(query, key, seen, SCALING), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: H2O(block=0), lambda: TOVA(block=1.5), lambda: SnapKV(block=-1)])
def test_a_block_has_at_least_one_token(make):
    with pytest.raises(ValueError, match=r"block must be an integer of at least 1, got"):
        make()


def test_snapkv_checks_its_options():
    with pytest.raises(ValueError, match=r"SnapKV.observation must be an integer of at least 1, got 0"):
        SnapKV(observation=0)
    with pytest.raises(ValueError, match=r"SnapKV.kernel must be an odd integer of at least 1, got 4"):
        SnapKV(kernel=4)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_cropping_is_refused(name):
    module, tensors = method(BASELINES[name]), inputs()
    _, cache = in_pieces(module, tensors, [6, 1])
    with pytest.raises(RuntimeError, match="the scores in this cache depend on all tokens so far"):
        cache.crop(-1)


def test_gradients_pass_through_an_adaptive_selection():
    module, tensors = method(H2O(block=4)).train(), inputs()
    tensors["value"].requires_grad_()
    attend(module, tensors).square().mean().backward()
    assert tensors["value"].grad.abs().amax((0, 1, 3)).min() > 0


# In a model.

IDS = torch.randint(2, 64, (3, 50), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_llama):
    return patch(tiny_llama(), SparseKConfig(k=6, window=8, sinks=2))


def using(model, baseline):
    for each in sparse_layers(model):
        each.baseline = baseline
    return model


FROZEN = ["recency", "random", "key_norm", "key_difference"]
MASK = torch.arange(50) >= torch.tensor([0, 17, 45])[:, None]


@pytest.mark.cross("values")
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left"])
@pytest.mark.parametrize("baseline", [*(BASELINES[name] for name in FROZEN), H2O(block=1), TOVA(block=1)], ids=repr)
def test_generate_equals_whole_forwards(model, baseline, padded):
    using(model, baseline)
    mask = MASK if padded else torch.ones_like(MASK)
    output = model.generate(IDS, attention_mask=mask.long(), max_new_tokens=20, do_sample=False)
    for row in range(3):
        text = torch.cat([IDS[row, mask[row]], output[row, 50:]])[None]
        with torch.no_grad():
            logits = model(text, use_cache=False).logits[0]
        assert torch.equal(logits[-21:-1].argmax(-1), output[row, 50:])


@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv"])
def test_generate_equals_steps_through_a_cache(model, name):
    using(model, BASELINES[name])
    output = model.generate(IDS, max_new_tokens=20, do_sample=False)
    with torch.no_grad():
        cache, text = DynamicCache(config=model.config), IDS
        step = IDS
        for _ in range(20):
            step = model(step, **with_cache(cache), use_cache=True).logits[:, -1:].argmax(-1)
            text = torch.cat([text, step], 1)
    assert torch.equal(output, text)
    assert cache.layers[0].positions.amin() >= 0 and int(cache.layers[0].seen[0]) == 69


@pytest.mark.parametrize("baseline", [*(BASELINES[name] for name in FROZEN), H2O(block=1), TOVA(block=1)], ids=repr)
def test_beams_carry_scores_and_memory(model, baseline):
    """The best beam's score is that of a whole forward over its text."""
    using(model, baseline)
    output = model.generate(
        IDS[:1], num_beams=4, max_new_tokens=20, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        logits = model(output.sequences, use_cache=False).logits[0, 49:-1].log_softmax(-1)
    total = logits.gather(-1, output.sequences[0, 50:, None]).sum()
    torch.testing.assert_close(output.sequences_scores[0], total / 20, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("baseline", [BASELINES[name] for name in FROZEN], ids=FROZEN)
@pytest.mark.parametrize("chunks", [[20, 30], [1, 2, 30, 1, 16]], ids=str)
def test_frozen_baselines_are_exact_in_chunks(model, baseline, chunks):
    using(model, baseline)
    cache, parts = None, []
    with torch.no_grad():
        for part in IDS.split(chunks, 1):
            output = model(part, **with_cache(cache), use_cache=True)
            cache = cache_of(output)
            parts.append(output.logits)
        whole = model(IDS, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_within_the_slots_every_baseline_is_the_base_model(tiny_llama, name):
    base, model = tiny_llama(), using(patch(tiny_llama(), SparseKConfig(k=30, window=20, sinks=2)), BASELINES[name])
    with torch.no_grad():
        output, expected = model(IDS, use_cache=False).logits, base(IDS).logits
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["h2o", *(pytest.param(name, marks=pytest.mark.full) for name in ("key_difference", "snapkv"))]
)
def test_decoding_steps_compile_once(model, name):
    using(model, BASELINES[name])
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    options = {"attention_mask": MASK.long(), "max_new_tokens": 20, "do_sample": False}
    with torch._dynamo.config.patch(error_on_recompile=True):
        static = model.generate(IDS, cache_implementation="static", compile_config=config, **options)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(static, model.generate(IDS, **options))
    torch._dynamo.reset()


def test_the_oracle_cannot_generate(model):
    with pytest.raises(ValueError, match="the oracle selects by the attention of queries to come"):
        using(model, BASELINES["oracle"]).generate(IDS, max_new_tokens=2, do_sample=False)


def test_a_new_adaptive_baseline_needs_an_update_alone(model):
    class Received(AdaptiveBaseline):
        def update(self, scores, weights, positions):
            return weights.amax(2)

    logits = using(model, Received(block=4))(IDS, use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert (logits - using(model, H2O(block=4))(IDS, use_cache=False).logits).abs().max() > 0.01
