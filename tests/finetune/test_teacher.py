"""A teacher that was recorded predicts what one that runs predicts; where nothing can be recorded it runs.

So does one that attends within a window, whose time is linear in the length.
"""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from hf_sparse import SparsefinderConfig, SparseKConfig, patch, unpatch
from hf_sparse.finetune import FinetuneConfig, estimate, finetune, objectives, teacher
from hf_sparse.finetune.predictions import predict
from hf_sparse.ops.local_attention import FIRST
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


@pytest.fixture
def model(sparse_llama):
    return sparse_llama().eval().to("cuda" if torch.cuda.is_available() else "cpu")


def dense(model, tokens, **options):
    """The states of the recorded teacher, and those of the model as it runs."""
    with torch.no_grad(), objectives.switched_off(model):
        found = teacher.predict_dense(model, tokens, **options)
        expected = predict(model, tokens, **options)
    return found, expected


@on_a_gpu
def test_replays_predict_the_same(model, chunks):
    """Compare every input, with hidden states too; another layout and moved weights are recorded anew."""
    rows = chunks.to("cuda").split(2)
    for number in range(8):
        found, expected = dense(model, rows[number % len(rows)], use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(found.states, expected.states, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logits(found.states), expected.logits(expected.states), rtol=1e-5, atol=1e-5)
    assert len(teacher._teachers) == 1 and next(iter(teacher._teachers.values())).replay is not None
    for parameter in model.parameters():  # in new memory, with other values
        parameter.data = parameter.data * 1.5
    found, expected = dense(model, rows[0], use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(found.states, expected.states, rtol=1e-5, atol=1e-5)
    teacher.forget(model)
    assert not teacher._teachers


@on_a_gpu
def test_the_loss_of_every_step_is_that_without_a_recording(model, chunks, monkeypatch):
    for layer in sparse_layers(model):
        layer.train()
    rows = chunks.to("cuda").split(2)
    recorded = [objectives.distill(model, rows[number % len(rows)]) for number in range(6)]
    monkeypatch.setattr(objectives, "predict_dense", predict)
    plain = [objectives.distill(model, rows[number % len(rows)]) for number in range(6)]
    torch.testing.assert_close(torch.stack(recorded), torch.stack(plain), rtol=1e-5, atol=1e-6)


@on_a_gpu
def test_a_forward_that_waits_for_the_device_runs_as_ever(model, chunks):
    def wait(module, args):
        args[0].sum().item()

    handle = model.get_input_embeddings().register_forward_pre_hook(wait)
    for _ in range(5):
        found, expected = dense(model, chunks[:2].to("cuda"), use_cache=False)
        torch.testing.assert_close(found.states, expected.states, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert all(one.replay is None for one in teacher._teachers.values())


def test_elsewhere_it_runs(model, chunks):
    """On the CPU, and in autocast."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        for _ in range(4):
            found, expected = dense(model, chunks[:2].to(model.device), use_cache=False)
            assert torch.equal(found.states, expected.states)
    assert not [one for one in teacher._teachers.values() if one.replay is not None]


class TestWindow:
    """A teacher within a window: the base model under a mask of the pairs that are left, and nothing else."""

    LENGTH = 61  # no multiple of any window below

    @classmethod
    def seen(cls, window):
        """`[T, T]` bool: which key each query attends to."""
        token = torch.arange(cls.LENGTH)
        query, key = token[:, None], token[None]
        return (key <= query) & ((key // window >= query // window - 1) | (key < FIRST))

    @classmethod
    @torch.no_grad()
    def under_a_mask(cls, base, tokens, window, local=None, **options):
        """Return what the base model says with a mask of these pairs; layers with a window of their own keep theirs."""

        def additive(seen):
            return torch.zeros(seen.shape, dtype=base.dtype).masked_fill(~seen, -torch.inf)[None, None]

        mask = additive(cls.seen(window))
        if local:
            causal = torch.ones(cls.LENGTH, cls.LENGTH, dtype=torch.bool).tril()
            mask = {"full_attention": mask, "sliding_attention": additive(causal.triu(1 - local))}
        positions = torch.arange(cls.LENGTH)[None]  # OPT would count them in the mask
        return base(tokens, attention_mask=mask, position_ids=positions, use_cache=False, **options)

    @staticmethod
    @torch.no_grad()
    def within(model, tokens, window, **options):
        with objectives.dense_within(model, tokens.shape[1], window):
            found = teacher.predict_dense(model, tokens, use_cache=False, **options)
        return found if options else found.logits(found.states)

    @pytest.mark.parametrize("window", [3, 8, 16])
    @pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.causal])
    @pytest.mark.cross("values")
    def test_every_family_predicts_what_its_base_does_under_a_mask(self, name, window):
        """Learned and rotary positions, grouped heads, soft caps, layers with a window of their own; in float64."""
        family = FAMILIES[name]
        # Products with experts are never in float64, nor are many norms.
        dtype = torch.float32 if "num_experts" in family.settings else torch.float64
        base = family.make().to(dtype)
        tokens = torch.randint(3, 64, (2, self.LENGTH), generator=torch.Generator().manual_seed(1))
        local = base.config.get_text_config().sliding_window if family.local else None
        expected = self.under_a_mask(base, tokens, window, local).logits
        with torch.no_grad():
            dense = base(tokens, use_cache=False).logits
        found = self.within(patch(base, SparseKConfig(k=3, window=4, sinks=1)), tokens, window)
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found, expected, **close)
        assert (found - dense).abs().max() > 1e-3

    @pytest.mark.parametrize("length", [1, 31, 32])
    def test_a_text_of_two_windows_has_the_dense_teacher_bit_for_bit(self, model, length):
        tokens = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1)).to(model.device)
        with torch.no_grad(), model.disable_adapter():
            expected = model(tokens, use_cache=False).logits
        assert torch.equal(self.within(model, tokens, 16), expected)
        longer = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(1)).to(model.device)
        with torch.no_grad(), model.disable_adapter():
            expected = model(longer, use_cache=False).logits
        assert not torch.allclose(self.within(model, longer, 16)[:, 32], expected[:, 32], atol=1e-3)

    def test_a_prediction_of_one_layer_is_that_of_the_tokens_that_it_attends_to(self):
        """The base model reads these tokens alone, at their positions, for tokens of several blocks."""
        base = FAMILIES["llama"].make(num_hidden_layers=1).double()
        tokens = torch.randint(3, 64, (2, self.LENGTH), generator=torch.Generator().manual_seed(1))
        model = patch(base, SparseKConfig(k=3, window=4, sinks=1))
        found = self.within(model, tokens, 8)
        unpatch(model)
        for last in (0, 5, 15, 16, 23, 24, 37, 56, 60):
            (seen,) = self.seen(8)[last].nonzero(as_tuple=True)
            with torch.no_grad():
                read = {"position_ids": seen[None], "attention_mask": torch.ones(2, len(seen))}  # not packed texts
                expected = base(tokens[:, seen], **read, use_cache=False).logits[:, -1]
            torch.testing.assert_close(found[:, last], expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("config", [SparseKConfig(k=3, window=4, sinks=1), SparsefinderConfig(tile=8, window=8)])
    def test_it_is_the_base_without_method_and_lora_and_all_is_as_it_was_afterwards(self, config):
        base = FAMILIES["llama"].make().double()
        tokens = torch.randint(3, 64, (2, self.LENGTH), generator=torch.Generator().manual_seed(1))
        expected = self.under_a_mask(base, tokens, 8, output_hidden_states=True)
        config = replace(config, lora_rank=2)
        model = get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_B.default") or "lora" in name:
                    parameter.normal_()
        with pytest.raises(RuntimeError, match="on purpose"), objectives.dense_within(model, self.LENGTH, 8):
            raise RuntimeError("on purpose")
        found = self.within(model, tokens, 8, output_hidden_states=True)
        torch.testing.assert_close(found.hidden, expected.hidden_states, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.logits(found.states), expected.logits, rtol=1e-6, atol=1e-6)
        assert not any(layer.dense_window for layer in sparse_layers(model))
        with objectives.dense_within(model, self.LENGTH, 8):
            for options in ({"attention_mask": torch.tensor([[1] * 60 + [0]] * 2)}, {"use_cache": True}):
                with pytest.raises(ValueError, match="takes whole texts: no padding, packed texts or cache"):
                    model(tokens, **options)

    @pytest.mark.parametrize("mixture", [{}, {"lm_weight": 0.5, "hidden_weight": 0.5}], ids=["distill", "mixture"])
    def test_the_loss_is_the_divergence_from_it(self, sparse_llama, mixture):
        model = sparse_llama().double().eval()
        for layer in sparse_layers(model):
            layer.train()
        tokens = torch.randint(0, 64, (2, self.LENGTH), generator=torch.Generator().manual_seed(3))
        with model.disable_adapter():
            base = self.under_a_mask(model, tokens, 8, output_hidden_states=True)
        student = model(tokens, labels=tokens, use_cache=False, output_hidden_states=True)
        log_target, log_found = base.logits.log_softmax(-1), student.logits.log_softmax(-1)
        expected = (log_target.exp() * (log_target - log_found)).sum(-1).mean()
        if mixture:
            distance = objectives.hidden_distance(student.hidden_states, base.hidden_states)
            expected = expected + 0.5 * student.loss + 0.5 * distance
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = objectives.distill(model, tokens, teacher_window=8, **mixture)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        pairs = zip(torch.autograd.grad(loss, learned), torch.autograd.grad(expected, learned), strict=True)
        for gradient, of_expected in pairs:
            assert gradient.isfinite().all() and gradient.any()
            torch.testing.assert_close(gradient, of_expected, rtol=1e-4, atol=1e-7)
        assert abs(objectives.distill(model, tokens, **mixture) - loss) > 1e-3

    def test_a_run_records_it_and_goes_on_with_it_alone(self, sparse_llama, chunks, tmp_path):
        """Without it nothing is recorded, so that a checkpoint from before there was one is that of such a run."""
        options = {"steps": 2, "warm_start_steps": 0, "batch_size": 2, "progress": False, "divide_heads": False}
        plain = finetune(sparse_llama(), chunks, FinetuneConfig(**options))
        assert "teacher_window" not in plain["settings"]
        output = {"output_dir": str(tmp_path), "checkpoint_every": 2}
        within = FinetuneConfig(**options, **output, teacher_window=8, gradient_checkpointing=True)
        metrics = finetune(sparse_llama(), chunks, within)
        assert metrics["settings"]["teacher_window"] == 8
        assert json.loads((tmp_path / "finetune.json").read_text())["settings"]["teacher_window"] == 8
        assert metrics["history"][0]["loss"] != plain["history"][0]["loss"]
        assert finetune(sparse_llama(), chunks, replace(within, resume=True))["history"] == metrics["history"]
        for other in (0, 16):
            with pytest.raises(ValueError, match=r"cannot resume with other settings.*different: teacher_window$"):
                finetune(sparse_llama(), chunks, replace(within, resume=True, teacher_window=other))
        told = estimate(sparse_llama(), chunks, replace(within, checkpoint_every=0))
        assert told["steps"] == 2 and told["tokens"] == 2 * 2 * 96

    @pytest.mark.parametrize("objective", ["lm", "attention", "graph"])
    def test_other_objectives_refuse_it(self, objective):
        with pytest.raises(ValueError, match=f"teacher_window belongs to 'distill'; the objective '{objective}' has"):
            FinetuneConfig(objective=objective, teacher_window=8)

    @pytest.mark.parametrize("head, kind", [("BertForMaskedLM", "masked"), ("BertModel", "features")])
    def test_encoders_refuse_it(self, head, kind):
        model = get_peft_model(FAMILIES["bert"].make(model=head), SparseKConfig(k=3, window=4, sinks=1))
        tokens = torch.randint(5, 64, (4, 64))
        with pytest.raises(ValueError, match=f"teacher_window is for causal .*got a model of the kind '{kind}'"):
            finetune(model, tokens, FinetuneConfig(teacher_window=8, steps=1, progress=False))
