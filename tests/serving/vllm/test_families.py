"""Every family that is served, and every kind of adapter, on small random models."""

import random

import pytest
import torch
import transformers
from peft import get_peft_model

import hf_sparse
from hf_sparse.serving.export import export

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
KINDS = {
    "Llama": {"layer_shares": [0.5, 1.5]},
    "Mistral": {"lora_rank": 4},
    "Qwen2": {"scorer": "mlp", "scorer_hidden_size": 16},
    "Qwen3": {"position_slope": 0.01},
}


@pytest.fixture(params=KINDS)
def model_and_requests(request, tmp_path):
    """An exported model of a family, and what `generate` says to some prompts."""
    family, changes = request.param, {}
    if family == "Mistral":
        changes = {"sliding_window": None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **changes)
    base = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    base.save_pretrained(str(tmp_path / "base"))
    adapter = hf_sparse.SparseKConfig(k=12, window=8, sinks=2, **KINDS[family])
    model = get_peft_model(base, adapter).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sparsek_" in name:
                parameter.normal_(std=0.1 if "lora" in name else 1.0)
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    export(tmp_path / "adapter", tmp_path / "served")
    generator = random.Random(1)
    requests = []
    for length in (1, 5, 22, 23, 60, 150, 31, 97):
        prompt = [generator.randrange(512) for _ in range(length)]
        with torch.no_grad():
            ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        requests.append({"prompt": prompt, "tokens": ids[0, length:].tolist()})
    return tmp_path / "served", requests


def test_a_family_equals_generate(run_model, model_and_requests):
    model, requests = model_and_requests
    settings = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_seqs": 3, "max_num_batched_tokens": 40}
    result = run_model("greedy", model, requests, **settings)
    assert result["tokens"] == [request["tokens"] for request in requests]


@pytest.mark.parametrize("model_and_requests", ["Mistral"], indirect=True)  # with LoRA
def test_two_processes_share_the_heads(run_model, model_and_requests):
    model, requests = model_and_requests
    settings = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_seqs": 3, "max_num_batched_tokens": 40}
    result = run_model("greedy", model, requests, **settings, tensor_parallel_size=2)
    assert result["tokens"] == [request["tokens"] for request in requests]
