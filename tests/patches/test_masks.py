"""The padding mask that modules of a patched model get."""

import pytest
import torch

from hf_sparse.patches.masks import padding_mask

COLUMNS = torch.tensor([[1, 1, 1], [0, 1, 1]])


def test_a_step_on_the_cpu_has_no_mask_where_nothing_is_padded():
    assert padding_mask(q_length=1, kv_length=1, attention_mask=COLUMNS) is None
    assert padding_mask(q_length=1, kv_length=2, attention_mask=COLUMNS).all()  # a cache of fixed size that is full
    assert torch.equal(padding_mask(q_length=1, kv_length=3, attention_mask=COLUMNS), COLUMNS.bool())


def test_a_mask_that_lacks_columns_is_padded_as_transformers_does():
    """A static cache has room for tokens that the mask does not know yet."""
    padded = padding_mask(q_length=1, kv_length=4, attention_mask=COLUMNS[:1])
    assert padded.tolist() == [[*COLUMNS[0].bool().tolist(), False]]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)], ids=["one dimension", "three"])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=rf"takes a padding mask \[B, T\], got one of shape \({shape[0]}"):
        padding_mask(q_length=3, kv_length=3, attention_mask=torch.ones(shape))
