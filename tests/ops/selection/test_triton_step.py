"""A decoding step in one kernel against the steps that it is made of: the same slots bit by bit, the same attention."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sparse import SparseKCache, SparseKConfig, patch
from hf_sparse._compat import with_cache
from hf_sparse.methods.sparsek import attention, step
from hf_sparse.methods.sparsek.baselines import Recency
from hf_sparse.ops.selection import linear_scores as linear
from hf_sparse.ops.selection import ragged
from hf_sparse.ops.selection import slots as reference
from hf_sparse.ops.selection import step as operator
from hf_sparse.ops.selection.triton import step as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16
WINDOW, SINKS, COLUMNS = 5, 2, 70


@pytest.fixture
def plain(monkeypatch):
    """Makes the reference use PyTorch, on a GPU too."""
    monkeypatch.setattr(reference, "_TRITON", False)
    monkeypatch.setattr(linear, "_TRITON", False)


class Slots:
    """The state of a cache layer, and one step of it as the reference takes it."""

    def __init__(self, batch: int, heads: int, number: int, dim: int, dtype: torch.dtype) -> None:
        self.keys, self.values = torch.zeros(2, batch, heads, number, dim, dtype=dtype, device=DEVICE)
        self.positions = torch.full((batch, heads, number), -1, device=DEVICE)
        self.scores = torch.zeros(batch, heads, number, device=DEVICE)
        self.seen = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        self.padded_late = torch.zeros(batch, dtype=torch.bool, device=DEVICE)
        self.total = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values, self.scores, self.positions, self.seen, self.padded_late, self.total]

    def step(self, query, key, value, states, weight, slope, valid, *, slopes, scaling):
        scores = states.double() if weight is None else linear.linear_scores(states, weight)
        per_token = slopes.position_slope + (0 if slope is None else slope.double()[:, None] / slopes.tokens)
        scores = (scores + linear.slope_positions(self.seen, slopes.length)[:, None, None] * per_token).float()
        if valid is not None:
            self.padded_late |= ~valid & (self.seen > 0)
        state = (self.keys, self.values, self.scores, self.positions, self.seen)
        reference.insert_token(*state, key, value, scores, valid, window=WINDOW, sinks=SINKS)
        self.seen += 1 if valid is None else valid.long()
        self.total += 1
        doubles = (query.double(), self.keys.double(), self.values.double())
        return reference.attend_slots(*doubles, self.positions, scaling=scaling)


# batch, KV heads, query heads per KV head, slots, head size, programs, slots searched at a time
SHAPES = [
    (3, 2, 1, 11, 6, 1, 1024),
    (2, 1, 4, 20, 80, 1, 16),
    (1, 2, 3, 36, 64, 256, 32),  # split over programs
    (2, 1, 8, 25, 16, 6, 16),
    (1, 1, 20, 17, 32, 256, 1024),
]
KINDS = [
    ("normal", False, torch.float32),
    ("ties", True, HALF),
    ("rising", False, HALF),
    ("rising logarithm", False, HALF),
    ("given", True, torch.float32),
]


@pytest.mark.cross("values")
@pytest.mark.parametrize("kind, padded, dtype", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_is_that_of_the_reference(plain, monkeypatch, poisoned_memory, shape, dtype, padded, kind):
    batch, heads, group, number, dim, programs, chunk = shape
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    monkeypatch.setattr(kernels, "_CHUNK", chunk)
    monkeypatch.setattr(kernels, "_COLUMNS", 32)
    length = number + 6
    ours, theirs = Slots(batch, heads, number, dim, dtype), Slots(batch, heads, number, dim, dtype)
    # As a model hands them over: a view with heads and tokens swapped.
    query = torch.randn(batch, length, heads * group, dim, device=DEVICE).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, batch, length, heads, dim, device=DEVICE).to(dtype).transpose(2, 3)
    states = torch.randn(batch, length, COLUMNS, device=DEVICE).to(dtype) * 3 + 1
    if kind == "ties":
        states = states[:, :3].repeat(1, length // 3 + 1, 1)[:, :length].contiguous()
    weight = None if kind == "given" else torch.randn(heads, COLUMNS, device=DEVICE)
    given = torch.randn(batch, heads, length, device=DEVICE).round()
    rising = kind.startswith("rising")
    slope = torch.randn(heads, device=DEVICE) if rising else None
    valid = torch.rand(batch, length, device=DEVICE) < 0.8
    slopes = linear.Slopes(0.013 if rising else 0.0, 256, 9 if kind == "rising logarithm" else 0)
    options = {"slopes": slopes, "scaling": 0.3}
    kernel = None
    for t in range(length):
        new = [tensor[:, :, t : t + 1] for tensor in (query, key, value)]
        new.append(given[:, :, t : t + 1].contiguous() if weight is None else states[:, t : t + 1])
        real = valid[:, t] if padded else None
        if kernel is None:
            more = {"masked": padded, "window": WINDOW, "sinks": SINKS}
            kernel = kernels.StepKernel(ours.tensors(), *new[:3], weight, slope, **more, **options)
        output = kernel(*new, weight, slope, real)
        expected = theirs.step(*new, weight, slope, real, **options)
        for mine, other in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(mine, other), t
        assert output.dtype == dtype and output.shape == new[0].shape and output.is_contiguous()
        error = (output.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < (2e-6 if dtype == torch.float32 else 1e-2), t
    assert not kernel.scratch[2].any(), "the counters did not return to zero"
    assert padded or (ours.positions >= 0).all(), "the slots never filled up"


@pytest.mark.parametrize("implementation", ["kernel", "plain"])
def test_the_operator_of_compiled_code_takes_the_same_steps(plain, monkeypatch, implementation):
    """With padding and without, and with the count of tokens left to others in the last steps."""
    batch, heads, number, dim = 2, 2, 11, 16
    monkeypatch.setattr(operator, "has_kernels", lambda *tensors: implementation == "kernel")
    ours, theirs = (Slots(batch, heads, number, dim, torch.float32) for _ in range(2))
    arrived = torch.zeros(batch * heads + 1, dtype=torch.int32, device=DEVICE)
    weight, slope = torch.randn(heads, COLUMNS, device=DEVICE), torch.randn(heads, device=DEVICE)
    for t in range(number + 6):
        query, key, value, states = (
            torch.randn(batch, *shape, device=DEVICE)
            for shape in ((heads * 2, 1, dim), (heads, 1, dim), (heads, 1, dim), (1, COLUMNS))
        )
        valid = torch.tensor([[True], [t % 3 > 0]], device=DEVICE) if t % 2 else None
        *state, total = ours.tensors()
        output = operator.take_step(
            query, key, value, states, weight, slope, valid, *state, arrived,
            total if t < number else None, 0.013, 256, 9, WINDOW, SINKS, 0.3,
        )  # fmt: skip
        real = None if valid is None else valid[:, 0]
        new = (query, key, value, states, weight, slope, real)
        expected = theirs.step(*new, slopes=linear.Slopes(0.013, 256, 9), scaling=0.3)
        for mine, other in zip(state, theirs.tensors(), strict=False):
            assert torch.equal(mine, other), t
        torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-6)
        assert total == min(t + 1, number) and output.is_contiguous()
    assert not arrived.any(), "the counters did not return to zero"


def test_the_operator_takes_heads_with_different_numbers_of_slots(monkeypatch):
    """Compare the kernel with plain PyTorch, until both heads have let keys go."""
    batch, dim, counts = 2, 16, (7, 19)
    offsets = ragged.offsets_of(counts, torch.device(DEVICE))

    def state():
        empty = torch.zeros(batch, sum(counts), dim, device=DEVICE)
        table = torch.zeros(batch, sum(counts), device=DEVICE)
        seen = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        positions = torch.full(table.shape, -1, device=DEVICE)
        return empty, empty.clone(), table, positions, seen, torch.zeros(batch, dtype=torch.bool, device=DEVICE)

    states_of = {"kernel": state(), "plain": state()}
    weight = torch.randn(2, COLUMNS, device=DEVICE)
    for t in range(24):
        new = [torch.randn(batch, *shape, device=DEVICE) for shape in ((4, 1, dim), (2, 1, dim), (2, 1, dim))]
        inputs = torch.randn(batch, 1, COLUMNS, device=DEVICE)
        outputs = {}
        for name, tensors in states_of.items():
            monkeypatch.setattr(operator, "has_kernels", lambda *_, takes=name == "kernel": takes)
            outputs[name] = operator.take_step(
                *new, inputs, weight, None, None, *tensors, None, None, 0.0, 256, 0, 2, 1, 0.3, offsets
            )
        for one, other in zip(*states_of.values(), strict=True):
            assert torch.equal(one, other), t
        torch.testing.assert_close(outputs["kernel"], outputs["plain"], rtol=1e-5, atol=1e-6)
    assert (states_of["plain"][3] >= 0).all(), "the slots never filled up"


@pytest.fixture
def everywhere(monkeypatch):
    """Lets a model take the kernel in the interpreter too, and counts its steps."""
    steps = []
    call = kernels.StepKernel.__call__

    def counted(self, *arguments):
        steps.append(self)
        return call(self, *arguments)

    monkeypatch.setattr(kernels.StepKernel, "__call__", counted)
    if DEVICE == "cpu":
        monkeypatch.setattr(step, "is_on_gpu", lambda query: True)
        monkeypatch.setattr(step, "has_kernels", lambda *tensors: True)
    return steps


def model(**settings):
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    budget = SparseKConfig(k=3, window=4, sinks=1, **settings)
    patched = patch(AutoModelForCausalLM.from_config(config).to(DEVICE).eval(), budget)
    with torch.no_grad():
        for name, parameter in patched.named_parameters():
            if "slope" in name:
                parameter.normal_()
    return patched


def texts(model, padded=False, turns=2, **options):
    """Two turns of two rows, or a short one that takes the kernel in each of its steps, and the cache after them."""
    ids = torch.randint(1, 101, (2, 14), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    cache = SparseKCache(model)
    options = {"do_sample": False, "disable_compile": True, "return_dict_in_generate": True, **options}
    first = model.generate(
        ids[:, :9], attention_mask=mask[:, :9], **with_cache(cache), **options, max_new_tokens=3 * turns
    )
    if turns == 1 or options.get("num_beams"):
        return first.sequences, cache
    ids, mask = torch.cat([first.sequences, ids[:, 9:]], 1), torch.cat([mask, mask.new_ones(2, 6)], 1)
    second = model.generate(ids, attention_mask=mask, **with_cache(cache), max_new_tokens=4, **options)
    return second.sequences, cache


@pytest.mark.cross("values")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "settings, options",
    [
        ({"position_slope": 0.01, "learn_slope": True}, {}),
        ({"scorer": "mlp", "learn_slope": True}, {}),
        ({}, {"num_beams": 2}),
        ({"lora_rank": 2}, {}),
        ({"head_shares": [[0.5, 1.5], [1.0, 1.0]]}, {}),
    ],
)
def test_a_model_goes_on_as_without_the_kernel(everywhere, monkeypatch, settings, options, padded):
    patched = model(**settings)
    ids, cache = texts(patched, padded, **options)
    assert everywhere, "the kernel was not used"
    with monkeypatch.context() as without:
        without.setattr(attention, "step_in_one_kernel", lambda *_: None)
        steps = len(everywhere)
        expected, other = texts(patched, padded, **options)
        assert len(everywhere) == steps
    assert torch.equal(ids, expected)
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        for name in ("positions", "seen", "padded_late", "cumulative_length"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for name in ("keys", "values", "scores"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)


def test_parameters_that_change_are_noticed(everywhere):
    patched = model(position_slope=0.01)
    ids, cache = texts(patched, turns=1)
    mask = torch.ones(2, ids.shape[1], device=DEVICE, dtype=torch.int64)
    layer, scorer = cache.layers[0], patched.model.layers[0].self_attn.sparse_attention.sparsek_scorer["default"]
    for change in (lambda: scorer.weight.data.mul_(2), lambda: setattr(scorer.weight, "data", scorer.weight.data * -1)):
        change()
        position = layer.seen[0].item()
        with torch.no_grad():
            patched(ids[:, -1:], attention_mask=torch.cat([mask, mask[:, :1]], 1), **with_cache(cache))
            state = patched.model.layers[0].input_layernorm(patched.model.embed_tokens(ids[:, -1:]))
            expected = scorer(state, torch.full_like(ids[:, -1:], position))
        at = layer.positions == position
        torch.testing.assert_close(layer.scores[at].view(2, 2), expected[..., 0])
        mask = torch.cat([mask, mask[:, :1]], 1)


def test_generation_in_train_mode_takes_the_kernel(everywhere):
    patched = model()
    texts(patched, turns=1)  # on a GPU the first call compiles kernels beside, which counts too
    everywhere.clear()
    expected, _ = texts(patched, turns=1)
    steps = len(everywhere)
    for module in patched.model.layers:
        module.self_attn.sparse_attention.train()
    ids, _ = texts(patched, turns=1)
    assert torch.equal(ids, expected) and len(everywhere) == 2 * steps > 0


def test_a_copy_of_a_cache_has_a_kernel_of_its_own(everywhere):
    patched = model()
    ids, cache = texts(patched, turns=1)
    mask = torch.ones(2, ids.shape[1] + 1, device=DEVICE, dtype=torch.int64)
    kept = [layer.keys.clone() for layer in cache.layers]
    copied = copy.deepcopy(cache)
    for other in (copied, pickle.loads(pickle.dumps(cache))):
        assert all(layer.step is None for layer in other.layers)
    with torch.no_grad():
        patched(ids[:, -1:], attention_mask=mask, **with_cache(copied))
    for layer, other, keys in zip(cache.layers, copied.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys) and not torch.equal(other.keys, keys)


@pytest.mark.parametrize("reason", ["gradients", "training", "baseline"])
def test_a_step_that_needs_more_takes_the_other_path(everywhere, reason):
    patched = model()
    ids, cache = texts(patched, turns=1)
    steps, layer = len(everywhere), patched.model.layers[0].self_attn.sparse_attention
    mask = torch.ones(2, ids.shape[1] + 1, device=DEVICE, dtype=torch.int64)
    if reason == "baseline":
        for module in patched.model.layers:
            module.self_attn.sparse_attention.baseline = Recency()
        cache, mask = SparseKCache(patched), mask[:, :2]
        with torch.no_grad():
            patched(ids[:, :1], attention_mask=mask[:, :1], **with_cache(cache))
    if reason == "training":
        layer.train()
        with pytest.raises(ValueError, match="decoding uses hard selection"):
            patched(ids[:, -1:], attention_mask=mask, **with_cache(cache))
        return
    before = cache.layers[0].cumulative_length.item()
    with torch.set_grad_enabled(reason == "gradients"):
        patched(ids[:, -1:], attention_mask=mask, **with_cache(cache))
    assert len(everywhere) == steps
    assert cache.layers[0].cumulative_length.item() == before + 1
