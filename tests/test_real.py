"""Real checkpoints, a decoder and an encoder. Run with `-m real` and two folders in the environment:

HF_SPARSE_REAL_MODEL holds SmolLM2-135M-Instruct, HF_SPARSE_REAL_ENCODER holds all-MiniLM-L6-v2.
"""

import os

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_sparse import SparseKConfig
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.demo.text import documents
from hf_sparse.patches import sparse_layers

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
    parts, cache = [output.logits], cache_of(output)
    for t in range(150, 200):
        output = model(ids[:, t : t + 1], **with_cache(cache))
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
        **with_cache(cache),
        min_new_tokens=2_000,
        max_new_tokens=2_000,
        do_sample=False,
        stopping_criteria=[watch],
    )
    assert output.shape[1] == 2_016
    assert len(sparse_layers(model)) == 30
    per_layer = 2 * 3 * 256 * 64 * 4  # keys and values, KV heads, slots, head dimension, bytes
    assert set(seen) == {30 * per_layer} and len(seen) == 2_000


@torch.no_grad()
def test_padded_rows_of_a_decoder_equal_each_row_alone(base, ids):
    """Bounded by twice what the dense model itself does: a real checkpoint amplifies rounding."""
    batch, mask = torch.zeros(2, 200, dtype=torch.long), torch.ones(2, 200, dtype=torch.long)
    batch[0], batch[1, 60:], mask[1, :60] = ids[0], ids[0, :140], 0
    position = (mask.cumsum(-1) - 1).clamp(min=0)

    def difference(model) -> float:
        padded = model(batch, attention_mask=mask, position_ids=position).logits[1, 60:]
        return float((padded - model(ids[:, :140]).logits[0]).abs().max())

    dense = difference(base)
    sparse = difference(get_peft_model(base, SparseKConfig(k=20, window=24, sinks=4)).eval())
    assert sparse <= max(2 * dense, 1e-4)


@torch.no_grad()
def test_an_encoder():
    if "HF_SPARSE_REAL_ENCODER" not in os.environ:
        pytest.fail("set HF_SPARSE_REAL_ENCODER to a folder that holds all-MiniLM-L6-v2")
    folder = os.environ["HF_SPARSE_REAL_ENCODER"]
    base, tokenizer = (
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    text = next(documents("held_out"))
    batch = tokenizer([text[:1500], text[1500:2200]], padding=True, truncation=True, return_tensors="pt")
    expected = base(**batch).last_hidden_state
    length = batch["input_ids"].shape[1]
    wide = get_peft_model(base, SparseKConfig(k=length, window=8, sinks=1)).eval()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(wide(**batch).last_hidden_state[real], expected[real], rtol=0, atol=1e-5)
    model = get_peft_model(wide.unload(), SparseKConfig(k=24, window=32, sinks=1)).eval()
    together = model(**batch).last_hidden_state
    for row, ids, mask in zip(together, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = model(input_ids=ids[mask.bool()][None]).last_hidden_state[0]
        torch.testing.assert_close(row[mask.bool()], alone, rtol=0, atol=1e-5)
