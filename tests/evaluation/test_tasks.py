"""Tasks: prompts hold what they promise at their length and depth, and answers are scored where they belong."""

import json
import re
from collections import Counter
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse._compat import cache_of, with_cache
from hf_sparse.demo import CHECKPOINT
from hf_sparse.errors import DataError
from hf_sparse.evaluation import task_table, using
from hf_sparse.evaluation.tasks import TASKS, Haystack, Suite, check_tasks, read_longbench, run, run_longbench, run_task
from hf_sparse.evaluation.tasks.generate import answer
from hf_sparse.evaluation.tasks.haystack import fit, hide
from hf_sparse.evaluation.tasks.longbench import Document, prompt
from hf_sparse.evaluation.tasks.words import ADJECTIVES, KEYS, LISTED, NOUNS, PLACES, VERBS
from hf_sparse.methods.sparsek import Budget
from hf_sparse.methods.sparsek.evaluation import GENERATING, at_budget, budget_of
from hf_sparse.patches import sparse_layers

DEPTHS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def model(tiny_llama):
    base = tiny_llama(vocab_size=4096, max_position_embeddings=512)
    return hf_sparse.patch(base, hf_sparse.SparseKConfig(k=10, window=12, sinks=2))


def draft(name, seed=0, haystack=None, depths=None):
    depths = {"each": (0.5,), "all": DEPTHS, "none": ()}[TASKS[name].depths] if depths is None else depths
    return TASKS[name].make(Random(seed), haystack or Haystack(), depths)


def place(text, part):
    """Where a part of a text begins, as a share of the text."""
    return text.index(part) / len(text)


class TestHaystack:
    def test_generated_is_a_prefix_without_numbers(self):
        first = Haystack().draw(Random(0))
        long = first(50)
        assert first(20) == long[:20] and len(set(long)) > 45
        assert not re.search(r"\d", " ".join(long)) and long != Haystack().draw(Random(1))(50)

    def test_what_is_drawn_next_does_not_depend_on_its_length(self):
        numbers = []
        for count in (1, 100):
            random = Random(0)
            Haystack().draw(random)(count)
            numbers.append(random.random())
        assert numbers[0] == numbers[1]

    def test_of_a_text(self):
        first = Haystack("One. Two!\nThree? Four", "count.txt").draw(Random(0))
        assert sorted(first(4)) == ["Four", "One.", "Three?", "Two!"] and first(8)[4:] == first(4)

    def test_words_are_not_shared(self):
        lists = [ADJECTIVES, NOUNS, VERBS, KEYS, LISTED, [word for place in PLACES for word in set(place.split())]]
        assert all(len(set(words)) == len(words) for words in lists[:5])
        shared = [word for word, count in Counter(w for words in lists for w in set(words)).items() if count > 1]
        assert not shared

    def test_hide(self):
        assert hide(["a", "b", "c", "d"], [(0.5, "x"), (0.5, "y"), (1, "z"), (0, "w")]) == "w a b x y c d z"

    def test_fit_is_the_longest_that_fits(self, tokenizer):
        def render(count):
            return "It begins. " + "A word. " * count

        for limit in (10, 57, 300):
            found = fit(tokenizer, render, limit)
            count = tokenizer.decode(found).count("A word")
            assert found == tokenizer(render(count))["input_ids"]
            assert len(found) <= limit < len(tokenizer(render(count + 1))["input_ids"])
        with pytest.raises(DataError, match=r"expected a prompt of at most 2 tokens, got \d+ without any filler"):
            fit(tokenizer, render, 2)


