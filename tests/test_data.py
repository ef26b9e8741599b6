"""Text to chunks, and chunks to what a masked language model is asked."""

import datasets
import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from hf_sparse.data import (
    IGNORED,
    check_chunks,
    context_length,
    fingerprint,
    first_token,
    mask_tokens,
    pack,
    prompt_tokens,
    read_text,
    tensors,
)
from hf_sparse.errors import DataError
from hf_sparse.texts import read_dataset

CLS, SEP, MASK = 2, 3, 4


@pytest.fixture
def chunks(bert_tokenizer):
    words = torch.randint(5, 64, (2000,)).tolist()
    return pack(bert_tokenizer, " ".join(f"w{i}" for i in words), 102, special_tokens=True)


class TestBos:
    TEXT = " ".join(f"w{i}" for i in range(4, 25))  # 21 tokens

    @pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>"])
    def test_every_chunk_begins_as_the_tokenizer_begins_a_text(self, word_tokenizer, template):
        chunks = pack(word_tokenizer(template), self.TEXT, 8)
        assert chunks.tolist() == [[1, *range(start, start + 7)] for start in (4, 11, 18)]

    @pytest.mark.parametrize("template", ["$A", "$A <eos>"])
    def test_a_tokenizer_that_adds_none_adds_none_unless_asked(self, word_tokenizer, template):
        tokenizer = word_tokenizer(template)  # it has a BOS token, as GPT-2's has
        assert pack(tokenizer, self.TEXT, 7).tolist() == [list(range(start, start + 7)) for start in (4, 11, 18)]
        assert pack(tokenizer, self.TEXT, 8, bos=True)[:, 0].tolist() == [1, 1, 1]

    def test_the_caller_can_leave_it_out(self, word_tokenizer):
        tokenizer = word_tokenizer()
        assert torch.equal(pack(tokenizer, self.TEXT, 7, bos=False), pack(word_tokenizer("$A"), self.TEXT, 7))

    def test_overlapping_chunks_begin_with_it_too(self, word_tokenizer):
        chunks = pack(word_tokenizer(), self.TEXT, 8, stride=3)
        assert chunks.tolist() == [[1, *range(start, start + 7)] for start in range(4, 19, 3)]

    def test_what_cannot_be_is_refused(self, word_tokenizer, bert_tokenizer):
        with pytest.raises(DataError, match=r"the tokenizer \w+ has no BOS token .* bos=False"):
            pack(word_tokenizer("$A", bos_token=None), self.TEXT, 8, bos=True)
        with pytest.raises(DataError, match="one token at most, got 2"):
            pack(word_tokenizer("<bos> <bos> $A"), self.TEXT, 8)
        with pytest.raises(ValueError, match="bos is for decoders"):
            pack(bert_tokenizer, self.TEXT, 8, special_tokens=True, bos=False)

    @pytest.mark.parametrize("template, start", [("<bos> $A <eos>", [1]), ("$A", []), ("$A <eos>", [])])
    def test_prompts_begin_as_texts_and_do_not_end(self, word_tokenizer, template, start):
        assert prompt_tokens(word_tokenizer(template), "w5 w6") == [*start, 5, 6]

    def test_what_chunks_have_in_common_is_told(self, word_tokenizer, tiny_llama):
        model = tiny_llama()
        assert first_token(model, pack(word_tokenizer(), self.TEXT, 8)) == 1
        assert first_token(model, pack(word_tokenizer(), self.TEXT, 22)) == 1  # the model's own BOS
        assert first_token(model, pack(word_tokenizer("$A"), self.TEXT, 7)) is None
        assert first_token(model, pack(word_tokenizer("$A"), self.TEXT, 21)) is None


