"""`generate` and `chat`: what they print is what the model says, the cache goes on, and mistakes are one line."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from hf_sparse import SparseKConfig, cli, workflow
from hf_sparse._compat import cache_of
from hf_sparse.base_model import CHECKPOINT
from hf_sparse.data import prompt_tokens
from hf_sparse.evaluation.show import readable_bytes
from hf_sparse.patches.cache import kv_bytes

PROMPT = "def parse(text):\n    "
NEW = 12
OPTIONS = ["--max-new-tokens", str(NEW), "--device", "cpu"]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "demo"
    workflow.create_adapter("demo", SparseKConfig(k=8, window=8, sinks=2), folder)
    return folder


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """An adapter of a base model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    AutoModelForCausalLM.from_pretrained(CHECKPOINT).save_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    workflow.create_adapter(str(folder / "base"), SparseKConfig(k=8, window=8, sinks=2), folder / "adapter")
    return folder / "adapter"


def invoke(*arguments, text=""):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=text)


def said(folder, *texts):
    """Return what the model says to each text, with all that came before in front of it; without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(CHECKPOINT), folder).eval().float()
    ids, answers = prompt_tokens(tokenizer, ""), []
    for text in texts:
        ids = ids + tokenizer(text, add_special_tokens=False)["input_ids"]
        output = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, use_cache=False)[0].tolist()
        answers.append(tokenizer.decode(output[len(ids) :], skip_special_tokens=True))
        ids = output
    return answers


def test_generate_prints_what_the_model_says_and_what_it_took(folder):
    result = invoke("generate", folder, "--prompt", PROMPT, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert result.stdout == said(folder, PROMPT)[0] + "\n"
    assert f"{NEW} tokens, the first after" in result.stderr and "tokens/s after it; KV cache " in result.stderr
    assert invoke("generate", folder, "--prompt", "-", *OPTIONS, text=PROMPT).stdout == result.stdout


@pytest.mark.parametrize("settings", [{}, {"head_shares": [[0.5, 1.5]] * 8}], ids=["equal", "divided"])
def test_the_size_of_the_dense_cache_is_that_of_the_base_model(tmp_path, settings):
    """With divided heads, as `finetune` leaves them, the keys of a layer lie in another shape."""
    workflow.create_adapter("demo", SparseKConfig(k=8, window=8, sinks=2, **settings), tmp_path / "adapter")
    result = invoke("generate", tmp_path / "adapter", "--prompt", PROMPT, *OPTIONS)
    assert result.exit_code == 0, result.output
    prompt = prompt_tokens(AutoTokenizer.from_pretrained(CHECKPOINT), PROMPT)
    dense = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    text = torch.tensor([prompt * 9])[:, : len(prompt) + NEW - 1]  # the last token of the answer is not in the cache
    cache = cache_of(dense(text, use_cache=True))
    slots = kv_bytes(cache) * 18 // text.shape[1]
    assert f"KV cache {readable_bytes(slots)}, of dense attention {readable_bytes(kv_bytes(cache))}\n" in result.stderr


def test_an_answer_that_the_positions_of_the_model_cut_says_so(folder):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt = "x = 1\n" * 400
    left = 2048 - len(prompt_tokens(tokenizer, prompt))
    assert 0 < left < 256
    result = invoke("generate", folder, "--prompt", prompt, "--device", "cpu", "--max-new-tokens", left + 1)
    assert f"{left} tokens, the first" in result.stderr, result.output
    assert result.stderr.endswith("; the model has 2,048 positions and stops there\n")
    result = invoke("generate", folder, "--prompt", prompt, "--device", "cpu", "--max-new-tokens", left)
    assert f"{left} tokens, the first" in result.stderr and "positions" not in result.stderr


def test_sampling_follows_its_seed(folder):
    arguments = ["generate", folder, "--prompt", PROMPT, *OPTIONS, "--temperature", "1.5"]
    first, again, other = (invoke(*arguments, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_chat_without_a_template_goes_on_with_the_text(folder):
    result = invoke("chat", folder, *OPTIONS, text="class A:\n\ndef b(\n/new\nimport\n/exit\nnever read\n")
    assert result.exit_code == 0, result.output
    expected = [*said(folder, "class A:", "def b("), *said(folder, "import")]
    assert result.stdout == "".join(f"{answer}\n" for answer in expected)
    assert "the tokenizer has no chat template" in result.stderr and result.stderr.count("KV cache") == 3


def test_chat_follows_the_template_of_the_tokenizer(chatty):
    result = invoke("chat", chatty, *OPTIONS, "--system", "Short.", text="Hello\nAnd more\n")
    assert result.exit_code == 0, result.output
    head = "[system] Short.\n[user] Hello\n[assistant] "
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    (first,) = said_after(chatty, tokenizer, head)
    (second,) = said_after(chatty, tokenizer, f"{head}{first}\n[user] And more\n[assistant] ")
    assert result.stdout == f"{first}\n{second}\n"


def said_after(folder, tokenizer, text):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(CHECKPOINT), folder).eval().float()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    output = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, use_cache=False)[0].tolist()
    return [tokenizer.decode(output[len(ids) :], skip_special_tokens=True)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "-1"], "temperature must be from 0 to 100, got -1.0"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(folder, arguments, message):
    result = invoke("generate", folder, "--prompt", PROMPT, *arguments)
    assert result.exit_code == 1 and result.stderr == f"error: {message}\n"


def test_a_system_message_needs_a_template(folder):
    result = invoke("chat", folder, "--system", "Short.", *OPTIONS)
    assert result.exit_code == 1 and "--system needs a chat template" in result.stderr


def test_a_text_as_long_as_the_context_is_refused(folder):
    result = invoke("generate", folder, "--prompt", "import sys\n" * 3000, *OPTIONS)
    assert result.exit_code == 1 and "tokens, and the model reads" in result.stderr


def test_an_encoder_does_not_generate(tmp_path):
    base = tmp_path / "base"
    config = BertConfig(
        vocab_size=1024, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(base)
    workflow.create_adapter(str(base), SparseKConfig(k=4, window=4, sinks=1), tmp_path / "adapter")
    result = invoke("generate", tmp_path / "adapter", "--prompt", PROMPT, *OPTIONS)
    assert result.exit_code == 1 and "BertForMaskedLM is no decoder" in result.stderr
