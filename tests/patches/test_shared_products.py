"""The pass over the graph of a compiled step: products of one input become one call, and the results stay."""

import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.decomposition import select_decomp_table

from hf_sparse import CapturedDecoding, SparseKConfig, patch
from hf_sparse.patches import compiled_layers, shared_products, sparse_layers
from hf_sparse.patches.shared_products import SHARE_PRODUCTS, ShareProducts

PRODUCTS, MM, ADDMM = torch.ops.hf_sparse.products.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default
MORE = {torch.ops.hf_sparse.product_added.default: "sum", torch.ops.hf_sparse.gated_product.default: "gate"}
LORA = [3, 1, 3, 1, 1, 2, 1, "gate", "sum"]
OPTIONS = {"max_new_tokens": 8, "do_sample": False}
IDS = torch.randint(2, 64, (2, 30), generator=torch.Generator().manual_seed(0))


def always(x, weights, biases):
    return True


@pytest.fixture(autouse=True)
def _begin_anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """List the graphs that the pass has been over."""
    return []


@pytest.fixture
def rewrite(graphs):
    """Return a function that compiles with the pass and nothing else, without inductor's compiler of C++.

    If `writes_out`, operations are written out as inductor does it before it calls the pass.
    """

    def compiler(share, gm, inputs):
        share(gm.graph)
        gm.graph.lint()
        gm.recompile()
        graphs.append(gm.graph)
        return gm

    def rewrite(function, is_worth_it=always, writes_out=False):
        given = {"decompositions": select_decomp_table()} if writes_out else {}
        backend = aot_autograd(fw_compiler=partial(compiler, ShareProducts(is_worth_it)), **given)
        return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)

    return rewrite


def targets(graph):
    """Return what the graph multiplies by, in order, and of each call of ours how many weights it has, or its name."""
    return [
        len(node.args[1]) if node.target is PRODUCTS else MORE.get(node.target, node.target)
        for node in graph.nodes
        if node.target in (PRODUCTS, MM, ADDMM, *MORE)
    ]


def linears(*counts, bias=False):
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(12, count, bias=bias) for count in counts]).requires_grad_(False)