class TestExamples:
    @pytest.mark.parametrize("name", TASKS)
    def test_same_seed_same_example(self, name):
        first, again, other = draft(name), draft(name), draft(name, seed=1)
        assert first.render(40) == again.render(40) and first.answers == again.answers
        assert first.render(40) != other.render(40) and first.answers != other.answers

    @pytest.mark.parametrize("name", TASKS)
    def test_holds_its_answers_and_grows(self, name):
        example = draft(name)
        small, large = example.render(40), example.render(80)
        assert len(large) > len(small)
        for text in (small, large):
            assert all(re.search(rf"\b{found}\b", text) for found in example.answers)
        assert all(score == 1 for score in TASKS[name].score(" " + ", ".join(example.answers), example.answers))
        assert all(score == 0 for score in TASKS[name].score(" none of it", example.answers))

    @pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
    def test_passkey_depth(self, depth):
        example = draft("passkey", depths=(depth,))
        text = example.render(200).split("\n\n")[1]
        assert place(text, "The pass key is") == pytest.approx(depth, abs=0.03)

    def test_needles_stand_at_every_depth_in_order(self):
        example = draft("needles", depths=(0.0, 0.4, 0.9))
        text = example.render(200)
        found = [place(text.split("\n\n")[1], value) for value in example.answers]
        assert found == pytest.approx([0, 0.4, 0.9], abs=0.03)
        assert len(set(example.answers)) == 3

    def test_keys(self):
        for name, count in (("single_key", 1), ("multi_key", 8)):
            example = draft(name)
            text = example.render(30)
            told = dict(re.findall(r"The magic number of (\w+) is (\d+)\.", text))
            asked = re.search(r"What is the magic number of (\w+)\?", text)[1]
            assert len(told) == count and (told[asked],) == example.answers

    def test_variables_can_be_traced(self):
        example = draft("variable_tracking")
        held = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", example.render(60)):
            held[name] = held.get(value, value)  # in the order of the text
        assert tuple(held) == example.answers and len(held) == 5 and len(set(held.values())) == 1

    @pytest.mark.parametrize(("name", "asked"), [("common_words", 5), ("frequent_words", 3)])
    @pytest.mark.parametrize("count", [60, 400])
    def test_counted_words(self, name, asked, count):
        example = draft(name)
        words = example.render(count).split("\n\n")[1].split()
        assert len(words) == count
        ranked = Counter(words).most_common(asked + 1)
        assert {word for word, _ in ranked[:asked]} == set(example.answers)
        assert ranked[asked - 1][1] > ranked[asked][1]  # there is one right answer


