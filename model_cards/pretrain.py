"""Train a small GPT-2 or BERT of our own, on one GPU in minutes, from freely licensed text.

    python model_cards/pretrain.py corpus --enwik8 enwik8.gz --books FOLDER --output CORPUS
    python model_cards/pretrain.py train gpt2 --corpus CORPUS --output OUT        # or bert
    python model_cards/pretrain.py card gpt2                                       # README.md from metrics.json

The corpus is articles of the English Wikipedia (the first megabytes of enwik8, markup removed) and novels of Project
Gutenberg. 1 article in 20 and two novels are held out. `OUT/checkpoint` is an ordinary Hugging Face folder (bf16
safetensors, fast tokenizer); `OUT/metrics.json` holds every number that the card quotes.
"""

import argparse
import gzip
import hashlib
import html
import json
import math
import re
import time
import zlib
from pathlib import Path

VOCAB, CONTEXT = 4096, 1024
SEPARATOR = "\x00"  # between documents in the corpus files
HELD_OUT_BOOKS = ("Dracula", "Pride-and-Prejudice")
SHAPE = {"hidden": 192, "layers": 7, "heads": 6}
MASKED = 0.2  # of the tokens while BERT trains; 0.15 are masked to measure
SHORT, SHORT_PART = 128, 0.6  # BERT first sees chunks of this length, for this part of the training

# --- text -----------------------------------------------------------------------------------------------------------


def plain(markup: str) -> str:
    """Wikipedia's markup without templates, tables, references, files and link targets."""
    text = html.unescape(html.unescape(markup))
    text = re.sub(r"<!--.*?-->|<(ref|math|gallery|timeline)\b[^>]*>.*?</\1>", "", text, flags=re.S)
    for opening, closing in ((r"\{\{", r"\}\}"), (r"\{\|", r"\|\}")):
        inner = re.compile(f"{opening}(?:(?!{opening}|{closing}).)*?{closing}", re.S)
        while inner.search(text):  # from the innermost outwards
            text = inner.sub("", text)
    text = re.sub(
        r"\[\[(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)?):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", text
    )
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"</?[a-zA-Z][^>]*>|'{2,}|^[ \t]*[*#:;]+ ?|^=+ *(.*?) *=+ *$", r"\1", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def make_corpus(enwik8: Path, books: Path, output: Path) -> None:
    raw = gzip.decompress(enwik8.read_bytes()).decode("utf-8", errors="ignore")
    documents: dict[str, list[str]] = {"train": [], "held_out_wiki": [], "held_out_books": []}
    for page in re.finditer(r"<title>(.*?)</title>.*?<text xml:space=\"preserve\">(.*?)</text>", raw, flags=re.S):
        title, text = page[1], plain(page[2])
        if len(text) < 1000 or page[2].lstrip().lower().startswith("#redirect") or ":" in title:
            continue
        documents["held_out_wiki" if zlib.crc32(title.encode()) % 20 == 0 else "train"].append(f"{title}\n\n{text}")
    for path in sorted(books.glob("*.txt")):
        text = path.read_text("utf-8-sig")
        body = re.split(r"\*\*\* ?(?:START|END) OF.*?\*\*\*", text)
        text = re.sub(r"(?<!\n)\n(?!\n)", " ", max(body, key=len).strip())  # paragraphs on one line
        documents["held_out_books" if path.stem.endswith(HELD_OUT_BOOKS) else "train"].append(text)
    output.mkdir(parents=True, exist_ok=True)
    for split, texts in documents.items():
        joined = SEPARATOR.join(texts)
        (output / f"{split}.txt.gz").write_bytes(gzip.compress(joined.encode(), mtime=0))
        print(f"{split}: {len(texts)} documents, {len(joined) / 1e6:.2f} M characters")


def read(corpus: Path, split: str) -> list[str]:
    return gzip.decompress((corpus / f"{split}.txt.gz").read_bytes()).decode().split(SEPARATOR)


# --- models ---------------------------------------------------------------------------------------------------------


def make_tokenizer(kind: str, texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = (text[i : i + 20_000] for text in texts for i in range(0, len(text), 20_000))
    if kind == "gpt2":
        end = "<|endoftext|>"
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
        )
        names = {"bos_token": end, "eos_token": end, "pad_token": end}
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=VOCAB, special_tokens=special, limit_alphabet=400, show_progress=False
        )
        names = {name.strip("[]").lower() + "_token": name for name in special}
    tokenizer.train_from_iterator(pieces, trainer)
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=CONTEXT, clean_up_tokenization_spaces=False, **names
    )