def test_a_byte_order_mark_is_no_token(tmp_path, word_tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("w5 w6 w7", "utf-8-sig")
    assert read_text(path) == "w5 w6 w7"
    tokenizer = word_tokenizer()
    assert pack(tokenizer, "\ufeffw5 w6 w7", 4).tolist() == [[1, 5, 6, 7]]
    path.write_text("", "utf-8-sig")
    with pytest.raises(DataError, match="holds no text"):
        read_text(path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "\\ufeffw5 w6"}\n')
    assert read_dataset(str(rows)) == "w5 w6"


def test_padding_and_other_labels_are_refused(tiny_llama):
    ids = torch.randint(5, 64, (2, 20))
    padded = torch.ones_like(ids)
    padded[0, 15:] = 0
    with pytest.raises(DataError, match="hold padding"):
        tensors(tiny_llama(), {"input_ids": ids, "attention_mask": padded})
    with pytest.raises(DataError, match="labels other than the tokens"):
        tensors(tiny_llama(), {"input_ids": ids, "labels": ids.masked_fill(padded == 0, IGNORED)})
    positions = torch.arange(20).expand(2, -1)
    with pytest.raises(DataError, match=r"several texts each \(position_ids that restart\)"):
        tensors(tiny_llama(), {"input_ids": ids, "position_ids": positions % 13})
    assert torch.equal(tensors(tiny_llama(), {"input_ids": ids, "position_ids": positions})[0], ids)
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    assert torch.equal(tensors(tiny_llama(), rows)[0], ids)


class TestPack:
    TEXT = " ".join(f"w{i}" for i in range(5, 15))

    def test_special_tokens_frame_every_chunk(self, bert_tokenizer):
        expected = [[CLS, 5, 6, 7, SEP], [CLS, 8, 9, 10, SEP], [CLS, 11, 12, 13, SEP]]
        assert pack(bert_tokenizer, self.TEXT, 5, special_tokens=True).tolist() == expected

    def test_text_alone(self, bert_tokenizer):
        assert pack(bert_tokenizer, self.TEXT, 5).tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]

    def test_stride(self, bert_tokenizer):
        expected = [[5, 6, 7, 8, 9], [8, 9, 10, 11, 12]]
        assert pack(bert_tokenizer, self.TEXT, 5, stride=3).tolist() == expected
        for stride in (0, 6):
            with pytest.raises(DataError, match=f"stride must be 1 to 5 tokens, got {stride}"):
                pack(bert_tokenizer, self.TEXT, 5, stride=stride)

    def test_a_tokenizer_without_them_adds_none(self, bert_tokenizer):
        bert_tokenizer.cls_token = bert_tokenizer.sep_token = None
        assert torch.equal(pack(bert_tokenizer, self.TEXT, 5, special_tokens=True), pack(bert_tokenizer, self.TEXT, 5))

    def test_refusals(self, bert_tokenizer):
        with pytest.raises(DataError, match="expected one text, got list: join several"):
            pack(bert_tokenizer, [self.TEXT], 5)
        with pytest.raises(DataError, match="length must be at least 4 tokens, got 3"):
            pack(bert_tokenizer, self.TEXT, 3, special_tokens=True)
        with pytest.raises(
            DataError, match=r"the text has 10 tokens, fewer than one chunk of 11: .* a length below 13 \(`--length`"
        ):
            pack(bert_tokenizer, self.TEXT, 13, special_tokens=True)


