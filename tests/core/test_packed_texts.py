"""Texts out of their rows and back: the attention of each by itself, in few batches with little padding."""

import pytest
import torch

from hf_sparse.core.packed_texts import PackedTexts, _Read, packed_texts

LENGTHS = ([3, 1, 9, 4, 1, 12], [17, 13])
NUMBERS = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def causal(query, key, value, *, hidden_states, valid, cache, scaling):
    """Attend densely, with a part of the hidden states added; what stands at padding is not a number."""
    assert cache is None and hidden_states.shape[:2] == (len(query), query.shape[2])
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    logits = query @ key.transpose(-1, -2) * scaling
    output = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ value
    output = output + hidden_states[:, None, :, : value.shape[-1]]
    return output if valid is None else output.masked_fill(~valid[:, None, :, None], torch.nan)


def inputs():
    rows, length = NUMBERS.shape
    shapes = (rows, 4, length, 8), (rows, 2, length, 8), (rows, 2, length, 8), (rows, length, 12)
    return [draw(*shape).requires_grad_() for shape in shapes]


def run(query, key, value, hidden_states):
    return PackedTexts(NUMBERS).attend(causal, query, key, value, hidden_states=hidden_states, scaling=0.3)


def run_alone(query, key, value, hidden_states):
    rows = []
    for row, lengths in enumerate(LENGTHS):
        parts = [tensor[row : row + 1].split(lengths, 2) for tensor in (query, key, value)]
        hidden = hidden_states[row : row + 1].split(lengths, 1)
        texts = zip(*parts, hidden, strict=True)
        rows.append(
            torch.cat(
                [causal(q, k, v, hidden_states=h, valid=None, cache=None, scaling=0.3) for q, k, v, h in texts], 2
            )
        )
    return torch.cat(rows)


def test_each_text_is_attended_to_alone_and_so_are_its_gradients():
    tensors = inputs()
    packed, alone = run(*tensors), run_alone(*tensors)
    torch.testing.assert_close(packed, alone)
    weight = draw(*packed.shape)
    gradients = (torch.autograd.grad((output * weight).sum(), tensors) for output in (packed, alone))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_texts_of_about_the_same_length_come_together():
    texts = PackedTexts(NUMBERS)
    # Lengths 1 | 3, 4 | 9, 12, 13 | 17; no padding but where lengths differ.
    assert [tuple(batch.tokens.shape) for batch in texts.batches] == [(2, 1), (2, 4), (3, 13), (1, 17)]
    assert [batch.valid is None for batch in texts.batches] == [True, False, False, True]
    assert sum(int(b.tokens.numel()) for b in texts.batches) < 2 * NUMBERS.numel()


def test_a_number_that_comes_again_is_another_text():
    texts = PackedTexts(torch.tensor([[0, 0, 1, 0, 0]]))
    assert [tuple(batch.tokens.shape) for batch in texts.batches] == [(1, 1), (2, 2)]


def test_boundaries_are_read_once():
    boundaries = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    texts = packed_texts(boundaries, (1, 10))
    assert texts.numbers.tolist() == [[1, 1, 1, *[3] * 7]]
    assert packed_texts(boundaries, (1, 10)) is texts
    assert packed_texts(boundaries.clone(), (1, 10)) is not texts


@pytest.mark.parametrize("inference", [False, True])
def test_a_buffer_that_is_filled_anew_is_read_anew(inference):
    with torch.inference_mode(inference):
        boundaries = torch.tensor([0, 3, 10], dtype=torch.int32)
        first = packed_texts(boundaries, (1, 10))
        assert packed_texts(boundaries, (1, 10)) is first
        boundaries.copy_(torch.tensor([0, 6, 10]))
        assert packed_texts(boundaries, (1, 10)).numbers.tolist() == [[1] * 6 + [2] * 4]


def test_what_another_thread_reads_meanwhile_is_not_returned(monkeypatch):
    boundaries, other = torch.tensor([0, 3, 10]), torch.tensor([0, 6, 10])
    texts, is_of = packed_texts(boundaries, (1, 10)), _Read.is_of

    def is_of_while_another_comes(known, marks, shape):
        found = is_of(known, marks, shape)
        with monkeypatch.context() as patched:
            patched.setattr(_Read, "is_of", is_of)
            packed_texts(other, (1, 10))
        return found

    monkeypatch.setattr(_Read, "is_of", is_of_while_another_comes)
    assert packed_texts(boundaries, (1, 10)) is texts


@pytest.mark.parametrize(
    "boundaries, shape, message",
    [
        ([0, 4, 9], (1, 10), r"must rise from 0 to the 10 tokens of the row, got \[0, 4, 9\]"),
        ([1, 10], (1, 10), r"got \[1, 10\]"),
        ([0, 6, 4, 10], (1, 10), r"got \[0, 6, 4, 10\]"),
        ([10], (1, 10), r"got \[10\]"),
        ([0, 10], (2, 10), "are one row, got a batch of 2"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(boundaries, shape, message):
    with pytest.raises(ValueError, match=message):
        packed_texts(torch.tensor(boundaries), shape)
