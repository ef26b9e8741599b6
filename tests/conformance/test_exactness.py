"""Causal models: however a text reaches the model, its logits are those of one forward over the text alone."""

import random
from itertools import pairwise

import pytest
import torch

from hf_sparse.patches import sparse_layers

pytestmark = [pytest.mark.versions, pytest.mark.cross("values")]

KIND = "causal"
STEPS = 16


@pytest.mark.every_family
def test_left_padding(subject, measure):
    """A batch of mixed lengths, padded on the left, equals each row alone."""
    _padding(subject, measure, "left")


def test_right_padding(subject, measure):
    """A batch of mixed lengths, padded on the right, equals each row alone."""
    _padding(subject, measure, "right")


def _padding(subject, measure, side):
    """A batch of mixed lengths equals each row alone, in the prefill and in 16 steps after it."""
    ids, mask = subject.padded(side)
    more = torch.randint(4, 64, (len(ids), STEPS), generator=torch.Generator().manual_seed(1))
    if side == "right" and subject.local_layers:
        # transformers' own sliding windows count columns, padding between prompt and answer included: after right
        # padding no batch equals its rows, sparse or not.
        more = more[:, :0]
    prompt = ids.shape[1]
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    logits, _ = subject.in_chunks(subject.sparse, ids, [prompt] + [1] * more.shape[1], mask)
    for row, real in enumerate(mask.bool()):
        alone = ids[row : row + 1, real]
        measure.close(logits[row : row + 1, real], subject.logits(subject.sparse, alone))


def test_decoding(subject, measure):
    """A prefill and single tokens after it equal one forward at every position, whatever makes the choice."""
    length = subject.ids.shape[1]
    variants = [(subject.fresh(**settings), (length - 11,)) for settings in subject.method.variants]
    for model, prompts in ((subject.sparse, (1, length - STEPS)), *variants):
        expected = subject.logits(model, subject.ids)
        for prompt in prompts:
            chunks = [prompt] + [1] * (length - prompt)
            measure.close(subject.in_chunks(model, subject.ids, chunks)[0], expected)


def test_chunked_prefill(subject, measure):
    """Any split of a text equals one shot, and so do left-padded rows, whose first pieces are nothing but padding."""
    ids, mask = subject.padded("left")
    whole, padded = subject.logits(subject.sparse, subject.ids), subject.logits(subject.sparse, ids, mask)
    draw, length = random.Random(0), ids.shape[1]
    splits = []
    for pieces in (2, 6, 11):
        cuts = [0, *sorted(draw.sample(range(1, length), pieces - 1)), length]
        splits.append([end - begin for begin, end in pairwise(cuts)])
    for chunks in splits:
        measure.close(subject.in_chunks(subject.sparse, subject.ids, chunks)[0], whole)
    for chunks in (*splits, [1] * 35 + [length - 35]):
        logits, _ = subject.in_chunks(subject.sparse, ids, chunks, mask)
        measure.close(logits[mask.bool()], padded[mask.bool()])


