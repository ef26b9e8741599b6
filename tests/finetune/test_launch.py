"""Runs that a launcher did not start as it was asked to are refused before anything is loaded."""

import json
import subprocess
import sys

import pytest
import torch

from hf_sparse.finetune import FinetuneConfig, config_file, launch
from hf_sparse.finetune.launch import CONFIGS, check_devices, check_launch
from hf_sparse.finetune.processes import make_accelerator, separate_accelerate_state


def test_configurations_are_files_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {name: load_config_from_file(str(config_file(name))).distributed_type.value for name in CONFIGS}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    with pytest.raises(ValueError, match=r"one of ddp, fsdp2, zero3 or a file of `accelerate config`, got 'zero2'"):
        config_file("zero2")


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "does not train with Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "expected fsdp_version 2, got 1"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading must be false",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "use gradient_checkpointing of finetune",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_offload_params must be false",
        ),
    ],
)
def test_refuses_engines_and_settings(monkeypatch, environment, message):
    """Megatron-LM and `parallelism_config` of a launcher are refused before anything is loaded."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_launch()


@pytest.mark.parametrize(
    "settings, init, message",
    [
        ({}, "false", None),
        ({}, "true", "zero3_init_flag must be false"),
        ({"zero_optimization": {"stage": 2}}, "false", "expected zero_stage 3, got 2: the stages below divide only"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "false",
            "offload_param_device must be none, got",
        ),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "false", "asks for with zero_quantized_weights"),
        ({"optimizer": {"type": "AdamW"}}, "false", "does not do what the configuration of DeepSpeed asks for with op"),
    ],
)
def test_takes_of_deepspeed_zero3_alone(monkeypatch, tmp_path, settings, init, message):
    zero = {"stage": 3, **settings.get("zero_optimization", {})}
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({**settings, "zero_optimization": zero, "gradient_clipping": 0.5}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", init)
    monkeypatch.setattr(launch, "find_spec", lambda name: name)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            check_launch()
    else:
        with pytest.raises(ValueError, match="configured for ZeRO-3 and this process was not launched"):
            check_launch()
        monkeypatch.setattr(launch, "is_launched", lambda: True)
        check_launch()
        with pytest.raises(ValueError, match=r"asked for gradient_clipping 0\.5, and the settings say max_grad_norm 1"):
            make_accelerator(FinetuneConfig(cpu=True))


def test_says_where_deepspeed_is_missing(monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"DeepSpeed, which is not installed: pip install 'hf-sparse\[deepspeed\]'"):
        launch.launch(["finetune", "adapter"], 2, "zero3")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"DeepSpeed, which is not installed: pip install 'hf-sparse\[deepspeed\]'"):
        check_launch()


def test_refuses_another_number_of_processes(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_launch(2)
    with pytest.raises(ValueError, match="expected 4 processes, and the launcher started 2"):
        check_launch(4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_devices(cpu=True)
    with pytest.raises(ValueError, match="expected a GPU for each of 2 processes, got 1"):
        check_devices(cpu=False)


def test_refuses_another_precision_than_the_launchers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with separate_accelerate_state():
        with pytest.raises(ValueError, match=r"asked for mixed_precision 'bf16', and the settings say 'no'"):
            make_accelerator(FinetuneConfig(cpu=True))
        assert make_accelerator(FinetuneConfig(cpu=True, mixed_precision="bf16")).mixed_precision == "bf16"


def test_one_process_of_several_is_refused(monkeypatch):
    """Set the variables that `accelerate launch --cpu --num_processes 2` sets in the one process that it starts."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launch()  # one process was asked for
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ValueError, match="accelerate was asked for several processes and started this one alone"):
        check_launch()


@pytest.mark.full  # the test before has the variables
def test_accelerate_starts_one_process_of_two_on_a_cpu(tmp_path):
    """accelerate itself says nothing."""
    program = tmp_path / "program.py"
    program.write_text("from hf_sparse.finetune.launch import check_launch\ncheck_launch()\n")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run([*launcher, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "accelerate was asked for several processes and started this one alone" in done.stderr