def make_model(kind: str, tokenizer):
    import torch
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    hidden, layers, heads = SHAPE["hidden"], SHAPE["layers"], SHAPE["heads"]
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_positions=CONTEXT,
                n_embd=hidden,
                n_layer=layers,
                n_head=heads,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    model = BertForMaskedLM(
        BertConfig(
            initializer_range=0.05,
            vocab_size=VOCAB,
            max_position_embeddings=CONTEXT,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            pad_token_id=tokenizer.pad_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    # Learned positions that start as sinusoids: a neighbour is a rotation away from the first step on. From random
    # ones this BERT did not get past the frequencies of words in 4,000 steps.
    table = model.bert.embeddings.position_embeddings.weight.data
    angle = torch.arange(CONTEXT)[:, None] * torch.exp(torch.arange(0, hidden, 2) * (-math.log(1000.0) / hidden))
    table[:, 0::2], table[:, 1::2] = 0.07 * angle.sin(), 0.07 * angle.cos()
    return model


def loss_of(kind: str, model, body, ids, tokenizer, masked: float):
    """Mean cross-entropy of the next token, or of the masked ones (80 % [MASK], 10 % another token, 10 % unchanged)."""
    import torch
    import torch.nn.functional as F

    if kind == "gpt2":
        hidden, target = body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1], ids[:, 1:]
        return F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), target.flatten())
    count = round(ids.shape[1] * masked)
    ids = ids.clone()
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    where = torch.rand(ids[:, 1:-1].shape, device=ids.device).argsort(-1)[:, :count] + 1
    target = ids.gather(1, where)
    draw = torch.rand(target.shape, device=ids.device)
    other = torch.randint(5, VOCAB, target.shape, device=ids.device)
    shown = torch.where(draw < 0.8, tokenizer.mask_token_id, torch.where(draw < 0.9, other, target))
    hidden = body(input_ids=ids.scatter(1, where, shown)).last_hidden_state
    hidden = hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))
    return F.cross_entropy(model.cls(hidden).float().flatten(0, 1), target.flatten())


# --- training -------------------------------------------------------------------------------------------------------


def train(kind: str, corpus: Path, output: Path, steps: int, seconds: float, batch: int, lr: float, seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.time()
    texts = {split: read(corpus, split) for split in ("train", "held_out_wiki", "held_out_books")}
    tokenizer = make_tokenizer(kind, texts["train"])
    end = [tokenizer.eos_token_id if kind == "gpt2" else tokenizer.sep_token_id]

    def encode(documents: list[str]) -> torch.Tensor:
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        return torch.tensor([token for document in encoded for token in document.ids + end], device=device)

    tokens = {split: encode(documents) for split, documents in texts.items()}
    sizes = {split: f"{len(t) / 1e6:.2f} M tokens" for split, t in tokens.items()}
    print(sizes, f"{time.time() - began:.0f} s", flush=True)

    model = make_model(kind, tokenizer).to(device)
    body = model.transformer if kind == "gpt2" else model.bert
    compiled = torch.compile(body, dynamic=False) if device == "cuda" else body
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device == "cuda")

    @torch.no_grad()
    def evaluate(split: str, length: int) -> float:
        state = torch.random.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
        torch.manual_seed(1)  # the same masks each time
        chunks = tokens[split][: len(tokens[split]) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:128, :length]
        with torch.autocast(device, dtype=torch.bfloat16):
            losses = [loss_of(kind, model, body, part, tokenizer, 0.15).item() for part in chunks.split(32)]
        torch.random.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])
        return sum(losses) / len(losses)

    # The schedule ends after `steps`, or after `seconds` where the machine is slower: a lease has an end.
    history, began, step, progress = [], time.time(), 0, 0.0
    while progress < 1:
        progress = max((step + 1) / steps, (time.time() - began) / seconds)
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
            group["lr"] = lr * min(1.0, (step + 1) / 300) * (0.02 + 0.98 * cosine)
        length = SHORT if kind == "bert" and progress < SHORT_PART else CONTEXT
        rows = batch * CONTEXT // length
        start = torch.randint(0, len(tokens["train"]) - length, (rows, 1), device=device)
        ids = tokens["train"][start + torch.arange(length, device=device)]
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(kind, model, compiled, ids, tokenizer, MASKED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 250 == 0 or progress >= 1:
            row = {"step": step, "length": length, "tokens": step * batch * CONTEXT, "train_loss": loss.item()}
            row |= {f"{split}_loss": evaluate(split, length) for split in tokens if split != "train"}
            history.append(row | {"seconds": time.time() - began})
            print(json.dumps(history[-1]), flush=True)

    model.to(torch.bfloat16).save_pretrained(output / "checkpoint")
    tokenizer.save_pretrained(output / "checkpoint")
    metrics = {
        "kind": kind,
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": {
            split: {
                "documents": len(documents),
                "characters": sum(map(len, documents)),
                "tokens": len(tokens[split]),
                "sha256": hashlib.sha256(SEPARATOR.join(documents).encode()).hexdigest(),
            }
            for split, documents in texts.items()
        },
        "settings": {"steps": step, "batch_sequences": batch, "context": CONTEXT, "lr": lr, "seed": seed},
        "history": history,
        "machine": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__},
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


