"""`SparseKPress` scores and keeps what a patched model does, which runs in a process with newer packages."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kvpress
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from hf_sparse.bundled import CHECKPOINT
from hf_sparse.methods.sparsek.press import SparseKPress

ADAPTER = Path(__file__).parents[2] / "model_cards" / "demo-llama-sparsek-64"
SLOTS, LONG = 64, 256
IDS = torch.randint(4, 500, (2, LONG), generator=torch.Generator().manual_seed(0))

# Two prompts read by the patched model. The short one fits into the slots, so every layer has the inputs that it has in
# the dense model of kvpress, which drops keys after the prompt; in the long one that is true of the first layer.
REFERENCE = """
import sys
import torch
import hf_sparse
from hf_sparse._compat import cache_of
from hf_sparse.patches import sparse_layers
from safetensors.torch import load_file, save_file

ids = load_file(sys.argv[2])["ids"]
model = hf_sparse.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
scores = {}
for layer in sparse_layers(model):
    scorer = layer.sparsek_scorer[layer.active]
    scorer.register_forward_hook(lambda m, a, out, n=layer.layer: scores.update({f"scores.{n}": out.clone()}))
with torch.no_grad():
    model(ids[:, :64], use_cache=True)
    short = dict(scores)
    layer = cache_of(model(ids, use_cache=True)).layers[0]
order = layer.positions.argsort(-1)
kept = {"positions": layer.positions.gather(-1, order)}
for name in ("keys", "values"):
    tensor = getattr(layer, name)
    kept[name] = tensor.gather(2, order[..., None].expand_as(tensor)).contiguous()
save_file(short | kept, sys.argv[2])
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    path = folder / "tensors.safetensors"
    save_file({"ids": IDS}, path)
    # kvpress keeps as many keys in every head: the same scorers, without the shares of the heads.
    equal = shutil.copytree(ADAPTER, folder / "equal-heads")
    settings = json.loads((ADAPTER / "adapter_config.json").read_text("utf-8"))
    (equal / "adapter_config.json").write_text(json.dumps(settings | {"head_shares": None}))
    newest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", REFERENCE, str(equal), str(path)], env=newest, check=True)
    return load_file(path)


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def read(model, ids, slots):
    """Read a prompt with a press that leaves `slots` keys; returns the scores of every layer, and the cache."""
    press, scores = SparseKPress(compression_ratio=1 - slots / ids.shape[1], adapter=ADAPTER), {}
    score = press.score
    press.score = lambda module, *arguments: scores.setdefault(module.layer_idx, score(module, *arguments))
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache, use_cache=True)
    assert len(scores) == model.config.num_hidden_layers
    assert all(layer.keys.shape[2] == slots for layer in cache.layers)
    return press, scores, cache


def test_this_is_a_transformers_of_kvpress():
    assert tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 3)


def test_scores_are_those_of_the_patched_model(model, expected):
    press, scores, _ = read(model, IDS[:, :SLOTS], 40)
    between = slice(press.settings.sinks, SLOTS - press.settings.window)
    for n, own in scores.items():
        torch.testing.assert_close(own[..., between], expected[f"scores.{n}"][..., between], rtol=1e-4, atol=1e-4)
        assert own[..., : between.start].isinf().all() and own[..., between.stop :].isinf().all()


def test_what_is_kept_is_what_the_cache_of_the_patched_model_keeps(model, expected):
    """`SparseKPress`: trained scorers choose the keys that kvpress keeps of a prompt, as in the patched model."""
    _, scores, cache = read(model, IDS, SLOTS)
    kept = scores[0].topk(SLOTS).indices
    order = kept.argsort(-1)
    assert torch.equal(kept.gather(-1, order), expected["positions"])
    for name in ("keys", "values"):
        tensor = getattr(cache.layers[0], name)
        ordered = tensor.gather(2, order[..., None].expand_as(tensor))
        torch.testing.assert_close(ordered, expected[name], rtol=1e-5, atol=1e-5)


def test_the_pipeline_of_kvpress_answers(model):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    pipe = kvpress.KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    press = SparseKPress(compression_ratio=0.5, adapter=ADAPTER)
    answer = pipe("import os\nimport sys\n" * 20, question="import", press=press, max_new_tokens=5)["answer"]
    assert isinstance(answer, str) and answer


def test_what_cannot_be_scored_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="leaves 6 of 64 keys, expected at least the 4 sinks and the 16 of the window"):
        read(model, IDS[:, :64], 6)
    decoding = kvpress.DecodingPress(SparseKPress(compression_ratio=0.5, adapter=ADAPTER), 4, target_size=32)
    with pytest.raises(ValueError, match="expected the states of all"), torch.no_grad(), decoding(model):
        model.generate(IDS[:, :64], max_new_tokens=16, do_sample=False)
    with pytest.raises(ValueError, match="expected an adapter of type HF_SPARSE_SPARSEK, got 'HF_SPARSE_SPARSEFINDER'"):
        SparseKPress(adapter=ADAPTER.with_name("wiki-gpt2-sparsefinder"))
    settings = json.loads((ADAPTER / "adapter_config.json").read_text("utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_rank": 2}))
    with pytest.raises(ValueError, match="expected an adapter without LoRA, got lora_rank=2"):
        SparseKPress(adapter=tmp_path)
    small = copy.deepcopy(model)
    del small.model.layers[4:]
    with pytest.raises(ValueError, match=r"'num_attention_layers': 8}, expected .*'num_attention_layers': 4}"):
        read(small, IDS[:, :64], 40)
