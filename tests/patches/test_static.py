"""A decoding step has static shapes: it compiles as a whole, once, and computes what the eager step does."""

import runpy
from pathlib import Path

import peft
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_sparse import SparseKCache, SparseKConfig, patch
from hf_sparse._compat import with_cache
from hf_sparse.core.overrides import overwrite
from hf_sparse.methods.sparsek.fixed_memory import SharedSlots
from hf_sparse.ops.stacked import places_of
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
BUDGET = {"k": 6, "window": 8, "sinks": 2}
LENGTH = 40
IDS = torch.randint(2, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))
LEFT = (torch.arange(LENGTH) >= torch.tensor([0, 17, 30])[:, None]).long()


@pytest.fixture(autouse=True)
def _nothing_is_compiled_twice():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


HEADS = [[0.5, 1.5], [1.25, 0.75]]


@pytest.fixture
def model(tiny_llama):
    return patch(tiny_llama(), SparseKConfig(**BUDGET, position_slope=1e-3))


@pytest.fixture
def by_heads(tiny_llama):
    return patch(tiny_llama(), SparseKConfig(**BUDGET, position_slope=1e-3, head_shares=HEADS))


@torch.no_grad()
def decode(model, step, steps, mask=None):
    """Logits `[B, steps, V]` of random tokens after a prompt; `step` is the model, or the model compiled."""
    cache = SparseKCache(model)
    model(IDS, attention_mask=mask, **with_cache(cache))
    tokens = torch.randint(2, 64, (3, steps), generator=torch.Generator().manual_seed(1))
    position = torch.full((3, 1), LENGTH) if mask is None else mask.sum(-1, keepdim=True)
    newest = None if mask is None else torch.ones(3, 1, dtype=torch.int64)
    parts = []
    for t in range(steps):
        token = tokens[:, t : t + 1].clone(memory_format=torch.contiguous_format)
        output = step(token, attention_mask=newest, position_ids=position + t, **with_cache(cache))
        parts.append(output.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("mask", [pytest.param(None, marks=pytest.mark.full), LEFT], ids=["full", "padded"])
@pytest.mark.parametrize("steps", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_a_thousand_compiled_steps_are_one_graph_and_equal_eager(model, mask, steps):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = decode(model, compiled, steps, mask)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert torch.equal(logits, decode(model, model, steps, mask))


def test_compiled_steps_follow_slopes_that_finetune_sets(tiny_llama):
    model = patch(tiny_llama(num_hidden_layers=1), SparseKConfig(**BUDGET, position_slope=0.2))
    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled, found = torch.compile(model, backend="eager", fullgraph=True), []
        for length in (None, 4, 16):
            overwrite([sparse_layers(model)[0].config], slope_length=length)
            found.append(decode(model, compiled, 20))
            assert torch.equal(found[-1], decode(model, model, 20))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.full  # the next one compiles the same steps from generate
def test_heads_with_budgets_of_their_own(by_heads):
    compiled = torch.compile(by_heads, backend="eager", fullgraph=True)
    logits = decode(by_heads, compiled, 60, LEFT)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(logits, decode(by_heads, by_heads, 60, LEFT))


def test_generate_compiles_heads_with_budgets_of_their_own(by_heads):
    options = {"attention_mask": LEFT, "max_new_tokens": 40, "do_sample": False}
    static = by_heads.generate(IDS, cache_implementation="static", compile_config=settings(), **options)
    assert torch.equal(static, by_heads.generate(IDS, **options))


@pytest.mark.parametrize("mask", [pytest.param(None, marks=pytest.mark.full), LEFT], ids=["full", "padded"])
def test_a_compiled_step_returns_its_logits_only(model, mask):
    """What the cache holds is written in place: a CUDA graph makes every other result anew, at every step."""
    results = []

    def backend(graph, inputs):
        results.append(len(graph.graph.output_node().args[0]))
        return graph.forward

    decode(model, torch.compile(model, backend=backend, fullgraph=True), 2, mask)
    assert results == [1]


@pytest.mark.full
def test_steps_through_autograds_tracer(model):
    """Writes in place survive being made functional."""
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(decode(model, compiled, 30, LEFT), decode(model, model, 30, LEFT), rtol=1e-5, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_slots_of_all_layers_in_one_piece_of_memory(model, mode):
    """A prefill on a GPU makes them so, and a user may compile the model then; tensors that are not made yet are."""
    with mode():
        compiled = torch.compile(model, backend="aot_eager")
        for begin in (20, 30):
            expected = SparseKCache(model)
            model(IDS[:, :begin], **with_cache(expected))
            cache = shared_copy(model, expected, begin)
            for t in range(begin, LENGTH):
                found = compiled(IDS[:, t : t + 1], **with_cache(cache)).logits
                wanted = model(IDS[:, t : t + 1], **with_cache(expected)).logits
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 1


def shared_copy(model, cache, tokens):
    """A cache with the same slots, those of all layers in one piece of memory, of which no tensor is made."""
    names = ("keys", "values", "scores", "positions", "seen", "padded_late", "cumulative_length")
    tensors = [[getattr(layer, name) for name in names] for layer in cache.layers]
    kinds = [(tensor.shape, tensor.dtype) for of_layer in tensors for tensor in of_layer]
    shared = SharedSlots(places_of(kinds), tensors[0][0].device)
    for number, of_layer in enumerate(tensors):
        torch._foreach_copy_(shared.tensors(number), of_layer)
    copied = SparseKCache(model)
    for number, layer in enumerate(copied.layers):
        layer.begin_attention()
        layer.take_shared(shared, number)
        layer.end_attention()
        layer.note_tokens(tokens)
        assert "keys" not in vars(layer)
    return copied


def settings(**changes) -> CompileConfig:
    """What `generate` uses on a GPU, made to work anywhere."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None, **changes)
    config._compile_all_devices = True
    return config


@pytest.mark.versions
@pytest.mark.parametrize(
    "rows", [slice(0, 3), pytest.param(slice(1, 2), marks=pytest.mark.full)], ids=["batch", "one row"]
)
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.full), True], ids=["full", "padded"])
def test_generate_compiles_its_steps_once(model, padded, rows):
    mask = (LEFT if padded else torch.ones_like(IDS))[rows]
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    static = model.generate(IDS[rows], cache_implementation="static", compile_config=settings(), **options)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(static, model.generate(IDS[rows], **options))


@pytest.mark.full  # the next but one compiles across turns of growing length
def test_a_longer_prompt_needs_no_other_graph(model):
    for length in (20, 40):
        model.generate(IDS[:, :length], max_new_tokens=5, cache_implementation="static", compile_config=settings())
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_beams(model):
    options = {"num_beams": 3, "max_new_tokens": 20, "do_sample": False}
    static = model.generate(IDS, cache_implementation="static", compile_config=settings(), **options)
    assert torch.equal(static, model.generate(IDS, **options))


def test_a_cache_of_ones_own_compiles_across_turns(model):
    cache, text = SparseKCache(model), IDS[:1]
    for _ in range(2):
        ones = torch.ones_like(text)
        options = {"attention_mask": ones, "max_new_tokens": 10, "do_sample": False}
        answer = model.generate(text, **with_cache(cache), compile_config=settings(), **options)
        assert torch.equal(answer, model.generate(text, **options))
        text = torch.cat([answer, IDS[1:2, :15]], 1)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.versions
@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=pytest.mark.full), 3])
def test_a_peft_model(tiny_llama, lora_rank):
    model = peft.get_peft_model(tiny_llama(), SparseKConfig(**BUDGET, lora_rank=lora_rank)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_lora." in name:
                parameter.normal_(std=0.2)
    options = {"input_ids": IDS, "max_new_tokens": 10, "do_sample": False}
    expected = model.generate(**options)
    assert torch.equal(model.generate(**with_cache(SparseKCache(model)), **options), expected)
    static = model.generate(cache_implementation="static", compile_config=settings(), **options)
    assert torch.equal(static, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_local_layers_keep_their_static_windows():
    model = patch(FAMILIES["gemma3_text"].make(), SparseKConfig(**BUDGET))
    options = {"attention_mask": LEFT, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), model.generate(IDS, **options))
    cache = SparseKCache(model)
    assert {type(layer).__name__ for layer in cache.layers} == {"SparseKCacheLayer", "DynamicSlidingWindowLayer"}
    assert torch.equal(model.generate(IDS, **with_cache(cache), **options), model.generate(IDS, **options))


def test_a_whole_text_without_gradients_is_one_graph(tiny_llama):
    """A second length makes one more, for all lengths."""
    model = patch(tiny_llama(num_hidden_layers=1), SparseKConfig(**BUDGET, position_slope=1e-3))
    with torch._dynamo.config.patch(error_on_recompile=False), torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for length in (40, 37, 29):
            ids, mask = IDS[:, :length], LEFT[:, :length]
            found, expected = (one(ids, attention_mask=mask, use_cache=False).logits for one in (compiled, model))
            torch.testing.assert_close(found[mask > 0], expected[mask > 0])
    assert counters["stats"]["unique_graphs"] == 2


def test_the_ordinary_cache_is_not_compiled(model):
    model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert not counters["stats"]