class TestMaskTokens:
    def test_hides_15_percent_of_the_ordinary_tokens(self, bert_tokenizer, chunks):
        masked = mask_tokens(bert_tokenizer, chunks)
        hidden = masked["labels"] != IGNORED
        assert hidden.sum(1).tolist() == [15] * len(chunks)  # of 100 words
        assert not hidden[:, [0, -1]].any()
        assert torch.equal(masked["labels"][hidden], chunks[hidden])
        assert (masked["input_ids"][hidden] == MASK).all()
        assert torch.equal(masked["input_ids"][~hidden], chunks[~hidden])

    def test_corrupts_as_bert_does(self, bert_tokenizer, chunks):
        masked = mask_tokens(bert_tokenizer, chunks.repeat(20, 1), corrupt=True)
        hidden = masked["labels"] != IGNORED
        now, before = masked["input_ids"][hidden], masked["labels"][hidden]
        assert (now == MASK).float().mean() == pytest.approx(0.8, abs=0.03)
        assert (now == before).float().mean() == pytest.approx(0.1, abs=0.02)
        assert torch.equal(masked["input_ids"][~hidden], chunks.repeat(20, 1)[~hidden])

    @pytest.mark.parametrize("corrupt", [False, True])
    def test_seed_and_number_of_the_chunk_decide(self, bert_tokenizer, chunks, corrupt):
        first, again = (mask_tokens(bert_tokenizer, chunks, corrupt=corrupt) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        some = mask_tokens(bert_tokenizer, chunks[:3], corrupt=corrupt)
        assert all(torch.equal(first[name][:3], some[name]) for name in first)
        other = mask_tokens(bert_tokenizer, chunks, seed=1, corrupt=corrupt)
        assert not torch.equal(first["labels"], other["labels"])
        same_text = mask_tokens(bert_tokenizer, chunks[:1].repeat(2, 1), corrupt=corrupt)["labels"]
        assert not torch.equal(same_text[0], same_text[1])

    def test_refusals(self, bert_tokenizer, chunks):
        with pytest.raises(DataError, match="chunk 1 holds nothing but special tokens"):
            mask_tokens(bert_tokenizer, torch.tensor([[CLS, 7, SEP], [CLS, 0, SEP]]))
        bert_tokenizer.mask_token = None
        with pytest.raises(DataError, match="has no mask token"):
            mask_tokens(bert_tokenizer, chunks)


class TestTensors:
    def test_labels_are_for_masked_models(self, tiny_bert, tiny_llama, bert_tokenizer, chunks):
        masked = mask_tokens(bert_tokenizer, chunks)
        rows = datasets.Dataset.from_dict({name: tensor.tolist() for name, tensor in masked.items()})
        for dataset in (masked, rows):
            tokens, labels = tensors(tiny_bert(), dataset)
            assert torch.equal(tokens, masked["input_ids"]) and torch.equal(labels, masked["labels"])
            with pytest.raises(DataError, match="labels other than the tokens"):
                tensors(tiny_llama(), dataset)
        assert tensors(tiny_bert("BertModel"), chunks) == (chunks, None)

    def test_refusals(self, tiny_bert, chunks):
        with pytest.raises(DataError, match=r"hidden tokens and their labels: hf_sparse.data.mask_tokens"):
            tensors(tiny_bert(), chunks)
        with pytest.raises(DataError, match="a dataset with `labels`, got dict"):
            tensors(tiny_bert(), {"input_ids": chunks})
        with pytest.raises(DataError, match="labels must have the shape of the tokens"):
            tensors(tiny_bert(), {"input_ids": chunks, "labels": chunks[:, 1:]})

    def test_check(self, tiny_bert, bert_tokenizer, chunks):
        masked = mask_tokens(bert_tokenizer, chunks)
        check_chunks(tiny_bert(), masked["input_ids"], masked["labels"])
        with pytest.raises(DataError, match="tokens must be 0 to 63, got 64 to 64"):
            check_chunks(tiny_bert(), chunks, torch.full_like(chunks, 64))
        with pytest.raises(DataError, match="every chunk needs a token to be predicted"):
            check_chunks(tiny_bert(), chunks, masked["labels"].where(torch.arange(len(chunks))[:, None] != 1, IGNORED))


def test_context_length(tiny_bert, tiny_llama):
    assert context_length(tiny_bert()) == 128 and context_length(tiny_llama()) == 512
    # RoBERTa's first position is the one after padding's.
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    roberta = RobertaModel(RobertaConfig(**settings, vocab_size=64, max_position_embeddings=34, pad_token_id=1)).eval()
    assert context_length(roberta) == 32
    roberta(input_ids=torch.full((1, 32), 5))
    with pytest.raises(RuntimeError, match="out of bounds"):
        roberta(input_ids=torch.full((1, 33), 5))


def test_fingerprint_tells_other_labels(chunks):
    assert fingerprint(chunks) == fingerprint(chunks, None) != fingerprint(chunks, chunks)
