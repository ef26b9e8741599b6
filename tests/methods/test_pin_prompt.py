"""Prompts that are kept for good, in places of selected keys."""

import pytest
import torch

import hf_sparse
from hf_sparse import SparseKConfig, patch
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.evaluation import compare, using
from hf_sparse.methods.sparsek import Budget
from hf_sparse.methods.sparsek.baselines import BASELINES, PromptRandom
from hf_sparse.methods.sparsek.evaluation import budget_of
from hf_sparse.patches import sparse_layers

IDS = torch.randint(4, 64, (2, 60), generator=torch.Generator().manual_seed(0))
BUDGET = {"k": 20, "window": 8, "sinks": 2}
OPTIONS = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None}


def patched(tiny_llama, **settings):
    model = patch(tiny_llama(), SparseKConfig(**{**BUDGET, **settings})).eval()
    with torch.no_grad():
        for layer in sparse_layers(model):  # scores that would keep anything but the prompt
            layer.sparsek_scorer["default"].slope.fill_(200.0)
    return model


def generated(model, prompt, **options):
    cache = hf_sparse.SparseKCache(model)
    output = model.generate(prompt, **with_cache(cache), **OPTIONS, **options)
    return output, cache


class TestFirstTokens:
    def test_they_are_sinks_in_places_of_selected_keys(self):
        config = SparseKConfig(**BUDGET, pin_prompt=12)
        assert config.budget(0) == Budget(k=10, window=8, sinks=12) and config.slots == 30
        assert SparseKConfig(**BUDGET, pin_prompt=2).budget(0) == Budget(20, 8, 2)
        shares = {"layer_shares": [0.75, 1.25], "pin_prompt": 12}
        budgets = [SparseKConfig(**BUDGET, **shares).budget(layer) for layer in range(2)]
        assert [budget.k for budget in budgets] == [5, 15] and [budget.sinks for budget in budgets] == [12, 12]
        by_heads = SparseKConfig(**BUDGET, head_shares=[[0.75, 1.25]], pin_prompt=12).budget(0)
        assert by_heads == Budget((5, 15), 8, 12)

    @pytest.mark.parametrize("settings", [{}, {"head_shares": [[0.75, 1.25], [1.0, 1.0]]}])
    @torch.no_grad()
    def test_they_are_kept(self, tiny_llama, settings):
        model = patched(tiny_llama, pin_prompt=12, **settings)
        for ids in (IDS, IDS[:, :5]):
            _, cache = generated(model, ids)
            for layer in cache.layers:
                for positions in layer.by_head(layer.positions):
                    assert set(range(12)) <= set(positions[0].tolist())
        whole = model(IDS, use_cache=False).logits
        first = model(IDS[:, :7], use_cache=True)
        parts, cache = [first.logits], cache_of(first)
        for piece in IDS[:, 7:].split([20, *[1] * 33], 1):
            parts.append(model(piece, **with_cache(cache), use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"pin_prompt": 22}, "pin_prompt is 22, and the budget has 20 selected keys and 2 sinks.*at most 21"),
            ({"pin_prompt": -2}, "pin_prompt must be -1 or an integer of at least 0, got -2"),
            ({"pin_prompt": True}, "pin_prompt must be -1 or an integer of at least 0, got True"),
            ({"pin_prompt": 20, "layer_shares": [0.5, 1.5]}, "a KV head has 12 slots for sinks and selected"),
            ({"pin_prompt": 20, "head_shares": [[0.5, 1.5]]}, "pin at most 11, or give a larger budget"),
        ],
    )
    def test_a_budget_that_is_too_small_is_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SparseKConfig(**{**BUDGET, **settings})

    def test_another_budget_that_is_too_small_is_refused(self, tiny_llama):
        model = patched(tiny_llama, pin_prompt=12)
        with using(model, "learned", Budget(8, 4, 2)), pytest.raises(ValueError, match="pin_prompt is 12"):
            model(IDS, use_cache=False)


