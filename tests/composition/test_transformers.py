"""Use a patched model with what comes with transformers, accelerate and torch."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    StaticCache,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_sparse._compat import with_cache
from hf_sparse.errors import UnsupportedModelError

METHODS = ("sparsek", "sparsefinder")
PROMPT = "import os\nimport sys\n" * 12


def test_trainer(make, tokenizer, ids, training, trained):
    """`Trainer` trains the scorers and nothing else."""
    model = make()
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trained(model, Trainer(model, TrainingArguments(**training), collator, data).train)


@pytest.mark.parametrize("method", METHODS)
def test_pipeline(make, tokenizer, method):
    """`pipeline("text-generation")` on `get_base_model()` writes what `generate` writes."""
    model = make(method=method)
    answer = pipeline("text-generation", model=model.get_base_model(), tokenizer=tokenizer)(
        PROMPT, max_new_tokens=5, do_sample=False
    )
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert answer[0]["generated_text"] == tokenizer.decode(tokens[0])


def test_streamer(make, tokenizer):
    """`TextIteratorStreamer` gets the text that `generate` returns, piece by piece."""
    model, prompt = make(), tokenizer(PROMPT, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # the name that all versions know
def test_chat_template(make, tokenizer):
    """A conversation by `apply_chat_template`, turn after turn in one cache, is one forward over all of it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    model = make().eval()
    talk = [{"role": "user", "content": "import os " * 20}, {"role": "assistant", "content": "import sys"}]
    both = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        whole = model(both).logits[:, -1]
        first = model(both[:, :-4], use_cache=True)
        rest = model(both[:, -4:], past_key_values=first.past_key_values).logits[:, -1]
    assert both.shape[1] > 40 and torch.allclose(rest, whole, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@torch.no_grad()
def test_deepcopy_and_pickle(make, ids, method, twin):
    """A copy by `copy.deepcopy` or pickle has the logits of the model, bit for bit."""
    model = make(method=method).eval()
    assert torch.equal(twin(model)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_device_map(make, ids):
    """A base loaded with `device_map` on one device is the same model."""
    assert torch.equal(make(device_map={"": "cpu"}).eval()(ids).logits, make().eval()(ids).logits)


def test_offloaded(make, tmp_path):
    """`device_map` with layers on disk is refused: nothing could be trained or scored there."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    with pytest.raises(UnsupportedModelError, match="the base model is offloaded"):
        make(device_map={**places, "model.layers": "disk"}, offload_folder=str(tmp_path))


def test_export(make, ids):
    """`torch.export` of a forward without a mask is refused: transformers gives it a mask of four dimensions."""

    class Forward(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    with pytest.raises(ValueError, match="unless it gets an attention_mask"):
        torch.export.export(Forward(make().get_base_model().eval()), (ids,))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_jit_trace(make, ids, method):
    """`torch.jit.trace`, which would keep the keys that one text selects for all others, is refused."""
    model = make(method=method).get_base_model().eval()
    model.config.use_cache = False
    with pytest.raises(ValueError, match=r"use torch\.compile or torch\.export"):
        torch.jit.trace(model, (ids, torch.ones_like(ids)), strict=False)


@torch.no_grad()
def test_export_of_a_forward(make, ids):
    """`torch.export` of a forward with an `attention_mask` and no cache has the logits of SparseK, at any length."""
    model = make().get_base_model().eval()
    length = torch.export.Dim("length", min=2, max=500)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    for tokens in (ids, ids[:, :70]):
        given = {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        torch.testing.assert_close(exported.module()(**given).logits, model(**given).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_export_of_a_step(make, ids):
    """`torch.export` of a decoding step, over a static cache that holds a prompt, has the logits of the step."""
    model = make().get_base_model().eval()
    caches = [StaticCache(config=model.config, max_cache_len=128) for _ in range(2)]
    for cache in caches:
        model(ids[:1, :-1], use_cache=True, **with_cache(cache))

    class Step(torch.nn.Module):
        def __init__(self, cache):
            super().__init__()
            self.model, self.cache = model, with_cache(cache)

        def forward(self, token, position, mask):
            return self.model(token, position_ids=position, attention_mask=mask, use_cache=True, **self.cache).logits

    length = ids.shape[1]
    step = ids[:1, -1:], torch.tensor([[length - 1]]), torch.ones(1, length, dtype=torch.long)
    exported = torch.export.export(Step(caches[0]), step, strict=False)
    torch.testing.assert_close(exported.module()(*step), Step(caches[1])(*step), rtol=0, atol=1e-5)


@torch.no_grad()
def test_compile_without_a_mask(make, ids):
    """`torch.compile(fullgraph=True)` of inference without a mask is refused for the same reason; give it a mask."""
    compiled = torch.compile(make().get_base_model().eval(), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="unless it gets an attention_mask"):
        compiled(ids, use_cache=False)


def test_data_parallel(make):
    """`torch.nn.DataParallel` is refused: nothing would be learned in its copies."""
    with pytest.raises(ValueError, match="DataParallel"):
        for module in make().modules():  # as torch.nn.parallel.replicate does
            module._replicate_for_data_parallel()
