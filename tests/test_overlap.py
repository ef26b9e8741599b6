"""What was trained on is told: by samples of hashes, and by everything that shows a measurement."""

import io
from copy import copy

import pytest
import torch
from rich.console import Console

from hf_sparse import SparsefinderConfig, SparseKConfig, overlap
from hf_sparse.adapters.report import write_report
from hf_sparse.data import IGNORED
from hf_sparse.errors import DataError
from hf_sparse.evaluation import table
from hf_sparse.finetune import FinetuneConfig
from hf_sparse.overlap import merged, sentence, sketch
from hf_sparse.workflow import create_adapter, evaluate_adapter, train_adapter

pytestmark = pytest.mark.usefixtures("blank_pictures_in_module")

CONFIGS = {
    "sparsek": SparseKConfig(k=6, window=8, sinks=2),
    "sparsefinder": SparsefinderConfig(rank=4, clusters=4, tile=8, window=8),
}


@pytest.fixture
def stream():
    return torch.randint(4, 5000, (40_000,), generator=torch.Generator().manual_seed(0))


def chunks_of(stream, length, bos=False):
    chunks = stream.unfold(0, length - bos, length - bos)
    return torch.cat([chunks.new_full((len(chunks), bos), 1), chunks], 1)


@pytest.mark.parametrize("length, bos", [(100, False), (101, True), (64, False), (250, True), (1000, False)])
def test_chunks_of_any_length_and_beginning_are_known_again(stream, length, bos):
    trained = sketch(chunks_of(stream[:20_000], 100))
    measured = chunks_of(stream, length, bos)
    found = overlap.overlap(trained, measured)
    half = 20_000 / (length - bos)
    assert abs(found["chunks"] - half) <= 1
    # Windows over the ends of training chunks are not there: 15 of 100.
    assert 0.8 * half * length <= found["tokens"] <= half * length
    assert overlap.overlap(trained, chunks_of(stream[20_000:], length, bos)) == {"chunks": 0, "tokens": 0}


def test_large_texts_are_sampled(stream, monkeypatch):
    monkeypatch.setattr(overlap, "_MOST", 500)
    halves = [chunks_of(part, 1000) for part in (stream[:10_000], stream[10_000:20_000])]
    whole, parts = sketch(torch.cat(halves)), merged(*map(sketch, halves))
    assert whole == parts and len(whole["hashes"]) == 500 * 8 and whole["below"] < 2**48
    found = overlap.overlap(whole, chunks_of(stream, 1000))
    assert found["chunks"] == 20 and found["tokens"] == pytest.approx(20_000, rel=0.02)


def test_hidden_tokens_are_those_that_were_hidden(stream):
    plain = chunks_of(stream[:5000], 100)
    hidden = torch.rand(plain.shape) < 0.3
    labels = plain.masked_fill(~hidden, IGNORED)
    assert sketch(plain.masked_fill(hidden, 4), labels) == sketch(plain)


def test_too_few_tokens_tell_nothing(stream):
    assert overlap.overlap(sketch(chunks_of(stream, 100)), chunks_of(stream, 10)) is None
    assert sentence({"chunks": 3, "trained_on": None}) == "Whether these chunks were trained on is not known."
    assert sentence({"chunks": 3}) == ""  # a file of an earlier version


@pytest.mark.parametrize("damage", [{"hashes": "AAAA!"}, {"hashes": "AAAA"}, {"below": "x"}, {"window": 5}])
def test_a_damaged_sketch_is_an_error(stream, damage):
    with pytest.raises(DataError, match=r"`trained_on` of finetune\.json is not what hf-sparse writes"):
        overlap.overlap({**sketch(chunks_of(stream, 100)), **damage}, chunks_of(stream, 100))


@pytest.mark.parametrize("method", ["sparsek", pytest.param("sparsefinder", marks=pytest.mark.full)])
def test_table_card_and_report_tell(method, tmp_path, tiny_llama, word_tokenizer):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    words = torch.randint(4, 64, (2000,)).tolist()
    text = " ".join(f"w{i}" for i in words)
    create_adapter(str(base), copy(CONFIGS[method]), folder)
    stages = {"warm_start_steps": 0} if method == "sparsek" else {"graph_steps": 1}
    settings = FinetuneConfig(steps=8, **stages, batch_size=1, progress=False)
    names = ["dense", "learned"] if method == "sparsek" else ["predicted"]
    options = {"length": 96, "selections": names, "device": "cpu"}

    def shown(result):
        console = Console(file=io.StringIO(), width=200)
        console.print(table(result))
        return console.file.getvalue()  # type: ignore[attr-defined]

    if method == "sparsek":  # the other predicts nothing yet
        result = evaluate_adapter(folder, text, "text", chunks=":6", **options)
        assert result["text"]["trained_on"] is None and "is not known" in shown(result)
    metrics = train_adapter(folder, text, settings, length=96, chunks=":4", device="cpu")
    assert metrics["settings"]["first_token"] == 1
    result = evaluate_adapter(folder, text, "text", chunks=":6", **options)
    assert result["text"]["first_token"] == 1
    assert result["text"]["trained_on"]["chunks"] == 4
    told = f"4 of the 6 chunks (about {result['text']['trained_on']['tokens']} tokens) were trained on."
    assert result["text"]["predicted_tokens"] == 6 * 95  # BOS is none of them
    page = write_report(folder).read_text("utf-8")
    for place in (shown(result), (folder / "README.md").read_text("utf-8"), page):
        assert told in place
        assert place == shown(result) or "each beginning with token 1" in place

    # Others, without BOS; then trained on as well, after the first ones.
    result = evaluate_adapter(folder, text, "text", chunks="10:12", bos=False, **options)
    assert result["text"]["first_token"] is None
    assert result["text"]["trained_on"] == {"chunks": 0, "tokens": 0} and "None of it was trained on" in shown(result)
    train_adapter(folder, text, settings, length=96, chunks="10:14", bos=False, device="cpu")
    for chosen, count in (("10:12", 2), (":4", 4), ("5:9", 0)):
        result = evaluate_adapter(folder, text, "text", chunks=chosen, **options)
        assert result["text"]["trained_on"]["chunks"] == count, chosen


def test_only_the_chunks_that_were_read_count(tmp_path, tiny_llama, word_tokenizer):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    text = " ".join(f"w{i}" for i in torch.randint(4, 64, (2000,)).tolist())
    create_adapter(str(base), copy(CONFIGS["sparsek"]), folder)
    settings = FinetuneConfig(steps=3, warm_start_steps=0, batch_size=1, progress=False)
    train_adapter(folder, text, settings, length=96, device="cpu")
    result = evaluate_adapter(folder, text, "text", chunks=":", length=96, selections=["learned"], device="cpu")
    assert result["text"]["chunks"] == 21 and result["text"]["trained_on"]["chunks"] == 3
