"""In compiled decoding steps one decoder layer stands for all, in every family; the tokens are those of eager steps."""

import os
import runpy
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch._dynamo.utils import counters
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from hf_sparse import CapturedDecoding, SparsefinderConfig, SparseKConfig, patch
from hf_sparse._compat import with_cache
from hf_sparse.methods.sparsek.baselines import Recency
from hf_sparse.ops.products import has_kernel
from hf_sparse.patches import SparseCache, compiled_layers, sparse_layers
from hf_sparse.patches.shared_products import ShareProducts

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
CAUSAL = [
    pytest.param(name, marks=() if name == "llama" else pytest.mark.full)
    for name, family in FAMILIES.items()
    if family.causal and not family.local
]
BUDGET = {"k": 6, "window": 8, "sinks": 2}
IDS = torch.randint(2, 64, (2, 30), generator=torch.Generator().manual_seed(0))
OPTIONS = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(autouse=True)
def _begin_anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def played(played, monkeypatch):
    """Let `generate` with a static cache compile on the CPU too, and list the steps played."""

    def compiles(model, model_kwargs, config):
        return not config.disable_compile and config.cache_implementation == "static"

    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", compiles)
    monkeypatch.setattr(
        compiled_layers, "compiled", partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    )
    return played


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_through_one_layer_choose_the_tokens_of_eager_ones(name, played):
    """Run the first of the 7 steps of a call compiled, and play 6."""
    model = patch(FAMILIES[name].make(), SparseKConfig(**BUDGET))
    expected = model.generate(IDS, disable_compile=True, **OPTIONS)
    for _ in range(2):
        assert torch.equal(model.generate(IDS, cache_implementation="static", **OPTIONS), expected)
    # SmolLM3 has layers with rotary positions and layers without, GLM-4-MoE has layers with experts and layers without.
    kinds = 2 if name in ("smollm3", "glm4_moe") else 1
    assert len(played) == 2 * 6 and counters["stats"]["unique_graphs"] == kinds
    assert not any("forward" in vars(module) for module in model.modules())


def test_each_layer_has_its_lora_its_adapter_and_its_budget(tiny_llama, played):
    """Layers with other windows are compiled for themselves."""
    base = tiny_llama(num_hidden_layers=4)
    model = patch(base, SparseKConfig(**BUDGET, lora_rank=2, layer_shares=[0.5, 1.5, 0.5, 1.5], scorer="mlp"))
    patch(model, SparseKConfig(**BUDGET, lora_rank=2), "other")
    for layer in sparse_layers(model):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    for name in ("default", "other"):
        for layer in sparse_layers(model):
            layer.set_adapter(name)
        expected = model.generate(IDS, disable_compile=True, **OPTIONS)
        assert torch.equal(model.generate(IDS, cache_implementation="static", **OPTIONS), expected)
    assert counters["stats"]["unique_graphs"] == 3


def test_heads_with_budgets_of_their_own_and_padding(tiny_llama, played):
    mask = (torch.arange(30) >= torch.tensor([0, 11])[:, None]).long()
    shares = [[0.5, 1.5], [0.9, 0.4], [1.0, 2.0], [0.5, 1.2]]
    model = patch(tiny_llama(num_hidden_layers=4), SparseKConfig(**BUDGET, head_shares=shares))
    expected = model.generate(IDS, attention_mask=mask, disable_compile=True, **OPTIONS)
    found = model.generate(IDS, attention_mask=mask, cache_implementation="static", **OPTIONS)
    assert torch.equal(found, expected) and counters["stats"]["unique_graphs"] == 1


def test_adapters_that_are_switched_between_two_steps(tiny_llama, played):
    """Run the steps that follow by the model: what was compiled for the call does not know the new adapters."""
    model = patch(tiny_llama(num_hidden_layers=4), SparseKConfig(**BUDGET))
    LoraModel(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False), "default").eval()
    lora = [module for module in model.modules() if isinstance(module, LoraLayer)]

    class Switch(LogitsProcessor):
        def __call__(self, input_ids, scores=None):
            for layer in lora:
                layer.enable_adapters(input_ids.shape[1] < 34)
            return scores

    found = []
    for options in ({"cache_implementation": "static"}, {"disable_compile": True}):
        Switch()(IDS)
        found.append(model.generate(IDS, logits_processor=LogitsProcessorList([Switch()]), **OPTIONS | options))
    assert torch.equal(*found) and played == [0] * 3 + [1]


def test_what_compiles_is_imported_beside_the_prompt(tiny_llama, played, monkeypatch):
    """The thread begins when `generate` asks for what takes its steps, and is awaited by the first of them."""
    model, order = patch(tiny_llama(num_hidden_layers=4), SparseKConfig(**BUDGET)), []
    thread = type("Thread", (), {"join": lambda self: order.append("joined")})
    compiles = compiled_layers.compiled
    monkeypatch.setattr(compiled_layers, "importing", lambda: order.append("asked") or thread())
    monkeypatch.setattr(compiled_layers, "compiled", lambda forward: order.append("compiled") or compiles(forward))
    model.generate(IDS, cache_implementation="static", max_new_tokens=1, do_sample=False)
    assert order == ["asked"]
    model.generate(IDS, cache_implementation="static", **OPTIONS)
    assert order == ["asked", "asked", "asked", "joined", "compiled"]


