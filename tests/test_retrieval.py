"""Facts in training chunks: told before they are asked for, in a share of the chunks, with the text around them."""

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse import retrieval
from hf_sparse.data import pack
from hf_sparse.demo import CHECKPOINT
from hf_sparse.errors import DataError
from hf_sparse.evaluation.tasks import TASKS, Haystack
from hf_sparse.finetune import FinetuneConfig
from hf_sparse.finetune.stages import training_of
from hf_sparse.retrieval import KINDS, Fact, hide_facts
from hf_sparse.workflow import create_adapter, train_adapter

TEXT = Path(hf_sparse.__file__).with_name("workflow.py").read_text()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def chunks(tokenizer):
    return pack(tokenizer, TEXT, 384)[:8]


def test_a_share_of_the_chunks_has_facts_and_the_others_stay(tokenizer, chunks):
    mixed = hide_facts(tokenizer, chunks, 0.5)
    changed = (mixed != chunks).any(1)
    assert mixed.shape == chunks.shape and int(changed.sum()) == 4
    assert torch.equal(mixed[:, 0], chunks[:, 0])
    for row in changed.nonzero().squeeze(1):  # what is left of the text is its beginning, in order
        rest = iter(mixed[row].tolist())
        assert all(token in rest for token in chunks[row, : int(0.6 * 384)].tolist())
    assert torch.equal(mixed, hide_facts(tokenizer, chunks, 0.5))
    assert not torch.equal(mixed, hide_facts(tokenizer, chunks, 0.5, seed=1))
    assert torch.equal(hide_facts(tokenizer, chunks, 0), chunks)
    assert int((hide_facts(tokenizer, chunks, 0.01) != chunks).any(1).sum()) == 1


def test_what_is_asked_for_was_told_before(tokenizer, chunks, monkeypatch):
    monkeypatch.setattr(retrieval, "KINDS", [lambda random: Fact((f"Told {random.random()}.",), ("Asked.", "Asked."))])
    for chunk in hide_facts(tokenizer, chunks, 1.0):
        kinds = re.findall(r"Told|Asked", tokenizer.decode(chunk))
        open_questions = 0
        for kind in kinds:
            open_questions += 2 if kind == "Told" else -1
            assert open_questions >= 0
        assert open_questions == 0 and len(kinds) >= 3


def test_few_slots_can_keep_what_is_told(tokenizer, monkeypatch):
    chunks = pack(tokenizer, TEXT * 4, 4096)
    monkeypatch.setattr(retrieval, "KINDS", [lambda random: Fact(("Told one two three.",), ("Asked.",))])
    size = len(tokenizer(" Told one two three.", add_special_tokens=False)["input_ids"])
    told = [tokenizer.decode(chunk).count("Told") for chunk in hide_facts(tokenizer, chunks, 1.0)]
    assert all(32 // size <= count <= 256 // size for count in told) and len(set(told)) > 1


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS), ids=lambda kind: kind.__name__.strip("_"))
def test_an_answer_follows_from_what_is_told(kind):
    for seed in range(20):
        fact = kind(Random(seed))
        words = set(re.findall(r"[\w-]+", " ".join(fact.told)))
        for question in fact.asked:
            answer = re.findall(r"[\w-]+", question)[-1]
            assert answer in words and len(fact.told) >= 1


def test_wordings_are_not_those_of_the_tasks():
    told = " ".join(text for seed in range(300) for kind in KINDS for text in vars(kind(Random(seed)))["told"])
    for name in ("passkey", "multi_key", "variable_tracking"):
        example = TASKS[name].make(Random(0), Haystack(), (0.5,)).render(0)
        for phrase in re.findall(r"(?:pass key|magic number|VAR) ", example):
            assert phrase not in told


def test_refusals(tokenizer, chunks):
    with pytest.raises(ValueError, match=r"share of the chunks from 0 to 1, got 30"):
        hide_facts(tokenizer, chunks, 30)
    with pytest.raises(DataError, match="chunks of 12 tokens are too short for facts"):
        hide_facts(tokenizer, chunks[:, :12], 1.0)


def test_finetune_mixes_them_in_and_notes_it(tmp_path):
    create_adapter("demo", hf_sparse.SparseKConfig(k=20, window=8, sinks=4), tmp_path)
    config = FinetuneConfig(steps=1, warm_start_steps=0, batch_size=1, progress=False)
    options = {"chunks": ":2", "device": "cpu"}
    hashes = set()
    for share, length in ((0.0, 256), (1.0, 400)):  # a second run goes on, with longer chunks
        train_adapter(tmp_path, TEXT, config, retrieval=share, length=length, **options)
        written = json.loads((tmp_path / "finetune.json").read_text())
        assert written["settings"].get("retrieval", 0.0) == share and written["settings"]["length"] == length
        hashes.add(written["settings"]["chunks_sha256"])
    assert len(hashes) == 2


@pytest.mark.parametrize(("k", "length", "share"), [(188, 1024, 0.5), (188, 512, 0.0), (100, 1024, 0.0)])
def test_by_default_facts_are_hidden_where_the_slots_have_room_for_them(tiny_llama, k, length, share):
    model = get_peft_model(tiny_llama(), hf_sparse.SparseKConfig(k=k))
    training = training_of(model, FinetuneConfig())
    assert training.retrieval(torch.zeros(2, length, dtype=torch.long)) == share


def test_an_encoder_has_none(tmp_path, monkeypatch):
    import hf_sparse.workflow as workflow

    create_adapter("demo", hf_sparse.SparseKConfig(k=20, window=8, sinks=4), tmp_path)
    monkeypatch.setattr(workflow, "kind_of", lambda model: "masked")
    with pytest.raises(DataError, match="retrieval is for causal language models, got a model of kind 'masked'"):
        train_adapter(tmp_path, TEXT, FinetuneConfig(steps=1), retrieval=0.5, length=256, chunks=":2", device="cpu")
