"""Models for the tests of what runs beside which library: the bundled Llama with either method."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.demo import CHECKPOINT

CONFIGS = {
    "sparsek": lambda: hf_sparse.SparseKConfig(k=20, window=8, sinks=4),
    "sparsefinder": lambda: hf_sparse.SparsefinderConfig(predictor="bound", tile=8, window=8, sparsity=0.5, length=128),
}


@pytest.fixture
def make():
    """Make a `PeftModel` on a base model, by default the bundled Llama; the same weights every time."""

    def model(base=None, method="sparsek", **options):
        if base is None:
            base = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="float32", **options)
        torch.manual_seed(0)
        return get_peft_model(base, CONFIGS[method]())

    return model


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture
def ids():
    return torch.randint(4, 500, (2, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def training(tmp_path):
    """Return the arguments of two steps on the CPU, for any `TrainingArguments`."""
    return {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


@pytest.fixture
def trained():
    """Train with a function, and check that every parameter of the adapter moved and the base did not."""

    def check(model, train):
        before = {name: copy.deepcopy(p.detach()) for name, p in model.named_parameters()}
        learned = {name for name, p in model.named_parameters() if p.requires_grad}
        train()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert learned and moved == learned

    return check
