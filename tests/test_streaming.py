"""Streamed datasets: documents keep apart, rows without text are counted, and the same seed gives the same chunks."""

import json

import datasets
import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoTokenizer

from hf_sparse.data import pack_documents
from hf_sparse.demo import CHECKPOINT
from hf_sparse.errors import DataError
from hf_sparse.finetune import FinetuneConfig
from hf_sparse.methods.sparsek import SparseKConfig
from hf_sparse.texts import Documents
from hf_sparse.workflow import create_adapter, train_adapter

TEXTS = [f"def number_{n}():\n    return {n}\n" * (3 * n + 1) for n in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(params=["jsonl", "parquet"])
def file(request, tmp_path):
    rows = [{"text": text} for text in TEXTS] + [{"text": None}, {"text": "  "}]
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def test_rows_are_shuffled_by_the_seed_and_bad_ones_counted(file):
    streams = [Documents(str(file), None, "train", "text", seed) for seed in (0, 0, 1)]
    orders = [list(stream) for stream in streams]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(TEXTS)
    assert (streams[0].rows, streams[0].bad) == (14, 2)
    with pytest.raises(DataError, match=r"column 'words' .* holds no text in 14 rows"):
        list(Documents(str(file), None, "train", "words", 0))


def test_a_dataset_of_the_hub_is_streamed(hub):
    """By its id, from several files of rows; a name that the Hub does not know is an error before training."""
    api, name = HfApi(), f"{hub.user}/stories"
    api.create_repo(name, repo_type="dataset")
    for part in (0, 1):
        rows = [{"story": text} for text in TEXTS[part::2]] + [{"story": None}]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        api.upload_file(path_or_fileobj=content, path_in_repo=f"train-{part}.jsonl", repo_id=name, repo_type="dataset")
    stream = Documents(name, None, "train", "story", 0)
    assert sorted(stream) == sorted(TEXTS) and (stream.rows, stream.bad) == (14, 2)
    with pytest.raises(DataError, match=r"the dataset '.*/nothing' cannot be loaded"):
        Documents(f"{hub.user}/nothing", None, "train", "story", 0)


def test_chunks_of_documents(tokenizer):
    length = 32
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    chunks, counts = pack_documents(tokenizer, TEXTS, length, most=1000, separate=True, bos=False)
    expected = [one[i : i + length] for one in ids for i in range(0, len(one) - length + 1, length)]
    assert chunks.tolist() == expected
    assert counts["too_short"] == sum(len(one) < length for one in ids)
    assert counts["tokens_left_out"] + chunks.numel() == sum(map(len, ids))
    joined, counts = pack_documents(tokenizer, TEXTS, length, most=1000, separate=False, bos=False)
    words = [token for text in TEXTS for token in tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]]
    assert joined.flatten().tolist() == words[: joined.numel()] and counts["too_short"] == 0
    some, counts = pack_documents(tokenizer, iter(TEXTS), length, most=5, separate=False, bos=False)
    assert torch.equal(some, joined[:5]) and counts["documents"] < len(TEXTS)
    with pytest.raises(DataError, match="1 documents fill no chunk of 4096 tokens"):
        pack_documents(tokenizer, TEXTS[:1], 4096, most=5, separate=True, bos=False)


def test_a_run_reads_what_it_takes(file, tmp_path):
    create_adapter("demo", SparseKConfig(k=4, window=4, sinks=1), tmp_path / "adapter")
    config = FinetuneConfig(steps=3, warm_start_steps=0, batch_size=2, progress=False)
    rows = Documents(str(file), None, "train", "text", config.seed)
    told = train_adapter(tmp_path / "adapter", rows, config, length=32, separate=True, device="cpu")
    assert told["settings"]["chunks"] == 3 * 2 and told["documents"]["rows"] == rows.rows
    assert told["documents"]["rows_without_text"] == rows.bad