class TestRun:
    @pytest.fixture
    def answered(self, monkeypatch):
        """Prompts and answers go through a function of the test instead of a model."""
        seen = []

        def use(reply):
            def fake(model, tokenizer, prompts, new_tokens):
                layer = sparse_layers(model)[0]
                seen.extend((tokens, new_tokens, layer.baseline, layer.is_active) for tokens in prompts)
                return [reply(tokenizer.decode(tokens)) for tokens in prompts]

            monkeypatch.setattr(run, "answer", fake)
            return seen

        return use

    def test_lengths_and_prompts(self, model, tokenizer, answered):
        seen = answered(lambda text: "")
        run_task(model, tokenizer, "passkey", lengths=(128, 256), depths=DEPTHS, samples=2, progress=False)
        sizes = [len(tokens) + new for tokens, new, *_ in seen]
        assert len(seen) == 2 * len(DEPTHS) * 2 * len(GENERATING)
        assert all(0 <= length - size < 40 for length, size in zip([128] * 6 + [256] * 6, sizes[:12], strict=True))
        assert len({tuple(tokens) for tokens, *_ in seen[:12]}) == 12  # each is another example
        assert [tokens for tokens, *_ in seen[12:24]] == [tokens for tokens, *_ in seen[:12]]  # for each selection
        assert not seen[0][3] and seen[12][3] and len({baseline for *_, baseline, _ in seen}) == len(GENERATING) - 1

    def test_each_depth_has_its_cell(self, model, tokenizer, answered):
        def early(text):
            """Knows the key when it stands in the first half, in the long prompts."""
            body = text.split("\n\n")[1]
            key = re.search(r"The pass key is (\d+)", body)[1]
            return f" {key}." if place(body, key) < 0.4 and len(text) > 600 else " 0"

        answered(early)
        found = run_task(
            model, tokenizer, "passkey", lengths=(128, 400), depths=DEPTHS, selections=("dense",), progress=False
        )
        assert found["metric"] == "exact match"
        assert found["results"] == {
            "dense": {"lengths": [128, 400], "depths": [0, 0.5, 1], "values": [[0, 1], [0, 0], [0, 0]]}
        }
        assert found["settings"] == {"samples": 2, "seed": 0, "haystack": "generated", "slots": 24}

    def test_each_needle_has_its_cell(self, model, tokenizer, answered):
        answered(lambda text: " " + " and ".join(re.findall(r"is (\d+)\.", text)[1:]))  # all but the first
        found = run_task(
            model, tokenizer, "needles", lengths=(160,), depths=DEPTHS, selections=("learned",), progress=False
        )
        assert found["results"]["learned"]["values"] == [[0], [1], [1]] and found["metric"] == "recall"

    def test_without_depths(self, model, tokenizer, answered):
        answered(lambda text: " " + ", ".join(re.findall(r"VAR (\w+) =", text)[:3]))  # three of five
        found = run_task(
            model, tokenizer, "variable_tracking", lengths=(200, 300), selections=("learned",), progress=False
        )
        assert found["results"] == {"learned": {"lengths": [200, 300], "values": pytest.approx([0.6, 0.6])}}

    def test_suite(self, model, tokenizer, answered):
        answered(lambda text: " 12345\nthen more")
        documents = {"numbers": [Document("Some text.", "Which?", ("a 12345",)), Document("Text.", "", ("none",))]}
        suite = Suite(("single_key",), documents, (200, 128), haystack=Haystack("A sentence. Another.", "mine.txt"))
        found = suite.run(model, tokenizer, progress=False)
        assert list(found) == ["single_key", "longbench:numbers"]
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["single_key"]["settings"]["haystack"] == "mine.txt"
        assert found["longbench:numbers"]["metric"] == "F1"
        assert set(found["longbench:numbers"]["results"].values()) == {0.5}  # the first line, articles aside
        assert set(found["longbench:numbers"]["exact_match"]) == set(GENERATING)
        assert found["longbench:numbers"]["settings"] == {"documents": 2, "length": 200, "slots": 24}

    def test_suite_at_another_budget(self, model, tokenizer, answered):
        sizes = set()

        def reply(text):
            sizes.add(budget_of(model))
            return ""

        answered(reply)
        documents = {"f": [Document("Text.", "Which?", ("none",))]}
        found = Suite(("single_key",), documents, lengths=(200,), slots=40).run(model, tokenizer, progress=False)
        assert list(found) == ["single_key, 40 slots", "longbench:f, 40 slots"]
        assert sizes == {Budget(k=18, window=20, sinks=2)} and found["single_key, 40 slots"]["settings"]["slots"] == 40
        assert budget_of(model).slots == 24
        assert list(Suite(("single_key",), lengths=(200,), slots=24).run(model, tokenizer, progress=False)) == [
            "single_key"
        ]

    def test_tables(self, model, tokenizer, answered, capsys):
        from rich.console import Console

        answered(lambda text: "")
        found = Suite(("passkey", "multi_key"), {"f": [Document("x " * 50, "y", ("z",))]}, (256,)).run(
            model, tokenizer, progress=False
        )
        for name, task in found.items():
            Console(width=120).print(task_table(name, task))
            shown = capsys.readouterr().out
            assert name in shown and task["metric"] in shown and all(chosen in shown for chosen in GENERATING)
            assert ("256 tokens" in shown) == (name != "longbench:f")
            assert ("mean over depths" in shown) == (name == "passkey")


class TestGeneration:
    def prompt(self):
        return torch.randint(5, 4096, (100,)).tolist()

    @pytest.mark.parametrize("name", GENERATING)
    def test_greedy(self, model, tokenizer, name):
        tokens = self.prompt()
        with using(model, name):
            found = answer(model, tokenizer, [tokens], 6)[0]
            ids, cache = torch.tensor([tokens]), None
            for _ in range(6):
                with torch.no_grad():
                    output = model(input_ids=ids if cache is None else ids[:, -1:], **with_cache(cache), use_cache=True)
                cache = cache_of(output)
                ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
        assert found == tokenizer.decode(ids[0, 100:], skip_special_tokens=True)

    def test_the_selection_matters(self, model, tokenizer):
        said = set()
        for name in ("dense", "recency", "learned"):
            with using(model, name), at_budget(model, Budget(k=2, window=2, sinks=1)):
                said.add(answer(model, tokenizer, [self.prompt()], 12)[0])
        assert len(said) > 1

    def test_sampling_settings_of_the_model_do_not_matter(self, model, tokenizer):
        tokens = self.prompt()
        expected = answer(model, tokenizer, [tokens], 8)
        model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
        assert answer(model, tokenizer, [tokens], 8) == expected

    def test_the_model_comes_back(self, model, tokenizer):
        model.train()
        before = [(m.baseline, m.disable_adapters, m.training) for m in sparse_layers(model)]
        run_task(model, tokenizer, "multi_key", lengths=(256,), samples=1, progress=False)
        assert before == [(m.baseline, m.disable_adapters, m.training) for m in sparse_layers(model)] and model.training


