"""The state of a model is equal as long as a recording of its forward would do what the forward does."""

import copy
import weakref

import pytest
import torch
from torch import nn

from hf_sparse import SparseKConfig, patch
from hf_sparse.methods.sparsek.known_layer import Scoring, known_layer
from hf_sparse.patches import sparse_layers
from hf_sparse.patches.model_state import ReadMemory, state_of


@pytest.fixture
def model(tiny_llama):
    return patch(tiny_llama(), SparseKConfig(k=6, window=8, sinks=2))


def state(model):
    return state_of(model, model.device, {hook.id for layer in sparse_layers(model) for hook in layer.hooks})


def test_what_a_forward_leaves_changes_nothing(model):
    before = state(model)
    assert before is not None
    with torch.no_grad():
        model(torch.ones(1, 30, dtype=torch.long), use_cache=True)
        model.generate(torch.ones(1, 30, dtype=torch.long), max_new_tokens=3)
        model.model.norm.weight.mul_(2)  # in place
    assert state(model) == before and hash(state(model)) == hash(before)


def test_what_a_forward_on_a_gpu_keeps_for_the_next_one_changes_nothing(model):
    before = state(model)
    for layer in sparse_layers(model):
        assert layer.known is None
        scoring = Scoring(torch.ones(1), None, None, (0, 0), None)
        layer.known = known_layer(layer)._replace(scoring=scoring)
    assert state(model) == before


def test_a_copy_is_another(model):
    assert state(copy.deepcopy(model)) != state(model)


def shared(model):
    model.model.layers[0].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight


def swapped(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def another_class(model):
    model.model.norm.__class__ = type("Other", (type(model.model.norm),), {})


def configured(model):
    model.config.pretraining_tp = 2


def with_a_tensor(model):
    model.model.norm.kept = torch.ones(1)


def with_a_part_of_a_tensor(model):
    norm = model.model.norm
    norm.kept = torch.ones(2)
    before = state(model)
    norm.kept = norm.kept[:1]
    assert state(model) != before


def without_a_bias(model):
    model.model.norm.register_parameter("bias", None)


def set_before_the_rest(model):
    """Set an attribute before `nn.Module.__init__`."""

    class Early(nn.Module):
        def __init__(self, number):
            self.number = number
            super().__init__()

    model.model.early = Early(2)
    before = state(model)
    model.model.early.number = 3
    assert state(model) != before


@pytest.mark.parametrize(
    "change",
    [
        shared,
        swapped,
        another_class,
        configured,
        with_a_tensor,
        with_a_part_of_a_tensor,
        without_a_bias,
        set_before_the_rest,
    ],
)
def test_changes_are_seen(model, change):
    before = state(model)
    change(model)
    assert state(model) not in (before, None)


def test_a_forward_replaced_for_all_instances(model, monkeypatch):
    before = state(model)
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, states: states)
    assert state(model) not in (before, None)


def hook(model):
    model.model.norm.register_forward_hook(lambda *_: None)


def hook_before(model):
    model.model.norm.register_forward_pre_hook(lambda *_: None)


def compiled(model):
    model.model.norm.compile()


def elsewhere(model):
    model.model.norm.to("meta")


def of_another_kind(model):
    class Quantised(nn.Parameter):
        pass

    model.model.norm.weight = Quantised(torch.ones(32))


def without_strides(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to_sparse(), requires_grad=False)


def long_positions(model):
    model.model.rotary_emb.rope_type = {"full_attention": "longrope", "sliding_attention": "default"}


@pytest.mark.parametrize(
    "change",
    [nn.Module.train, hook, hook_before, compiled, elsewhere, of_another_kind, without_strides, long_positions],
)
def test_models_that_are_not_recorded(model, change):
    change(model)
    assert state(model) is None


def test_hooks_of_all_modules(model):
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert state(model) is None
        handle.remove()
        assert state(model) is not None


@pytest.mark.parametrize(
    "name",
    [
        "allow_tf32",
        "allow_fp16_accumulation",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
    ],
)
def test_settings_of_matrix_products(model, name):
    matmul = torch.backends.cuda.matmul
    before, setting = state(model), getattr(matmul, name)
    try:
        setattr(matmul, name, not setting)
        assert state(model) != before
    finally:
        setattr(matmul, name, setting)


def test_memory_that_is_read_is_not_kept(model):
    """And tensors can be swapped, which torch refuses for those that are weakly referred to."""
    reads = ReadMemory(model)
    assert reads.are_there()
    mlp = model.model.layers[0].mlp
    weight = weakref.ref(mlp.up_proj)
    mlp.up_proj = nn.Linear(32, 64, bias=False)
    assert weight() is None and not reads.are_there()
    reads = ReadMemory(model)
    torch.utils.swap_tensors(mlp.up_proj.weight, nn.Parameter(torch.ones(64, 32)))
    assert not reads.are_there()


def test_a_tensor_that_is_no_parameter_is_read(model):
    model.model.norm.kept = torch.ones(2)
    reads = ReadMemory(model)
    assert reads.are_there()
    model.model.norm.kept = torch.ones(2)
    assert not reads.are_there()
    del model.model.norm.kept
    assert not reads.are_there()


@pytest.mark.parametrize("change", [without_a_bias, elsewhere, of_another_kind, without_strides])
def test_memory_that_cannot_be_said_to_be_there(model, change):
    reads = ReadMemory(model)
    model.model.norm.register_parameter("bias", nn.Parameter(torch.ones(32)))
    assert reads.are_there() == (change is None)
    reads = ReadMemory(model)
    change(model)
    assert not reads.are_there()
