"""A compiled forward of whole texts with gradients is one graph, whose gradients are those of the eager one."""

import pytest
import torch
from torch._dynamo.utils import counters

from hf_sparse import SparseKConfig, patch

IDS = torch.randint(2, 64, (3, 40), generator=torch.Generator().manual_seed(0))
LEFT = (torch.arange(40) >= torch.tensor([0, 7, 12])[:, None]).long()


@pytest.fixture(autouse=True)
def _from_the_beginning():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(model, forward, mask):
    model.zero_grad()
    labels = IDS.masked_fill(mask == 0, -100)
    loss = forward(IDS, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.versions
@pytest.mark.parametrize(
    ("mask", "frozen", "shares"),
    [
        pytest.param(torch.ones_like(IDS), False, None, marks=pytest.mark.full),
        (LEFT, True, None),
        pytest.param(LEFT, True, [[0.5, 1.5]], marks=pytest.mark.full),
    ],
    ids=["all learn", "padded, scorers learn", "heads with budgets of their own"],
)
def test_soft_gates(tiny_llama, mask, frozen, shares):
    """`torch.compile` of training with an `attention_mask`, as one graph, has the gradients of eager training."""
    model = patch(tiny_llama(num_hidden_layers=1), SparseKConfig(k=6, window=8, sinks=2, head_shares=shares)).train()
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("scorer" in name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, expected = gradients(model, compiled, mask), gradients(model, model, mask)
    assert counters["stats"]["unique_graphs"] == 1
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_hard_gates_give_scorers_no_gradient(tiny_llama):
    model = patch(tiny_llama(num_hidden_layers=1), SparseKConfig(k=6, window=8, sinks=2)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = gradients(model, compiled, LEFT)
    with pytest.warns(UserWarning, match="get no gradient"):
        expected = gradients(model, model, LEFT)
    for name, gradient in expected.items():
        if "scorer" in name:
            assert found[name] is None
            assert gradient is None or not gradient.any()
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
