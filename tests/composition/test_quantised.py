"""Sparse attention over quantised base models: up to the budget the quantised model itself, and the scorers learn."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_sparse

pytest.importorskip("bitsandbytes", reason="needs the extra `composition`: run `make composition`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a small Llama whose sizes every kernel takes."""
    path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=2, **sizes)).save_pretrained(path)
    return path


def load(folder, settings):
    options = {"dtype": "float32", "device_map": "cpu", "quantization_config": settings}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def check(folder, make, ids, settings, learns=True):
    base = load(folder, settings)
    with torch.no_grad():
        expected = base(ids).logits
        hf_sparse.patch(base, hf_sparse.SparseKConfig(k=100, window=8, sinks=4))
        assert torch.equal(base(ids).logits, expected)
    hf_sparse.unpatch(base)
    model = make(base).train()
    if learns:
        model(ids, labels=ids).loss.backward()
    learned = [p for p in model.parameters() if p.requires_grad and learns]
    assert bool(learned) == learns and all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learned
    )
    assert model.eval().generate(ids[:1], max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_bitsandbytes_8_bit(folder, make, ids):
    """bitsandbytes with 8 bits: the quantised model up to the budget, gradients for every scorer, generation."""
    check(folder, make, ids, transformers.BitsAndBytesConfig(load_in_8bit=True))


def test_bitsandbytes_4_bit(folder, make, ids):
    """bitsandbytes with 4 bits: the quantised model up to the budget, and generation."""
    check(
        folder,
        make,
        ids,
        transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        learns=False,
    )


def test_training_over_4_bits(folder, make, ids):
    """bitsandbytes with 4 bits: gradients for every scorer, on a CPU if no forward without gradients came before.

    That packs the weights for a kernel of bitsandbytes that has no backward, dense or sparse.
    """
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = make(load(folder, settings)).train()
    model(ids, labels=ids).loss.backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert learned and all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in learned)


def test_torchao(folder, make, ids):
    """torchao with int8 weights, likewise."""
    quantization = pytest.importorskip("torchao.quantization")
    check(folder, make, ids, transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def test_quanto(folder, make, ids):
    """quanto with int8 weights, likewise."""
    check(folder, make, ids, transformers.QuantoConfig(weights="int8"))
