"""Tasks of long generation: every line follows from those before, and is scored as decoding would choose it."""

import re
from itertools import islice
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.core.overrides import override
from hf_sparse.demo import CHECKPOINT
from hf_sparse.errors import DataError
from hf_sparse.evaluation import using
from hf_sparse.evaluation.tasks import TRACES, forced, run_task
from hf_sparse.evaluation.tasks.forced import right_lines
from hf_sparse.evaluation.tasks.generate import answer
from hf_sparse.methods.sparsek.evaluation.contenders import sparsek_layers


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def model(tiny_llama):
    base = tiny_llama(vocab_size=4096, max_position_embeddings=1024)
    return hf_sparse.patch(base, hf_sparse.SparseKConfig(k=30, window=12, sinks=2)).eval()


class TestLines:
    def test_arithmetic(self):
        made = TRACES["arithmetic"].make(Random(0))
        operations = re.findall(r"([+-]) (\d+)[,.]", made.prompt)
        value = int(re.search(r"Start with (\d+)", made.prompt)[1])
        for number, line in enumerate(islice(made.lines, 100)):
            sign, amount = operations[number % len(operations)]
            after = value + int(amount) if sign == "+" else value - int(amount)
            assert line == f"{value} {sign} {amount} = {after}"
            value = after
        assert len(operations) == 10 and value == int(re.search(r"Start with (\d+)", made.prompt)[1])

    def test_program(self):
        made = TRACES["program"].make(Random(0))
        statements = re.findall(r"^line (\d+): (\w) = \2 \+ (\d+)$", made.prompt, re.MULTILINE)
        values = {name: int(value) for name, value in re.findall(r"(\w) = (\d+)[,.]", made.prompt)}
        assert {name for _, name, _ in statements} == set(values) and len(statements) > 2 * len(values)
        for step, line in enumerate(islice(made.lines, 100)):
            number, name, amount = statements[step % len(statements)]
            before = values[name]
            values[name] += int(amount)
            assert line == f"line {number}: {name} = {before} + {amount} = {values[name]}"

    @pytest.mark.parametrize("name", TRACES)
    def test_a_seed_makes_one_example(self, name):
        first, again, other = (TRACES[name].make(Random(seed)) for seed in (0, 0, 1))
        assert first.prompt == again.prompt != other.prompt
        assert list(islice(first.lines, 9)) == list(islice(again.lines, 9)) != list(islice(other.lines, 9))


class TestForced:
    PROMPTS = torch.randint(5, 4096, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()

    @pytest.mark.parametrize("contender", ["dense", "learned", "random"])
    def test_it_is_what_decoding_chooses(self, model, contender, monkeypatch):
        """Lines that the model decoded are right, and a wrong token makes its line wrong and no other before it."""
        monkeypatch.setattr(forced, "_PIECE", 16)
        with using(model, contender), override([layer.config for layer in sparsek_layers(model)], pin_prompt=-1):
            answers = []
            for prompt in self.PROMPTS:
                ids, cache, said = torch.tensor([prompt]), None, []
                for _ in range(40):
                    with torch.no_grad():
                        output = model(input_ids=ids, **with_cache(cache), use_cache=True)
                    cache, ids = cache_of(output), output.logits[:, -1:].argmax(-1)
                    said.append(int(ids))
                answers.append([said[:10], said[10:27], said[27:]])
            answers[1] = answers[1][:2]  # a shorter answer
            assert right_lines(model, self.PROMPTS, answers) == [[True] * 3, [True] * 2]
            wrong = [[answers[0][0], [*answers[0][1][:5], 3, *answers[0][1][6:]], answers[0][2]], answers[1]]
            scored = right_lines(model, self.PROMPTS, wrong)
        assert scored[0][:2] == [True, False] and scored[1] == [True, True]

    def test_prompts_of_several_lengths(self, model):
        with pytest.raises(ValueError, match=r"prompts of one length, got \[2, 3\]"):
            right_lines(model, [[1, 2], [1, 2, 3]], [[[4]], [[4]]])


class TestRun:
    def test_an_entry_of_eval_json(self, model, tokenizer, monkeypatch):
        asked = []

        def score(model, prompts, answers):
            asked.append([len(prompt) + sum(map(len, lines)) for prompt, lines in zip(prompts, answers, strict=True)])
            return [[True] * (len(lines) - 1) + [False] for lines in answers]

        monkeypatch.setattr(forced, "right_lines", score)
        found = run_task(
            model,
            tokenizer,
            "program",
            lengths=(700, 900),
            samples=3,
            batch_size=2,
            selections=("dense",),
            progress=False,
        )
        assert found["metric"] == "right lines" and found["settings"] == {"samples": 3, "seed": 0, "slots": 44}
        assert found["results"]["dense"]["lengths"] == [700, 900]
        assert 0.5 < found["results"]["dense"]["values"][0] < found["results"]["dense"]["values"][1] < 1
        assert sum(map(len, asked)) == 6 and max(map(len, asked)) <= 2
        sizes = [size for batch in asked for size in batch]
        assert all(660 < size <= 700 for size in sizes[:3]) and all(860 < size <= 900 for size in sizes[3:])

    def test_with_the_prompt_kept_random_is_prompt_random(self, model):
        """The selection that keeps prompts by itself, and the adapter that pins them, keep the same keys."""
        prompts, answers = TestForced.PROMPTS, [[[7] * 30]] * 2
        logits = []
        for contender, pin in (("prompt_random", 0), ("random", -1)):
            seen = []
            handle = model.lm_head.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
            with using(model, contender), override([layer.config for layer in sparsek_layers(model)], pin_prompt=pin):
                right_lines(model, prompts, answers)
            handle.remove()
            logits.append(torch.cat(seen, 1))
        torch.testing.assert_close(*logits, rtol=0, atol=1e-6)

    def test_a_prompt_that_is_too_long(self, model, tokenizer):
        with pytest.raises(DataError, match=r"a prompt with an answer of at most 60 tokens, got \d+ without any"):
            run_task(model, tokenizer, "arithmetic", lengths=[60], progress=False)


def test_prompts_of_a_batch_are_answered_as_alone(model, tokenizer):
    prompts = [list(range(100, 100 + size)) for size in (60, 71, 64)]
    for contender in ("dense", "learned"):
        with using(model, contender):
            together = answer(model, tokenizer, prompts, 6)
            assert together == [answer(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
