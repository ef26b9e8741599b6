"""A patched model without PEFT around it: saved with its adapter inside, loaded, and trained by a `Trainer`."""

import copy
import json
import logging
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

import hf_sparse
from hf_sparse import SparsefinderConfig, SparseKConfig, patch, unpatch
from hf_sparse.errors import HubError
from hf_sparse.patches import sparse_layers

FAMILIES = runpy.run_path(str(Path(__file__).parents[1] / "families.py"))["FAMILIES"]
IDS = torch.randint(3, 64, (2, 50), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "SparseK": SparseKConfig(k=6, window=8, sinks=2, lora_rank=2),
    "Sparsefinder": SparsefinderConfig(predictor="bound", tile=8, tiles_per_query=2, window=1),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS[:1]).logits


def scrambled(model):
    """Change every weight, those of the base too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


@pytest.mark.versions
@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_there_and_back(tiny_llama, config, shard, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "transformers")
    model = scrambled(patch(tiny_llama(), config))
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert not hasattr(model.config, "hf_sparse")
    assert (tmp_path / "saved" / "model.safetensors").exists() == (shard == "5GB")
    loaded = hf_sparse.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model)) and not caplog.records
    assert loaded.active_peft_config.lora_rank == config.lora_rank

    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert "UNEXPECTED" in caplog.text and "hf_sparse.model.layers" in caplog.text
    assert torch.equal(logits(dense), logits(unpatch(model)))
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)  # the base model, in the same place
    with pytest.raises(HubError, match="is not a complete adapter"):
        hf_sparse.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy(tiny_llama, config, copied, tmp_path):
    model = patch(tiny_llama(), config)
    expected, other = logits(model), scrambled(copied(model))
    other.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(hf_sparse.from_pretrained(tmp_path / "saved")), logits(other))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.full if entry.kin else ()) for name, entry in FAMILIES.items()]
)
def test_every_family(family, tmp_path):
    """Compare models whose checkpoints name or lay out weights otherwise than the model does, too."""
    model = scrambled(patch(FAMILIES[family].make(), CONFIGS["SparseK"]))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(hf_sparse.from_pretrained(tmp_path / "saved")), logits(model))


def test_the_weights_can_be_loaded_into_a_patched_model(tiny_llama, config):
    """By their names in the model, and by those in a checkpoint, into an adapter of whatever name."""
    model, other = scrambled(patch(tiny_llama(), config)), patch(tiny_llama(), config, adapter="mine")
    state = model.state_dict()
    saved = {
        f"hf_sparse.{name}".replace(".default.", ".") if ".sparse_attention." in name else name: tensor
        for name, tensor in state.items()
    }
    assert other.load_state_dict(saved) and torch.equal(logits(other), logits(model))
    missing = next(name for name in saved if name.startswith("hf_sparse."))
    saved["hf_sparse.other"] = saved.pop(missing)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*\.mine\..*Unexpected key.*hf_sparse\.other"):
        other.load_state_dict(saved)
    again = patch(tiny_llama(), config)
    assert again.load_state_dict(state) and torch.equal(logits(again), logits(model))


def test_one_adapter(tiny_llama, tmp_path):
    """Which is the one in use, whatever it is called; of several one would be lost."""
    model = scrambled(patch(tiny_llama(), CONFIGS["SparseK"], adapter="first"))
    model.save_pretrained(tmp_path / "one")
    assert torch.equal(logits(hf_sparse.from_pretrained(tmp_path / "one")), logits(model))
    patch(model, CONFIGS["SparseK"], adapter="second")
    with pytest.raises(ValueError, match="expected one adapter to save with the model, got first, second"):
        model.save_pretrained(tmp_path / "two")
    assert not (tmp_path / "two").exists()
    for layer in sparse_layers(model):
        layer.delete_adapter("second")
    model.save_pretrained(tmp_path / "two")


@pytest.mark.parametrize("layer", [0, 1])
def test_the_adapter_that_is_left(layer, tiny_llama, tmp_path):
    """It may be in another layer than the first, and not be the one that was in use last."""
    model = scrambled(patch(tiny_llama(), SparseKConfig(k=6, window=8, layers=[layer]), adapter="kept"))
    patch(model, SparseKConfig(k=6, window=8, layers=[1 - layer]), adapter="other")
    for one in sparse_layers(model):
        if "other" in one.configs:
            one.delete_adapter("other")
    model.save_pretrained(tmp_path)
    saved, kept = hf_sparse.from_pretrained(tmp_path), patch(tiny_llama(), SparseKConfig(k=6, window=8, layers=[layer]))
    expected = {name.replace(".kept.", ".default."): tensor for name, tensor in model.state_dict().items()}
    found = saved.get_base_model().state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    again = {
        f"hf_sparse.{name}".replace(".default.", ".") if ".sparse_attention." in name else name: tensor
        for name, tensor in expected.items()
    }
    kept.load_state_dict(again)
    assert torch.equal(logits(kept), logits(saved))
    model.load_state_dict(again)


def test_what_would_not_load_is_refused(tiny_llama, config, tmp_path):
    """A quantiser of transformers makes a state dict of its own, with the names of the model in it."""
    model = patch(tiny_llama(), config)
    with pytest.raises(ValueError, match=r"expected no variant of a model .* got 'fp16', whose file"):
        model.save_pretrained(tmp_path / "saved", variant="fp16")
    model.hf_quantizer = TorchAoHfQuantizer.__new__(TorchAoHfQuantizer)
    with pytest.raises(ValueError, match=r"expected a base model that is not quantised .* got TorchAoHfQuantizer"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists() and not hasattr(model.config, "hf_sparse")


def test_a_model_that_was_in_a_peft_model(tiny_llama, config, tmp_path):
    model = patch(unpatch(get_peft_model(tiny_llama(), config).get_base_model()), config)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(hf_sparse.from_pretrained(tmp_path / "saved")), logits(model))


def test_over_another_adapter(tiny_llama, tmp_path):
    """Whose names transformers would not know; each is saved by itself with PEFT."""
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], inference_mode=True))
    model = patch(lora.get_base_model(), CONFIGS["Sparsefinder"])
    with pytest.raises(
        ValueError, match=r"expected no other PEFT adapter .*, got peft\.tuners\.lora.*: merge that one"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_damaged(tiny_llama, config, tmp_path):
    model = patch(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(HubError, match=r"model\.safetensors of .* is damaged"):
        hf_sparse.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(HubError, match=r"in model\.safetensors or model\.safetensors\.index\.json, got neither"):
        hf_sparse.from_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"hf_sparse": {"form": "full"}}))
    file.write_bytes(whole)
    with pytest.raises(HubError, match="expected the adapter's configuration in hf_sparse"):
        hf_sparse.from_pretrained(tmp_path)


# A Trainer.


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_steps=2,
        eval_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (8, 50)).unbind()]
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])


@pytest.mark.versions
@pytest.mark.parametrize("trained", ["all", "sparse"])
def test_a_trainer_saves_and_resumes(tiny_llama, config, trained, tmp_path):
    """`Trainer` on a model without PEFT saves checkpoints that load sparse, and resumes as if it had not stopped."""

    def make():
        torch.manual_seed(0)
        model = patch(tiny_llama(), config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained == "all" or ".sparse_attention." in name)
        return model

    model = make()
    first = trainer(model, tmp_path / "whole")
    first.train()
    # A checkpoint is the model of its step, and steps 3 and 4 after a stop are those of a run that nothing stopped.
    last = hf_sparse.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(logits(last), logits(model))
    middle = hf_sparse.from_pretrained(tmp_path / "whole" / "checkpoint-2")
    assert not torch.equal(logits(middle), logits(model))

    resumed = make()
    second = trainer(resumed, tmp_path / "rest")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(logits(resumed), logits(model))
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    names = dict(make().named_parameters())
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, names[name])]
    assert any(".sparse_attention." not in name for name in changed) == (trained == "all")


@pytest.mark.parametrize("only_model", [False, True])
def test_a_trainer_takes_the_best_checkpoint(tiny_llama, config, only_model, tmp_path, caplog):
    model = patch(tiny_llama(), config)
    run = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first one, for training goes on after it
        save_only_model=only_model,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert torch.equal(logits(hf_sparse.from_pretrained(best)), logits(model))
    assert (best / "optimizer.pt").exists() == (not only_model)
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    run.save_model(str(tmp_path / "final"))
    assert torch.equal(logits(hf_sparse.from_pretrained(tmp_path / "final")), logits(model))
