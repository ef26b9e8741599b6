"""Open adapters to be served: the sparse attention of each layer as it was saved, and one sentence for what is not."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from hf_sparse import SparsefinderConfig, SparseKConfig
from hf_sparse.errors import AdapterMismatchError, UnsupportedModelError
from hf_sparse.patches import sparse_layers
from hf_sparse.serving.adapter import open_adapter

SETTINGS = {"k": 6, "window": 8, "sinks": 2}


def save(folder, model, config):
    patched = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in patched.named_parameters():
            if "sparsek_" in name:
                parameter.normal_()
    patched.save_pretrained(str(folder))
    return patched.eval()


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
def test_layers_are_those_that_were_saved(tmp_path, tiny_llama, scorer):
    patched = save(tmp_path, tiny_llama(), SparseKConfig(**SETTINGS, scorer=scorer, layer_shares=[0.5, 1.5]))
    served = open_adapter(tmp_path, patched.get_base_model().config)
    assert served.head_dim == 8 and not served.changes
    assert [layer.budget.slots for layer in served.layers] == [9, 23]
    states, index = torch.randn(1, 7, 32), torch.arange(7)[None]
    for ours, theirs in zip(served.layers, sparse_layers(patched), strict=True):
        assert torch.equal(ours.score(states, index), theirs.score(states, index))
        assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_heads(tmp_path, tiny_llama, scorer, count):
    patched = save(tmp_path, tiny_llama(), SparseKConfig(**SETTINGS, scorer=scorer))
    (layer, _) = open_adapter(tmp_path, patched.get_base_model().config).layers
    states, index = torch.randn(1, 7, 32), torch.arange(7)[None]
    whole = layer.score(states, index)
    parts = [layer.shard(number, count) for number in range(count)]
    heads = [[0, 1]] if count == 1 else [[0], [1]] if count == 2 else [[0], [0], [1], [1]]
    for part, expected in zip(parts, heads, strict=True):
        torch.testing.assert_close(part.score(states, index), whole[:, expected])
        assert part.request_state(8, torch.float32)[3].shape == (len(expected), 16, 8)
    assert layer.num_key_value_heads == 2


def test_lora_changes_the_weights_of_the_base(tmp_path, tiny_llama):
    patched = save(tmp_path, tiny_llama(), SparseKConfig(**SETTINGS, lora_rank=2))
    served = open_adapter(tmp_path, patched.get_base_model().config)
    base = tiny_llama()
    weights = dict(base.named_parameters())
    assert len(served.changes) == 8
    with torch.no_grad():
        for name, change in served.changes.items():
            weights[name] += change
    ids = torch.arange(4, 14)[None]  # all keys fit into the slots, so both are dense
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, patched(ids).logits, rtol=1e-4, atol=1e-4)


def refusal(folder, config):
    with pytest.raises(UnsupportedModelError) as error:
        open_adapter(folder, config)
    return str(error.value)


def test_a_method_that_keeps_all_keys_is_refused(tmp_path, tiny_llama):
    model = tiny_llama()
    get_peft_model(model, SparsefinderConfig()).save_pretrained(str(tmp_path))
    assert "is a Sparsefinder adapter, whose state of a request grows" in refusal(tmp_path, model.config)


def test_dense_layers_are_refused(tmp_path, tiny_llama):
    model = tiny_llama()
    save(tmp_path, model, SparseKConfig(**SETTINGS, layers=[1]))
    assert "leaves 1 of 2 attention layers dense, and a mixture" in refusal(tmp_path, model.config)


def test_heads_with_different_numbers_of_slots_stay_on_one_device(tmp_path, tiny_llama):
    patched = save(tmp_path, tiny_llama(), SparseKConfig(k=8, window=4, sinks=1, head_shares=[[0.5, 1.5]] * 2))
    (layer, _) = open_adapter(tmp_path, patched.get_base_model().config).layers
    assert layer.request_state(8, torch.float32)[3].shape == (9 + 17, 8)
    assert layer.shard(0, 1) is layer
    with pytest.raises(UnsupportedModelError, match=r"\(head_shares\) and cannot be divided among devices"):
        layer.shard(0, 2)


def test_a_pinned_prompt_is_refused(tmp_path, tiny_llama):
    model = tiny_llama()
    save(tmp_path / "prompt", tiny_llama(), SparseKConfig(k=8, window=4, sinks=1, pin_prompt=-1))
    assert "pins the whole prompt (pin_prompt=-1)" in refusal(tmp_path / "prompt", model.config)


def test_other_families_are_refused(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    save(tmp_path, model, SparseKConfig(**SETTINGS))
    assert "'gpt2' cannot be served yet; supported: llama, mistral, qwen2, qwen3" in refusal(tmp_path, model.config)


def test_another_head_is_refused(tmp_path, tiny_llama):
    model = tiny_llama()
    save(tmp_path, model, SparseKConfig(**SETTINGS, modules_to_save=["lm_head"]))
    assert "brings modules of the base model of its own" in refusal(tmp_path, model.config)


def test_local_layers_are_refused(tmp_path):
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**settings, num_attention_heads=4, num_key_value_heads=2, sliding_window=None)
    save(tmp_path, MistralForCausalLM(config), SparseKConfig(**SETTINGS))
    assert len(open_adapter(tmp_path, config).layers) == 2
    local = copy.deepcopy(config)
    local.sliding_window = 16
    assert "is local already" in refusal(tmp_path, local)


def test_another_base_is_refused(tmp_path, tiny_llama):
    save(tmp_path, tiny_llama(), SparseKConfig(**SETTINGS))
    with pytest.raises(AdapterMismatchError, match="made for another base model"):
        open_adapter(tmp_path, tiny_llama(num_hidden_layers=3).config)
