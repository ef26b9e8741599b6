"""Sentence-Transformers with a patched encoder inside."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from peft import get_peft_model

import hf_sparse

st = pytest.importorskip("sentence_transformers", reason="needs the extra `composition`: run `make composition`")
models, losses = (pytest.importorskip(f"sentence_transformers.{name}") for name in ("models", "losses"))

BERT = Path(__file__).parents[2] / "model_cards" / "wiki-bert" / "checkpoint"
TEXTS = ["the city of paris is the capital of france " * 12, "a river flows to the sea " * 20]


@pytest.fixture
def sentences():
    transformer = models.Transformer(str(BERT))
    return st.SentenceTransformer(modules=[transformer, models.Pooling(transformer.get_word_embedding_dimension())])


def test_encode(sentences):
    """`SentenceTransformer.encode` uses the patch, and unpatched it is as before."""
    dense = sentences.encode(TEXTS)
    bert = sentences[0].model
    hf_sparse.patch(bert, hf_sparse.SparseKConfig(k=24, window=8, sinks=1))
    sparse = sentences.encode(TEXTS)
    hf_sparse.unpatch(bert)
    assert np.abs(sparse - dense).max() > 0.05
    np.testing.assert_array_equal(sentences.encode(TEXTS), dense)


def test_trainer(sentences, training, trained, tmp_path):
    """`SentenceTransformerTrainer` trains the scorers, and `save` writes the adapter."""
    config = hf_sparse.SparseKConfig(k=24, window=8, sinks=1)
    sentences[0].model = get_peft_model(sentences[0].model, config)
    trainer = st.SentenceTransformerTrainer(
        sentences,
        st.SentenceTransformerTrainingArguments(**training),
        train_dataset=Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
        loss=losses.MultipleNegativesRankingLoss(sentences),
    )
    trained(sentences, trainer.train)
    sentences.save(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_add_adapter(sentences):
    """`add_adapter`, which is transformers' own, is refused by transformers 5.24: it wants a PEFT that is not out."""
    with pytest.raises(ValueError, match="version of PEFT you are using is not compatible"):
        sentences.add_adapter(hf_sparse.SparseKConfig(k=24, window=8, sinks=1))
