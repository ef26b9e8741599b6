"""Encoders: padding, heads, and the whole budget. Attaching, switching and saving are in `test_adapter.py`."""

import pytest
import torch

from hf_sparse import unpatch
from hf_sparse.patches import sparse_layers

pytestmark = [pytest.mark.versions, pytest.mark.cross("values")]

KIND = "encoder"
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


def _rows_alone(subject, measure, model, sides=("left", "right")):
    """A batch of mixed lengths equals each row alone."""
    for side in sides:
        ids, mask = subject.padded(side)
        logits = subject.logits(model, ids, mask)
        for row, real in enumerate(mask.bool()):
            alone = subject.logits(model, ids[row : row + 1, real])
            measure.close(logits[row : row + 1, real], alone)


@pytest.mark.every_family
def test_left_padding(subject, measure):
    """A batch of mixed lengths, padded on the left, equals each row alone."""
    _rows_alone(subject, measure, subject.sparse, ["left"])


def test_right_padding(subject, measure):
    """A batch of mixed lengths, padded on the right, equals each row alone."""
    _rows_alone(subject, measure, subject.sparse, ["right"])


def test_heads(subject, measure):
    """Every head of the family works patched, padded or not, and takes the patch off again."""
    ids, mask = subject.padded("right")
    for head in HEADS:
        base = subject.make(model=subject.family.model.removesuffix("ForMaskedLM") + head)
        dense = subject.logits(base, ids, mask)
        model = subject.fresh(model=base)
        sparse = subject.logits(model, ids, mask)
        assert (sparse - dense).abs().max() > 0.01
        for row, real in enumerate(mask.bool()):
            alone = subject.logits(model, ids[row : row + 1, real])
            # one row of logits per token, or one per text
            measure.close(sparse[row : row + 1, real] if alone.ndim == 3 else sparse[row : row + 1], alone)
        measure.equal(subject.logits(unpatch(model), ids, mask), dense)


@pytest.mark.every_family
def test_dense_limit(subject, measure):
    """With a budget for all keys, dense attention; so are the rows that fit, beside others that do not."""
    ids, mask = subject.padded("right")
    expected = subject.logits(subject.dense, ids, mask)
    for settings in subject.method.whole:
        measure.close(subject.logits(subject.fresh(**settings), ids, mask)[mask.bool()], expected[mask.bool()])
    shortest = mask.sum(-1).argmin()
    real = mask[shortest].bool()
    actual = subject.logits(subject.fresh(**subject.method.fitting(int(real.sum()))), ids, mask)
    measure.close(actual[shortest, real], expected[shortest, real])
    assert (actual - expected)[mask.bool()].abs().max() > 0.01


def test_nearest_only(subject, measure):
    """With the nearest keys alone, what all layers together cannot reach changes nothing."""
    model = subject.method.near(subject)
    changed = subject.ids.clone()
    changed[:, -1] = (changed[:, -1] - 3) % 60 + 4  # another ordinary token
    window = 12  # that of the local layers of a hybrid model, and no less than that of the sparse ones
    beyond = subject.ids.shape[1] - 1 - window * subject.base.config.num_hidden_layers
    expected, actual = subject.logits(model, subject.ids), subject.logits(model, changed)
    measure.equal(actual[:, :beyond], expected[:, :beyond])
    assert (actual[:, beyond:] - expected[:, beyond:]).abs().max() > 1e-3


def test_some_layers(subject, measure):
    """Sparse in one layer, dense in the others: padded rows equal each row alone."""
    model = subject.fresh(layers=[subject.last_layer])
    assert (subject.logits(model, subject.ids) - subject.logits(subject.sparse, subject.ids)).abs().max() > 0.01
    _rows_alone(subject, measure, model)


def test_training(subject, measure):
    """With the attention of training (soft gates, all keys), padded rows equal each row alone."""
    model = subject.fresh()
    for method in sparse_layers(model):  # the model around it stays in eval mode: no dropout
        method.train()
    assert (subject.logits(model, subject.ids) - subject.logits(subject.sparse, subject.ids)).abs().max() > 0.01
    _rows_alone(subject, measure, model)


def test_sparsity(subject, measure):
    """The tolerances above mean something: without the selection, or with another one, the logits are far away."""
    sparse = subject.logits(subject.sparse, subject.ids)
    measure.apart(sparse, subject.logits(subject.dense, subject.ids))
    measure.apart(sparse, subject.logits(subject.fresh(seed=1), subject.ids))
    measure.apart(sparse, subject.logits(subject.fresh(**subject.method.second), subject.ids))


def test_attention_matrices(subject, measure):
    """There are none."""
    with measure.refused(ValueError, "output_attentions=True is not supported"):
        subject.sparse(subject.ids, output_attentions=True)


def test_packed_batch(subject, measure):
    """A mask of four dimensions would be another attention: refused."""
    mask = torch.ones(len(subject.ids), 1, subject.ids.shape[1], subject.ids.shape[1], dtype=torch.bool)
    with measure.refused(ValueError, "sparse attention takes a padding mask"):
        subject.sparse(subject.ids, attention_mask=mask)
