"""A real checkpoint. Run with `-m real` and HF_SPARSE_REAL_MODEL, a folder that holds SmolLM2-135M-Instruct."""

import os

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseKConfig
from hf_sparse.demo.text import documents
from hf_sparse.patches import methods_of

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder() -> str:
    if "HF_SPARSE_REAL_MODEL" not in os.environ:
        pytest.fail("set HF_SPARSE_REAL_MODEL to a folder that holds SmolLM2-135M-Instruct")
    return os.environ["HF_SPARSE_REAL_MODEL"]


@pytest.fixture
def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids(folder) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(next(documents("held_out")), return_tensors="pt")["input_ids"][:, :200]


@torch.no_grad()
def test_budget_of_the_length_is_the_base_model(base, ids):
    expected = base(ids).logits
    model = get_peft_model(base, SparseKConfig(k=66, window=130, sinks=4)).eval()
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_prefill_and_decode_equal_one_forward(base, ids):
    model = get_peft_model(base, SparseKConfig(k=20, window=24, sinks=4)).eval()
    whole = model(ids).logits
    output = model(ids[:, :150])
    parts, cache = [output.logits], output.past_key_values
    for t in range(150, 200):
        output = model(ids[:, t : t + 1], past_key_values=cache)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-4)


def test_the_scorers_are_a_small_part(base):
    model = get_peft_model(base, SparseKConfig())
    trained, everything = model.get_nb_trainable_parameters()
    assert trained == 30 * 3 * 576
    assert trained <= 0.0005 * everything


def test_two_thousand_tokens_in_256_slots(base, ids):
    model = get_peft_model(base, SparseKConfig(k=124, window=128, sinks=4)).eval()
    seen = []

    def watch(input_ids, scores, **kwargs):
        seen.append(sum(layer.nbytes for layer in cache.layers))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    from transformers import DynamicCache

    cache = DynamicCache(config=base.config)
    output = model.generate(
        input_ids=ids[:, :16],
        past_key_values=cache,
        min_new_tokens=2_000,
        max_new_tokens=2_000,
        do_sample=False,
        stopping_criteria=[watch],
    )
    assert output.shape[1] == 2_016
    assert len(methods_of(model)) == 30
    per_layer = 2 * 3 * 256 * 64 * 4  # keys and values, KV heads, slots, head dimension, bytes
    assert set(seen) == {30 * per_layer} and len(seen) == 2_000
