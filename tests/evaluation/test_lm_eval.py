"""lm-evaluation-harness runs a patched model as it is: `HFLM(pretrained=model, tokenizer=tokenizer)`."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse.demo import CHECKPOINT
from hf_sparse.evaluation import using
from hf_sparse.evaluation.tasks.generate import answer

pytestmark = pytest.mark.versions

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`")

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

QUESTIONS: list[dict[str, Any]] = [
    {"question": "one two three four " * 12 + "five", "choices": [" six", " seven eight"], "label": 0},
    {"question": "import", "choices": [" os", " ######"], "label": 0},
    {"question": "def name(self):\n" * 8 + "if", "choices": [" self", " banana", " not name"], "label": 0},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def model(tiny_llama):
    base = tiny_llama(vocab_size=4096, max_position_embeddings=512)
    return hf_sparse.patch(base, hf_sparse.SparseKConfig(k=4, window=4, sinks=1))


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    predicted = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return predicted.gather(-1, ids[0, 1:, None])[start - 1 :].sum().item()


@pytest.mark.parametrize("name", ["dense", "recency", "learned"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_local_task(model, tokenizer, tmp_path, name, batch_size):
    """`HFLM(pretrained=model, tokenizer=tokenizer)` scores a task as the model does by hand."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    (tmp_path / "local_choice.yaml").write_text(TASK.format(data=data))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with using(model, name):
        found = lm_eval.simple_evaluate(
            model=harness, tasks=["local_choice"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        expected = [
            [log_likelihood(model, tokenizer, q["question"], choice) for choice in q["choices"]] for q in QUESTIONS
        ]
    said = {sample["doc_id"]: [r[0] for r in sample["filtered_resps"]] for sample in found["samples"]["local_choice"]}
    for number, values in enumerate(expected):
        assert said[number] == pytest.approx(values, abs=1e-3)
    right = [max(range(len(values)), key=values.__getitem__) == 0 for values in expected]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_generation(model, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    settings = {"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False}
    request = Instance("generate_until", {}, (QUESTIONS[0]["question"], settings), 0)
    with using(model, "learned"):
        said = harness.generate_until([request], disable_tqdm=True)
        prompt = tokenizer(QUESTIONS[0]["question"])["input_ids"]
        assert said[0] and said == answer(model, tokenizer, [prompt], 8)