def test_it_is_imported_once():
    begun = compiled_layers.importing()
    begun.join()
    assert compiled_layers.importing() is begun and "torch._inductor.compile_fx" in sys.modules


def test_a_process_that_forks_waits_for_the_imports(monkeypatch):
    """A child has none of the other threads, and would wait for the locks of their imports without end."""
    hooks, gate, is_alive = [], threading.Event(), []
    monkeypatch.setattr(os, "register_at_fork", lambda before: hooks.append(before), raising=False)

    def work(name):
        if name != "triton":
            assert gate.wait(60)
            hooks[0]()  # of a fork by what is imported
            is_alive.append(threading.current_thread().is_alive())

    monkeypatch.setattr(compiled_layers, "import_module", work)
    thread = compiled_layers.importing.__wrapped__()
    assert thread.is_alive()
    gate.set()
    hooks[0]()
    assert is_alive == [True] and not thread.is_alive()


def test_imports_that_fail_are_told_by_who_needs_them(monkeypatch):
    """When a process ends meanwhile, modules that register what to do then cannot be imported any more."""
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    monkeypatch.setattr(compiled_layers, "installed", lambda: False)
    monkeypatch.setattr(compiled_layers, "import_module", lambda name: 1 / 0)
    compiled_layers.importing.__wrapped__().join()
    assert not errors


@pytest.mark.parametrize("reason", ["baseline", "hook", "method", "off", "states"])
def test_other_models_are_compiled_as_a_whole(tiny_llama, reason):
    config = SparsefinderConfig(predictor="full") if reason == "method" else SparseKConfig(**BUDGET)
    model = patch(tiny_llama(num_hidden_layers=6), config)
    assert (compiled_layers.compiled_layers(model) is not None) == (reason != "method")
    layer = sparse_layers(model)[1]
    if reason == "baseline":
        layer.baseline = Recency()
    if reason == "off":
        layer.enable_adapters(False)
    if reason == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    if reason == "states":  # what a module keeps beside its tensors
        for other in model.model.layers:
            other.mlp.state = {}
    assert compiled_layers.compiled_layers(model) is None


def test_recorded_loops_compile_one_layer_too(tiny_llama, played):
    model = patch(tiny_llama(num_hidden_layers=4), SparseKConfig(**BUDGET))
    expected = model.generate(IDS, disable_compile=True, **OPTIONS)
    assert torch.equal(model.generate(IDS, custom_generate=CapturedDecoding(model, compiled=True), **OPTIONS), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recordings need a CUDA device")
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_on_a_gpu_are_those_of_eager_steps(tiny_llama, rows):
    """Texts of other lengths compile nothing more: one step is for a mask, and one for none."""
    model = patch(tiny_llama(num_hidden_layers=4).cuda(), SparseKConfig(**BUDGET))
    for length in (30, 9, 70):
        ids = torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(0)).cuda()
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False}
        expected = model.generate(ids, disable_compile=True, **options)
        for how in ({"cache_implementation": "static"}, {"custom_generate": CapturedDecoding(model, compiled=True)}):
            assert torch.equal(model.generate(ids, **how, **options), expected)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="products share a kernel on a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_logits_of_half_precision_on_a_gpu_are_those_of_eager_steps(tiny_llama, rows, dtype, monkeypatch):
    """Four launches of a layer multiply: for queries, keys and values, the output and its sum, gate and up, and down.

    Of weights as small as these the pass would leave the products to cuBLAS.
    """
    from hf_sparse.ops.triton import products

    monkeypatch.setattr(compiled_layers, "SHARE_PRODUCTS", ShareProducts(has_kernel))
    launched, launch = [], products._launch

    def note(x, weights, *given):
        if (
            not x.is_meta and threading.current_thread() is threading.main_thread()
        ):  # others only compile, maybe for a test before
            launched.append(len(weights))
        launch(x, weights, *given)

    monkeypatch.setattr(products, "_launch", note)
    model = patch(tiny_llama(num_hidden_layers=3).cuda().to(dtype), SparseKConfig(**BUDGET))
    ids = torch.randint(2, 64, (rows, 30), generator=torch.Generator().manual_seed(0)).cuda()
    logits = {}
    with torch.no_grad():
        for name, run in (("eager", model), ("compiled", compiled_layers.compiled_layers(model))):
            cache = SparseCache(model)
            model(ids[:, :-1], **with_cache(cache))
            logits[name] = run(ids[:, -1:], position_ids=torch.full_like(ids[:, :1], 29), **with_cache(cache)).logits
    assert launched == 3 * [3, 1, 2, 1] and counters["stats"]["unique_graphs"] == 1
    difference = (logits["compiled"] - logits["eager"]).float().norm() / logits["eager"].float().norm()
    assert float(difference) < 8 * torch.finfo(dtype).eps