@pytest.mark.parametrize("shape", [(3, 12), (2, 1, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_one_input_become_one(bias, shape, rewrite, graphs):
    modules, x = linears(12, 4, 4, bias=bias), torch.randn(shape)

    def attention(x):
        x = x * 2
        q, k, v = (module(x) for module in modules)
        return modules[0](q + torch.cat([k, v, k], -1))

    torch.testing.assert_close(rewrite(attention)(x), attention(x))
    assert targets(graphs[0]) == [3, 1]


def test_more_weights_than_a_kernel_takes(rewrite, graphs):
    modules, x = linears(3, 5, 7, 2, 4), torch.randn(2, 12)

    def run(x):
        return torch.cat([module(x) for module in modules], -1)

    torch.testing.assert_close(rewrite(run)(x), run(x))
    assert targets(graphs[0]) == [3, 2]


def test_a_bias_is_added_to_its_product_alone(rewrite, graphs):
    plain, biased, x = linears(3, 5), linears(3, 5, bias=True), torch.randn(2, 12)

    def run(x):
        return torch.cat([a(x) + b(x).sum() for a, b in zip(plain, biased, strict=True)], -1)

    torch.testing.assert_close(rewrite(run)(x), run(x))
    assert targets(graphs[0]) == [2, 2]


def test_other_products_stay(rewrite, graphs):
    """Weights that are computed, not transposed or no matrices, biases of other shapes, and inputs of other values."""
    (weight,), x = (module.weight for module in linears(12)), torch.randn(2, 12)
    others = {
        "computed": lambda x: F.linear(x, weight * 2),
        "not transposed": lambda x: x @ weight,
        "scaled": lambda x: torch.addmm(x, x, weight.T, beta=2),
        "a bias for every row": lambda x: torch.addmm(x, x, weight.T),
        "with itself": lambda x: x.T @ x,
    }
    for run in others.values():
        torch.testing.assert_close(rewrite(run)(x), run(x))
    assert targets(graphs[0]) == [MM] and not any(type(one) is int for graph in graphs for one in targets(graph))

    def changed(x):
        first = F.linear(x, weight)
        x.add_(1)
        return first * F.linear(x, weight)

    torch.testing.assert_close(rewrite(changed)(x.clone()), changed(x.clone()))
    assert targets(graphs[-1]) == [1, 1]


@pytest.mark.parametrize(
    ("dtype", "writes_out"),
    [(torch.float32, False), *((dtype, out) for dtype in (torch.bfloat16, torch.float16) for out in (False, True))],
    ids=str,
)
@pytest.mark.parametrize("first", ["gate", "up"])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_gate_and_what_it_lets_through_become_one(first, is_swapped, dtype, writes_out, rewrite, graphs):
    gate, up = linears(4, 4).to(dtype)
    x = torch.randn(2, 1, 12).to(dtype)

    def mlp(x):
        if first == "gate":
            a, b = F.silu(gate(x)), up(x)
        else:
            b, a = up(x), F.silu(gate(x))
        return b * a if is_swapped else a * b

    torch.testing.assert_close(rewrite(mlp, writes_out=writes_out)(x), mlp(x))
    assert targets(graphs[0]) == ["gate"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_sum_goes_with_its_product(is_swapped, bias, rewrite, graphs):
    (module,), x, y = linears(12, bias=bias), torch.randn(2, 1, 12), torch.randn(2, 1, 12)

    def run(x, y):
        return module(x) + y if is_swapped else y + module(x)

    torch.testing.assert_close(rewrite(run)(x, y), run(x, y))
    assert targets(graphs[0]) == ["sum"]


@pytest.mark.parametrize("writes_out", [False, True])
def test_what_is_used_again_or_has_another_shape_stays(writes_out, rewrite, graphs):
    (module, other), x = linears(4, 4).bfloat16(), torch.randn(2, 1, 12).bfloat16()
    (biased, too), y = linears(4, 4, bias=True).bfloat16(), torch.randn(2, 1, 4).bfloat16()
    others = {
        "twice": lambda x, y: (y + (z := module(x))) * z,
        "with itself": lambda x, y: (z := module(x)) + z,
        "scaled": lambda x, y: torch.add(y, module(x), alpha=2),
        "of another type": lambda x, y: y.double() + module(x),
        "repeated": lambda x, y: y.expand(3, 2, 1, 4) + module(x),
        "a number": lambda x, y: module(x) + 1,
        "turned": lambda x, y: y.view(4, 2) + module(x)[:, 0].T,
        "a gate that is used": lambda x, y: F.silu(z := module(x)) * other(x) + z,
        "let through elsewhere": lambda x, y: F.silu(module(x)) * (z := other(x)) + z,
        "another gate": lambda x, y: F.gelu(module(x)) * other(x),
        "a wider gate": lambda x, y: (z := module(x).float()).div(2 + (-z).exp()).bfloat16() * other(x),
        "let through by itself": lambda x, y: F.silu(module(x)) ** 2 * other(x),
        "scaled before": lambda x, y: y + module(x) * 0.22,
        "subtracted": lambda x, y: y - module(x),
        "of itself": lambda x, y: F.silu(z := module(x)) * z,
        "with a bias": lambda x, y: F.silu(biased(x)) * too(x),
    }
    for name, run in others.items():
        torch.testing.assert_close(rewrite(run, writes_out=writes_out)(x, y), run(x, y))
        assert all(type(one) is int for one in targets(graphs[-1])), name
    assert len(graphs) == len(others)


def test_gradients_are_those_without_it(rewrite, graphs):
    """Take products of the forward alone: in a backward, weights are not as the graph was given them."""
    modules, x = linears(12, 4).requires_grad_(), torch.randn(2, 12, requires_grad=True)

    def run(x):
        return sum(module(x).square().sum() for module in modules)

    wanted = (x, *modules.parameters())
    found = torch.autograd.grad(rewrite(run)(x), wanted)
    assert targets(graphs[0]) == [2]
    for ours, theirs in zip(found, torch.autograd.grad(run(x), wanted), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_on_a_cpu_nothing_changes(rewrite, graphs):
    modules, x = linears(12, 4).bfloat16(), torch.randn(2, 12).bfloat16()
    rewrite(lambda x: torch.cat([module(x) for module in modules], -1), SHARE_PRODUCTS.is_worth_it)(x)
    assert targets(graphs[0]) == [MM, MM]


@pytest.mark.parametrize(("lora", "calls"), [(0, [3, "sum", "gate", "sum"]), (2, LORA)])
def test_a_decoder_layer(tiny_llama, rewrite, graphs, monkeypatch, lora, calls):
    """Queries, keys and values are one call, gate and up another; with LoRA three more weights read the first input.

    The kernels of all calls begin to be compiled.
    """
    begun = []
    monkeypatch.setattr(shared_products, "begin_product", lambda operator, *call: begun.append((operator, *call[0])))
    monkeypatch.setattr(compiled_layers, "compiled", rewrite)
    model = patch(tiny_llama(num_hidden_layers=3), SparseKConfig(k=6, window=8, sinks=2, lora_rank=lora))
    for layer in sparse_layers(model):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.2)
    expected = model.generate(IDS, disable_compile=True, **OPTIONS)
    found = model.generate(IDS, custom_generate=CapturedDecoding(model, compiled=True), **OPTIONS)
    assert torch.equal(found, expected) and list(map(targets, graphs)) == [calls]
    assert [len(one[2]) if one[0] is PRODUCTS else MORE[one[0]] for one in begun] == calls


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor calls a compiler of C++")
def test_inductor_keeps_what_it_has_compiled_with_the_pass(monkeypatch, tmp_path):
    """Another process would find it by the text of the pass; a pass of the user is not replaced."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    modules, x = linears(12, 4), torch.randn(2, 12)
    calls = []

    def counted(*tensors):
        calls.append(tensors)
        return True

    def run(x):
        return torch.cat([module(x) for module in modules], -1)

    share = ShareProducts(counted)
    monkeypatch.setattr(compiled_layers, "SHARE_PRODUCTS", share)
    with torch.no_grad():
        for hits in range(2):
            torch.testing.assert_close(compiled_layers.compiled(run)(x), run(x))
            assert len(calls) == 1 and counters["inductor"]["fxgraph_cache_hit"] == hits
            torch._dynamo.reset()
        with torch._inductor.config.patch(post_grad_custom_pre_pass=ShareProducts(lambda *tensors: False)):
            torch.testing.assert_close(compiled_layers.compiled(run)(x), run(x))
    assert len(calls) == 1
