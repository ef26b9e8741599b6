"""The share of the keys with weight in every layer."""

import math

import pytest
import torch

from hf_sparse import SparsefinderConfig, patch
from hf_sparse.methods.sparsefinder.density import layer_densities
from hf_sparse.ops.entmax import support
from hf_sparse.patches import sparse_layers

LENGTH = 40


def test_densities_are_those_of_entmax_over_all_keys(tiny_llama):
    model = patch(tiny_llama(), SparsefinderConfig(predictor="pooled", tile=8, exact_up_to=0))
    layers = sparse_layers(model)
    layers[0].parameters_in_use.log_scale.data.fill_(math.log(1e-4))  # next to no logit is left
    layers[1].parameters_in_use.log_scale.data.fill_(math.log(3.0))
    chunks = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=chunks).logits
    densities = layer_densities(model, chunks)
    expected = {0: [], 1: []}

    def observe(text, *_):
        options = {"alpha": text.alpha, "scaling": text.scaling, "causal": True, "rows": torch.arange(LENGTH)}
        edges = support(text.query, text.key, **options)[0]
        expected[text.layer].append(float(edges.sum()) / (edges.shape[1] * LENGTH * (LENGTH + 1) / 2))

    for layer in layers:
        layer.pattern, layer.observer = lambda text: None, observe
    for chunk in chunks:
        model(input_ids=chunk[None])
    for layer in layers:
        layer.pattern = layer.observer = None
    assert densities == pytest.approx({layer: sum(shares) / 2 for layer, shares in expected.items()})
    assert densities[0] == 1 and densities[1] < 0.9
    assert torch.equal(model(input_ids=chunks).logits, before)  # the model is as it was
