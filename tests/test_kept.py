"""What the report calls kept is what the model keeps."""

import pytest
import torch
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse.demo import CHECKPOINT
from hf_sparse.errors import DataError
from hf_sparse.methods.sparsek.kept_keys import describe_selection, kept_keys, pieces
from hf_sparse.patches import sparse_layers

LENGTH = 40


@pytest.fixture
def chunks():
    return torch.randint(5, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def patched(model, **settings):
    """With scorers that differ from head to head."""
    model = hf_sparse.patch(model, hf_sparse.SparseKConfig(**settings)).eval()
    for number, method in enumerate(sparse_layers(model)):
        torch.manual_seed(number)
        for weight in method.sparsek_scorer.parameters():
            torch.nn.init.normal_(weight)
    return model


def scores_of(model, chunk):
    """The scores `[Hkv, T]` of each sparse layer, as the attention asked for them."""
    found = []
    for method in sparse_layers(model):
        score = method.score
        method.score = lambda *args, score=score, **kwargs: found.append(score(*args, **kwargs)) or found[-1]
    with torch.no_grad():
        model(input_ids=chunk)
    for method in sparse_layers(model):
        del method.score
    return [scores[0].tolist() for scores in found]


def expected(scores, *, k, window, sinks):
    """A plain loop: always the sinks and the window, and the k best of the rest."""
    last = len(scores) - window
    rest = sorted(range(sinks, last), key=lambda i: (-scores[i], i))[:k]
    return [i < sinks or i >= last or i in rest for i in range(len(scores))]


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_decoder(tiny_llama, chunks, slope):
    budget = {"k": 5, "window": 6, "sinks": 2}
    model = patched(tiny_llama(), **budget, position_slope=slope)
    kept = kept_keys(model, chunks[:1])
    wanted = [expected(row, **budget) for layer in scores_of(model, chunks[:1]) for row in layer]
    assert kept.tolist() == wanted and len(wanted) == 4
    assert len({tuple(row) for row in wanted}) == 4  # the test would notice heads that are mixed up


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_encoder(tiny_bert, chunks, slope):
    model = patched(tiny_bert(), k=5, window=6, sinks=2, position_slope=slope)
    kept = kept_keys(model, chunks[:1])
    wanted = [
        expected(row, k=5, window=0, sinks=2)  # the window moves with the query
        for layer in scores_of(model, chunks[:1])
        for row in layer
    ]
    assert kept.tolist() == wanted and len(wanted) == 8
    assert not any(method.sparsek_scorer["default"]._forward_hooks for method in sparse_layers(model))


def test_description(tiny_llama, bert_tokenizer, chunks):
    model = patched(tiny_llama(num_hidden_layers=3), k=5, window=6, sinks=2, layers=[0, 2])
    found = describe_selection(model, bert_tokenizer, chunks, text_name="words")
    kept = torch.stack([kept_keys(model, chunk) for chunk in chunks.split(1)])
    assert [(row["layer"], row["head"]) for row in found["heads"]] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert found["edges"] == list(range(LENGTH + 1))
    torch.testing.assert_close(
        torch.tensor([row["kept"] for row in found["heads"]]), kept.float().mean(0), atol=1e-5, rtol=0
    )
    assert [count for _, count in found["tokens"]] == kept[0].sum(0).tolist()
    assert "".join(text for text, _ in found["tokens"]) == bert_tokenizer.decode(chunks[0])
    assert found["budget"] == {"k": 5, "window": 6, "sinks": 2, "slots": 13} and found["causal"]
    assert found["text"]["name"] == "words" and found["text"]["chunks"] == 3 and found["machine"]


def test_bins_of_a_long_text_are_means(tiny_llama, bert_tokenizer):
    tokens = torch.randint(5, 64, (1, 200), generator=torch.Generator().manual_seed(0))
    model = patched(tiny_llama(), k=5, window=6, sinks=2)
    found = describe_selection(model, bert_tokenizer, tokens)
    edges = found["edges"]
    assert edges[0] == 0 and edges[-1] == 200 and len(edges) == 65
    for row in found["heads"]:
        counts = [share * (b - a) for share, a, b in zip(row["kept"], edges[:-1], edges[1:], strict=True)]
        assert sum(counts) == pytest.approx(13, abs=0.01)  # all slots are taken


def test_pieces_put_the_text_together_again():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "def naïve():\n    return '💡 ok'  # and  spaces\n"
    tokens = tokenizer(text)["input_ids"]
    found = list(pieces(tokenizer, tokens))
    assert "".join(piece for piece, _, _ in found) == text
    assert [start for _, start, _ in found] == [0, *(stop for _, _, stop in found[:-1])] and found[-1][2] == len(tokens)
    bulb = [piece for piece in found if "💡" in piece[0]]
    assert len(bulb) == 1 and bulb[0][2] - bulb[0][1] > 1  # one character of several tokens


def test_broken_characters_end_somewhere():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    bulb = tokenizer("💡", add_special_tokens=False)["input_ids"]
    found = list(pieces(tokenizer, bulb[:1] * 9))
    assert found[-1][2] == 9 and all(stop - start <= 4 for _, start, stop in found)


def test_refuses(tiny_llama, bert_tokenizer, chunks):
    with pytest.raises(ValueError, match="expected a model with sparse attention in eval mode"):
        describe_selection(tiny_llama(), bert_tokenizer, chunks)
    with pytest.raises(ValueError, match="eval mode"):
        describe_selection(patched(tiny_llama(), k=5).train(), bert_tokenizer, chunks)
    with pytest.raises(DataError, match="expected chunks of more than the budget's 193 slots, got 40 tokens"):
        describe_selection(patched(tiny_llama(), k=125), bert_tokenizer, chunks)
    with pytest.raises(DataError, match="another model"):
        describe_selection(patched(tiny_llama(), k=2, window=2), bert_tokenizer, chunks + 100)