class TestRefusals:
    @pytest.mark.parametrize(
        ("names", "options", "error", "message"),
        [
            (["chess"], {}, ValueError, "a task is one of passkey, .*, got 'chess'"),
            (["passkey"], {"samples": 0}, ValueError, "samples must be an integer of at least 1, got 0"),
            (["passkey"], {"lengths": []}, ValueError, "at least one length"),
            (["passkey"], {"lengths": [24]}, DataError, "budget of 24 slots covers a whole prompt of 24 tokens"),
            (["passkey"], {"lengths": [128, 513]}, DataError, "513 tokens are longer than the 512 positions"),
            (["passkey"], {"selections": ["oracle"]}, ValueError, r"must be among dense, .*learned, got \['oracle'\]"),
            (["passkey"], {"selections": []}, ValueError, "selections must be among"),
        ],
    )
    def test_before_anything_runs(self, model, names, options, error, message):
        with pytest.raises(error, match=message):
            check_tasks(model, names, **{"lengths": [128], **options})

    def test_depths(self, model, tokenizer):
        with pytest.raises(ValueError, match=r"depths must be shares from 0 to 1, got \[0, 50\]"):
            run_task(model, tokenizer, "passkey", lengths=[128], depths=[0, 50])

    def test_an_encoder(self, tiny_bert):
        model = hf_sparse.patch(tiny_bert(), hf_sparse.SparseKConfig(k=5, window=6, sinks=1))
        with pytest.raises(DataError, match="causal language models"):
            check_tasks(model, ["passkey"], lengths=[64])

    def test_a_prompt_too_short(self, model, tokenizer):
        with pytest.raises(DataError, match="without any filler"):
            run_task(model, tokenizer, "multi_key", lengths=[30], progress=False)


class TestLongBench:
    def test_reads(self, tmp_path):
        path = tmp_path / "qa.jsonl"
        rows = [{"input": "Who?", "context": "Ann.", "answers": ["Ann"], "length": 1, "all_classes": None}] * 2
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
        assert read_longbench(path) == [Document("Ann.", "Who?", ("Ann",))] * 2

    def test_a_line_ends_where_json_lines_end(self, tmp_path):
        """Documents from the web hold other line ends, which JSON need not escape."""
        path, context = tmp_path / "qa.jsonl", "One\u2028two\x85three\u2029four"
        rows = [{"input": "", "context": context, "answers": ["x"]}] * 2
        path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
        assert read_longbench(path) == [Document(context, "", ("x",))] * 2

    @pytest.mark.parametrize(
        "line",
        [
            "{",
            "[]",
            '{"input": "", "context": ""}',
            '{"input": "", "context": "", "answers": []}',
            '{"input": "", "context": "", "answers": "one"}',
            '{"input": "", "context": 3, "answers": ["one"]}',
            '{"input": "", "context": "", "answers": [1]}',
        ],
    )
    def test_refuses(self, tmp_path, line):
        path = tmp_path / "qa.jsonl"
        path.write_text('{"input": "", "context": "", "answers": ["x"]}\n' + line)
        with pytest.raises(DataError, match=r"line 2 of .* is not LongBench's format"):
            read_longbench(path)

    def test_prompt(self, tokenizer):
        document = Document("The first words. " + "Filler. " * 300 + "The last words.", "Which words?", ("x",))
        whole = tokenizer.decode(prompt(tokenizer, document, 5000))
        assert whole == document.context + "\n\nQuestion: Which words?\nAnswer:"
        for limit in (60, 61):
            cut = prompt(tokenizer, document, limit)
            text = tokenizer.decode(cut)
            assert len(cut) == limit and text.startswith("The first words. Filler.")
            assert text.endswith("Filler. The last words.\n\nQuestion: Which words?\nAnswer:")
        assert tokenizer.decode(prompt(tokenizer, Document("Text.", "", ("x",)), 60)) == "Text.\n\nAnswer:"
        with pytest.raises(DataError, match=r"expected a question of at most \d+ tokens"):
            prompt(tokenizer, document, 8)

    def test_no_documents(self, model, tokenizer):
        with pytest.raises(DataError, match="expected at least one document to ask about, got none"):
            run_longbench(model, tokenizer, [], length=128)
