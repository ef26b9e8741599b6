"""Budgets of layers: what each loses, and how slots are divided by it."""

import pytest
import torch

from hf_sparse import SparseKConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.errors import DataError
from hf_sparse.evaluation import compare
from hf_sparse.methods.sparsek.evaluation import budget_of, divide_layers, layer_damages
from hf_sparse.methods.sparsek.evaluation.layer_shares import best_shares
from hf_sparse.patches import sparse_layers

SHARES = [1.5, 0.5]


@pytest.fixture
def chunks():
    return torch.randint(0, 64, (2, 60), generator=torch.Generator().manual_seed(0))


def patched(tiny_llama, **settings):
    return patch(tiny_llama(), SparseKConfig(k=8, window=6, sinks=2, **settings)).eval()


def test_every_layer_has_its_own_slots(tiny_llama, chunks):
    model = patched(tiny_llama, layer_shares=SHARES)
    with torch.no_grad():
        cache = cache_of(model(input_ids=chunks, use_cache=True))
        assert [layer.keys.shape[2] for layer in cache.layers] == [2 + 12 + 9, 2 + 4 + 3]
        whole = model(input_ids=chunks).logits
        steps = model(input_ids=chunks[:, :40], use_cache=True)
        parts, cache = [steps.logits], cache_of(steps)
        for token in chunks[:, 40:].split(1, 1):
            parts.append(model(input_ids=token, **with_cache(cache)).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_up_to_the_smallest_share_all_is_dense(tiny_llama, chunks):
    model, base = patched(tiny_llama, layer_shares=SHARES), tiny_llama().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(chunks[:, :9]).logits, base(chunks[:, :9]).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(model(chunks[:, :30]).logits, base(chunks[:, :30]).logits, atol=1e-3)


def test_a_wrong_number_of_shares_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="layer_shares has 3 entries, and the model has 2 attention layers"):
        patched(tiny_llama, layer_shares=[1.0, 1.0, 1.0])


def test_damage_is_that_of_one_sparse_layer(tiny_llama, chunks):
    model = patched(tiny_llama)
    found = layer_damages(model, chunks, 12, progress=False)
    assert (
        list(found) == [0, 1] and budget_of(model) == (8, 6, 2) and sparse_layers(model)[0].config.layer_shares is None
    )
    for layer, damage in found.items():
        alone = patch(tiny_llama(), SparseKConfig(**budget_of(model).resized(12)._asdict(), layers=[layer])).eval()
        source = sparse_layers(model)[layer].sparsek_scorer
        sparse_layers(alone)[0].sparsek_scorer.load_state_dict(source.state_dict())
        run = (budget_of(alone), "learned")
        assert damage == pytest.approx(compare(alone, chunks, [run])[run].mean_divergence, abs=1e-6)
        assert damage > 0


def test_divide(tiny_llama, chunks):
    model = patched(tiny_llama)
    shares, damages = divide_layers(model, chunks, progress=False)
    assert sorted(damages) == [8, 32] and damages[8] == layer_damages(model, chunks, 8, progress=False)
    assert shares == best_shares(list(damages[8].values()), list(damages[32].values()), (8, 32))
    assert SparseKConfig(layer_shares=shares).layer_shares == shares


def test_a_layer_that_is_not_patched_keeps_its_share(tiny_llama, chunks):
    shares, damages = divide_layers(patched(tiny_llama, layers=[1]), chunks, progress=False)
    assert shares == [1.0, 1.0] and [list(some) for some in damages.values()] == [[1], [1]]


class TestBestShares:
    def test_equal_damages_are_equal_shares(self):
        assert best_shares([0.3] * 4, [0.1] * 4, (64, 256)) == [1.0] * 4

    def test_the_minimum_of_all_damages(self):
        """Against a search over all pairs of sizes."""
        factors, powers, (low, high) = (30.0, 4.0), (1.2, 0.8), (64, 256)
        few, many = ([c * n**-p for c, p in zip(factors, powers, strict=True)] for n in (low, high))
        total = 2 * 128

        def damage(n):
            return factors[0] * n ** -powers[0] + factors[1] * (total - n) ** -powers[1]

        best = min(range(1, total), key=damage) / 128
        assert best_shares(few, many, (low, high)) == pytest.approx([(1 + best) / 2, (3 - best) / 2], abs=0.01)

    def test_who_loses_more_gets_more_and_noise_does_no_harm(self):
        shares = best_shares([0.5, 0.1, 0.0, 1e-12], [0.1, 0.05, 0.0, 0.3], (64, 256))
        assert shares[0] > shares[1] > shares[2] > 0 and sum(shares) / 4 == pytest.approx(1, abs=1e-3)


def test_refusals(tiny_llama, chunks):
    model = patched(tiny_llama)
    with pytest.raises(DataError, match="nothing is evicted: 60 slots cover the whole text of 60 tokens"):
        layer_damages(model, chunks, 60)
    with pytest.raises(ValueError, match="expected a model with sparse attention"):
        divide_layers(tiny_llama(), chunks)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        layer_damages(model, chunks, 16, batch_size=0)