class TestWholePrompt:
    @pytest.mark.parametrize("length", [1, 13, 22])
    @pytest.mark.parametrize("settings", [{}, {"head_shares": [[1.1, 1.0], [1.0, 0.9]], "k": 22}])
    def test_it_is_kept(self, tiny_llama, settings, length):
        model, without = patched(tiny_llama, pin_prompt=-1, **settings), patched(tiny_llama, **settings)
        _, cache = generated(model, IDS[:, :length])
        for layer in cache.layers:
            for positions in layer.by_head(layer.positions):
                assert all(set(range(length)) <= set(row.tolist()) for row in positions)
        other = generated(without, IDS[:, :length])[1].layers[0]
        kept = {position for positions in other.by_head(other.positions) for position in positions[0].tolist()}
        assert kept & set(range(length)) == set(range(min(length, 2))), "the scores would have kept the prompt"

    def test_a_padded_row_is_what_it_is_alone(self, tiny_llama):
        model = patched(tiny_llama, pin_prompt=-1)
        mask = torch.ones(2, 25, dtype=torch.long)
        mask[0, :9], mask[1, :3] = 0, 0
        output, cache = generated(model, IDS[:, :25], attention_mask=mask)
        for row, begin in ((0, 9), (1, 3)):
            alone, _ = generated(model, IDS[row : row + 1, begin:25])
            assert output[row, 25:].tolist() == alone[0, 25 - begin :].tolist()
            assert set(range(25 - begin)) <= set(cache.layers[1].positions[row, 0].tolist())

    def test_beams(self, tiny_llama):
        model = patched(tiny_llama, pin_prompt=-1)
        output = model.generate(IDS[:, :20], num_beams=3, **OPTIONS)
        assert output[1:].tolist() == model.generate(IDS[1:, :20], num_beams=3, **OPTIONS).tolist()

    def test_a_prompt_that_does_not_fit_is_refused(self, tiny_llama):
        model = patched(tiny_llama, pin_prompt=-1)
        with pytest.raises(ValueError, match=r"the 22 slots .* \(sinks \+ k\) cannot hold its 23 tokens"):
            model.generate(IDS[:, :23], **OPTIONS)
        by_heads = patched(tiny_llama, pin_prompt=-1, head_shares=[[0.5, 1.5], [1.0, 1.0]])
        with pytest.raises(ValueError, match=r"the 12 slots .* cannot hold its 13 tokens"):
            by_heads.generate(IDS[:, :13], **OPTIONS)

    @pytest.mark.parametrize("name", ["random", "h2o", "tova", "snapkv", "key_difference"])
    def test_baselines_keep_it_too(self, tiny_llama, name):
        model = patched(tiny_llama, pin_prompt=-1)
        with using(model, name):
            _, cache = generated(model, IDS[:, :20])
            with torch.no_grad():
                model(IDS[:, :13], **with_cache(cache))  # another turn
        for layer in cache.layers:
            assert all(set(range(20)) <= set(row.tolist()) for row in layer.positions.flatten(0, 1))

    def test_whole_texts_have_no_prompt(self, tiny_llama):
        with torch.no_grad():
            logits = [patched(tiny_llama, pin_prompt=pin)(IDS, use_cache=False).logits for pin in (-1, 0)]
        assert torch.equal(*logits)

    def test_an_encoder_has_none(self, tiny_bert):
        with pytest.raises(ValueError, match="an encoder has no prompt"):
            patch(tiny_bert(), SparseKConfig(pin_prompt=-1))


class TestPromptRandom:
    def test_a_cache_keeps_its_prompt_and_random_keys(self, tiny_llama):
        model = patched(tiny_llama)
        with using(model, "prompt_random"):
            _, cache = generated(model, IDS[:, :15])
        others = set()
        for layer in cache.layers:
            for row in layer.positions.flatten(0, 1).tolist():
                assert set(range(15)) <= set(row)
                others.add(tuple(sorted(set(row) - set(range(15)))))
        assert len(others) == 4  # one for every layer and head
        with using(model, "prompt_random"), pytest.raises(ValueError, match="cannot hold its 23 tokens"):
            model.generate(IDS[:, :23], **OPTIONS)

    def test_a_whole_text_keeps_its_beginning(self, tiny_llama):
        model = patched(tiny_llama)
        budget = budget_of(model)
        runs = [(budget, name) for name in ("random", "prompt_random")]
        losses = compare(model, IDS, runs)
        assert losses[runs[0]].perplexity != losses[runs[1]].perplexity
        pinned = patched(tiny_llama, pin_prompt=11)  # half of the sinks and selected keys
        run = (budget, "random")
        assert compare(pinned, IDS, [run])[run].perplexity == pytest.approx(losses[runs[1]].perplexity, rel=1e-5)

    def test_it_answers_no_tasks(self):
        from hf_sparse.methods.sparsek.evaluation import CONTENDERS, GENERATING

        assert isinstance(BASELINES["prompt_random"], PromptRandom)
        assert "prompt_random" in CONTENDERS and "prompt_random" not in GENERATING
