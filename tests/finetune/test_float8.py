"""Refuse what cannot multiply in fp8 before a model is loaded; the training is in `tests/composition/`."""

import importlib.util

import pytest
import torch

from hf_sparse.finetune import FinetuneConfig, finetune, float8
from hf_sparse.workflow import train_adapter


@pytest.fixture
def torchao(monkeypatch):
    """Let torchao seem to be installed, or not."""

    def install(installed):
        monkeypatch.delenv(float8.EMULATE, raising=False)
        monkeypatch.setattr(float8, "find_spec", lambda name: importlib.util.find_spec("torch") if installed else None)

    return install


def test_without_torchao(torchao, sparse_llama, chunks):
    torchao(False)
    with pytest.raises(ValueError, match=r"'fp8' needs torchao: pip install 'hf-sparse\[fp8\]'"):
        finetune(sparse_llama(), chunks, FinetuneConfig(mixed_precision="fp8", progress=False))


def test_on_a_cpu_nothing_is_loaded(torchao, sparse_llama, monkeypatch, tmp_path):
    sparse_llama().save_pretrained(tmp_path)
    torchao(True)
    monkeypatch.setattr("hf_sparse.workflow.load_adapter", lambda *args, **options: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="'fp8' needs a GPU; HF_SPARSE_EMULATE_FP8=1 computes on a CPU"):
        train_adapter(tmp_path, "text", FinetuneConfig(mixed_precision="fp8"), device="cpu")


def test_gpus_by_their_age(torchao, monkeypatch):
    torchao(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8.9 or newer, got NVIDIA A100 of 8.0"):
        float8.check_float8(cpu=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    float8.check_float8(cpu=False)


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("ACCELERATE_FP8_BACKEND", "TE", r"fp8 of torchao \(fp8_backend AO\), and the launcher was asked for TE"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "'fp8' does not go with DeepSpeed: divide the base with FSDP2"),
    ],
)
def test_what_a_launcher_may_not_ask_for(torchao, monkeypatch, variable, value, message):
    torchao(True)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        float8.check_float8(cpu=False)