def test_beams(subject, measure):
    """The scores of 4 beams are those of replays of the chosen sequences, by one forward and token by token."""
    ids, mask = subject.padded("left")
    output = subject.sparse.generate(
        ids,
        attention_mask=mask,
        num_beams=4,
        num_return_sequences=2,
        max_new_tokens=16,
        do_sample=False,
        length_penalty=1.0,
        no_repeat_ngram_size=2,  # text that goes round in circles would be a poor test
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = output.beam_indices
    assert (beams[:, 1:] != beams[:, :-1]).any(), "no beam ever moved to another row of the cache"
    sequences, prompt = output.sequences, ids.shape[1]
    mask = torch.cat([mask.repeat_interleave(2, 0), torch.ones_like(sequences[:, prompt:])], 1)
    replays = (
        subject.logits(subject.sparse, sequences, mask),
        subject.in_chunks(subject.sparse, sequences, [prompt] + [1] * (sequences.shape[1] - prompt), mask)[0],
    )
    for logits in replays:
        chosen = logits[:, prompt - 1 : -1].log_softmax(-1).gather(-1, sequences[:, prompt:, None])
        measure.close(chosen.squeeze(-1).mean(-1), output.sequences_scores)


def test_sampling(subject, measure):
    """Every sampled sequence was drawn from the logits of its own replay."""
    ids, mask = subject.padded("left")
    output = subject.sparse.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=16,
        return_dict_in_generate=True,
        output_logits=True,
    )
    sequences, prompt = output.sequences, ids.shape[1]
    assert len({tuple(row) for row in sequences[:, prompt:].tolist()}) == 9
    mask = torch.cat([mask.repeat_interleave(3, 0), torch.ones_like(sequences[:, prompt:])], 1)
    replay = subject.logits(subject.sparse, sequences, mask)
    measure.close(torch.stack(output.logits, 1), replay[:, prompt - 1 : -1])


def test_some_layers(subject, measure):
    """Sparse in one layer, dense in the others: padded rows equal each row alone, whole and in pieces."""
    model = subject.fresh(layers=[subject.last_layer])
    assert (subject.logits(model, subject.ids) - subject.logits(subject.sparse, subject.ids)).abs().max() > 0.05
    ids, mask = subject.padded("left")
    logits, _ = subject.in_chunks(model, ids, [45, 1, 1, 9, *[1] * 15], mask)
    for row, real in enumerate(mask.bool()):
        measure.close(logits[row : row + 1, real], subject.logits(model, ids[row : row + 1, real]))


def test_training(subject, measure):
    """With the attention of training (soft gates, all keys), padded rows equal each row alone."""
    model = subject.fresh()
    for method in sparse_layers(model):  # the model around it stays in eval mode: no dropout
        method.train()
    for side in ("left", "right"):
        ids, mask = subject.padded(side)
        logits = subject.logits(model, ids, mask)
        assert (logits - subject.logits(subject.sparse, ids, mask))[mask.bool()].abs().max() > 0.01
        for row, real in enumerate(mask.bool()):
            measure.close(logits[row : row + 1, real], subject.logits(model, ids[row : row + 1, real]))


@pytest.mark.every_family
def test_dense_limit(subject, measure):
    """With a budget for all keys, and in the first rows otherwise, dense attention."""
    expected, fits = subject.logits(subject.dense, subject.ids), subject.method.fits
    for settings in subject.method.whole:
        model = subject.fresh(**settings)
        measure.close(subject.logits(model, subject.ids), expected)
        chunks = [60] + [1] * (subject.ids.shape[1] - 60)
        measure.close(subject.in_chunks(model, subject.ids, chunks)[0], expected)
    measure.close(subject.logits(subject.sparse, subject.ids)[:, :fits], expected[:, :fits])


def test_no_future_leak(subject, measure):
    """Another token at t leaves every row before t bit for bit as it was."""
    expected = subject.logits(subject.sparse, subject.ids)
    for t in (1, 20, 45, subject.ids.shape[1] - 1):
        changed = subject.ids.clone()
        changed[:, t] = (changed[:, t] - 3) % 60 + 4  # another ordinary token
        logits = subject.logits(subject.sparse, changed)
        measure.equal(logits[:, :t], expected[:, :t])
        assert (logits[:, t:] - expected[:, t:]).abs().max() > 1e-3


def test_sparsity(subject, measure):
    """The tolerances above mean something: without the selection, or with another one, the logits are far away."""
    sparse = subject.logits(subject.sparse, subject.ids)
    measure.apart(sparse, subject.logits(subject.dense, subject.ids))
    measure.apart(sparse, subject.logits(subject.fresh(seed=1), subject.ids))
    measure.apart(sparse, subject.logits(subject.fresh(**subject.method.second), subject.ids))