# --- card -----------------------------------------------------------------------------------------------------------

CARD = """---
library_name: transformers
pipeline_tag: {tag}
license: cc-by-sa-3.0
language: [en]
tags: [hf-sparse, {kind}]
---

# wiki-{kind}

A small {title} that hf-sparse trained from nothing, so that its {title} patch can be tried and measured on a real checkpoint. It is a
test object: do not expect useful {use} from {millions:.1f} million parameters.

| | |
|---|---|
| parameters | {parameters:,} (bfloat16) |
| shape | {shape[layers]} layers, hidden size {shape[hidden]}, {shape[heads]} heads, vocabulary {vocab}, context {context} |
| training text | {train[tokens]:,} tokens, {train[documents]:,} documents: Wikipedia articles of enwik8 without markup, and six novels |
| held-out text | {held_out_wiki[tokens]:,} tokens of other articles (1 in 20), {held_out_books[tokens]:,} tokens of two other novels |
| training | {settings[steps]:,} steps of {settings[batch_sequences]} sequences{lengths}, AdamW, learning rate {settings[lr]}, seed {settings[seed]}, {last[seconds]:.0f} s on one {machine} |
| loss at the end | {last[train_loss]:.3f} in training{note}; held out: {last[held_out_wiki_loss]:.3f} on articles, {last[held_out_books_loss]:.3f} on novels |

Losses are nats per {unit}. How it was made: `model_cards/pretrain.py`; every number is from `metrics.json`, which it wrote. The
weights are in `checkpoint/`, in the repository but not in the wheel. Wikipedia's text is under CC BY-SA 3.0 and the GFDL, the novels are in
the public domain.
"""


def make_card(kind: str) -> None:
    here = Path(__file__).parent / f"wiki-{kind}"
    metrics = json.loads((here / "metrics.json").read_text())
    causal = kind == "gpt2"
    text = CARD.format(
        **metrics,
        **metrics["corpus"],
        title="GPT-2" if causal else "BERT",
        tag="text-generation" if causal else "fill-mask",
        use="text" if causal else "predictions",
        unit="token" if causal else "masked token (15 % are masked to measure)",
        note="" if causal else f" ({MASKED:.0%} masked)",
        lengths="" if causal else f" (in the first {SHORT_PART:.0%} of the time as many tokens in chunks of {SHORT})",
        millions=metrics["parameters"] / 1e6,
        shape=SHAPE,
        vocab=VOCAB,
        context=CONTEXT,
        last=metrics["history"][-1],
    )
    (here / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus")
    corpus.add_argument("--enwik8", type=Path, required=True)
    corpus.add_argument("--books", type=Path, required=True)
    corpus.add_argument("--output", type=Path, required=True)
    run = commands.add_parser("train")
    run.add_argument("kind", choices=("gpt2", "bert"))
    run.add_argument("--corpus", type=Path, required=True)
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("--steps", type=int, default=6000)
    run.add_argument("--seconds", type=float, default=600)
    run.add_argument("--batch", type=int, default=64)
    run.add_argument("--lr", type=float, default=2e-3)  # the published BERT: 1e-3, --steps 20000 --seconds 280
    run.add_argument("--seed", type=int, default=0)
    commands.add_parser("card").add_argument("kind", choices=("gpt2", "bert"))
    options = vars(parser.parse_args())
    {"corpus": make_corpus, "train": train, "card": make_card}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
