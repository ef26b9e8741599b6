"""Test that what stays whole beside a divided base is on the device of its process; `meta` stands for a GPU."""

from types import SimpleNamespace

import torch

from hf_sparse.finetune.sharding import shard_base
from hf_sparse.patches import sparse_layers


def test_an_adapter_that_came_after_the_division_is_moved(sparse_llama, monkeypatch):
    """A second run with ZeRO-3 finds the base divided, and an adapter that lies elsewhere."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    model = sparse_llama(lora_rank=2)
    layers = sparse_layers(model)
    head = model.get_base_model().lm_head.weight
    head.ds_tensor = head.detach()  # as DeepSpeed marks what it has divided
    assert shard_base(SimpleNamespace(device=torch.device("meta")), model, layers) is model
    tensors = [tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers())]
    assert tensors and all(tensor.is_meta for tensor in tensors)
    assert not head.is_meta
