"""Run several processes with accelerate's launcher, and check that a launcher gave what it was asked for."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_sparse.environment import is_launched, launched_processes

_CONFIGS = Path(__file__).parent / "configs"

#: The configurations of `accelerate launch` that come with hf-sparse.
CONFIGS = ("ddp", "fsdp2", "zero3")

# Engines that accelerate can start and `finetune` cannot train with, by the variable that asks for them.
_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def config_file(name: str) -> Path:
    """Return the file of a configuration for `accelerate launch --config_file`.

    Args:
        name: `"ddp"`: every process holds the whole model. `"fsdp2"`: the frozen base model is divided among the
            processes. `"zero3"`: the same with DeepSpeed. Or the path of a file that `accelerate config` wrote.

    Raises:
        ValueError: there is no such configuration or file.
    """
    path = _CONFIGS / f"{name}.yaml" if name in CONFIGS else Path(name)
    if not path.is_file():
        raise ValueError(f"expected one of {', '.join(CONFIGS)} or a file of `accelerate config`, got {name!r}")
    return path


def launch(arguments: Sequence[str], processes: int, config: str) -> int:
    """Run `hf-sparse` with arguments in several processes, and wait for them.

    Args:
        arguments: what follows `hf-sparse` on the command line.
        processes: how many.
        config: see `config_file`.

    Returns:
        The exit code: 0, that of the first process that failed, or 1 if a signal ended it.

    Raises:
        ValueError: there is no such configuration, or it needs DeepSpeed, which is not installed.
    """
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    file = str(config_file(config))
    if load_config_from_file(file).distributed_type == "DEEPSPEED":
        _check_deepspeed()
    options = ["--config_file", file, "--num_processes", str(processes)]
    parsed = launch_command_parser().parse_args([*options, "--module", "hf_sparse", *arguments])
    try:
        launch_command(parsed)
    except ChildFailedError as error:  # the process has said why
        return max(1, int(error.get_first_failure()[1].exitcode))  # below 0 it is the signal that ended the process
    return 0


def is_sharded() -> bool:
    """Tell whether a launcher asked for FSDP or DeepSpeed, which divide the base model among the processes."""
    return _is_true("ACCELERATE_USE_FSDP") or is_zero3()


def is_zero3() -> bool:
    """Tell whether a launcher asked for DeepSpeed, of which `check_launch` takes ZeRO-3 only."""
    return _is_true("ACCELERATE_USE_DEEPSPEED")


@contextmanager
def without_deepspeed_engine() -> Iterator[None]:
    """Hide from accelerate, within a `with` block, that it was asked for DeepSpeed.

    DeepSpeed's engine would take over gradients, optimiser and checkpoints. Here it divides the frozen base model only,
    and to accelerate the processes are those of a model that is not divided.
    """
    asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = asked


def check_launch(processes: int | None = None) -> None:
    """Check, before anything is loaded, that this process runs as its launcher was asked to run it.

    Args:
        processes: how many were asked for; `None` if only the launcher knows.

    Raises:
        ValueError: there are fewer processes than asked for, fewer GPUs than processes, or an engine was asked for
            that `finetune` cannot train with.
    """
    for variable, engine in _REFUSED.items():
        if _is_true(variable):
            raise ValueError(
                f"finetune does not train with {engine}, for which accelerate was configured: to divide the base model "
                "among processes use FSDP2 or ZeRO-3 (hf_sparse.finetune.config_file('fsdp2'), or 'zero3')"
            )
    launched = launched_processes()
    # `accelerate launch --cpu --num_processes 2` starts one process, and leaves it to MPI to start others.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and not is_launched():
        raise ValueError(
            "accelerate was asked for several processes and started this one alone, as it does on a CPU without MPI: "
            "use `hf-sparse finetune --num-processes N`, torchrun, or accelerate launch with the configuration "
            "hf_sparse.finetune.config_file('ddp') and without --cpu"
        )
    if processes is not None and launched != processes:
        raise ValueError(f"expected {processes} processes, and the launcher started {launched}")
    if _is_true("ACCELERATE_USE_FSDP"):
        _check_fsdp()
    if is_zero3():
        _check_deepspeed()
        _check_zero()
        if not is_launched():
            raise ValueError(
                "accelerate is configured for ZeRO-3 and this process was not launched: use `hf-sparse finetune "
                "--accelerate-config zero3`, or accelerate launch with hf_sparse.finetune.config_file('zero3')"
            )


def check_devices(*, cpu: bool) -> None:
    """Check that every process of this machine has a GPU of its own, unless all work on the CPU.

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1
    if not cpu and 0 < torch.cuda.device_count() < local:
        raise ValueError(f"expected a GPU for each of {local} processes, got {torch.cuda.device_count()}")


def _check_deepspeed() -> None:
    """Check that DeepSpeed is installed."""
    if find_spec("deepspeed") is None:
        raise ValueError(
            "accelerate was configured for DeepSpeed, which is not installed: pip install 'hf-sparse[deepspeed]'"
        )


def _check_zero() -> None:
    """Check the settings of DeepSpeed, which accelerate hands on in the environment or in a file."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    if plugin.zero_stage != 3:
        raise ValueError(
            f"expected zero_stage 3, got {plugin.zero_stage}: the stages below divide only what belongs to trained "
            "parameters, which are few here and whole in each process, as with hf_sparse.finetune.config_file('ddp')"
        )
    if plugin.zero3_init_flag:
        raise ValueError("zero3_init_flag must be false: finetune divides the model that it is given")
    for name in ("offload_param_device", "offload_optimizer_device"):
        if getattr(plugin, name) != "none":
            raise ValueError(f"{name} must be none, got {getattr(plugin, name)}: finetune keeps all parts on the GPUs")
    zero = plugin.deepspeed_config["zero_optimization"]
    others = [name for name in ("optimizer", "scheduler", "compression_training") if name in plugin.deepspeed_config]
    none: dict[str, Any] = {"zero_hpz_partition_size": 1}
    others += [name for name, value in zero.items() if name.startswith("zero_") and value != none.get(name, False)]
    if others:
        raise ValueError(f"finetune does not do what the configuration of DeepSpeed asks for with {', '.join(others)}")


def _check_fsdp() -> None:
    """Check the settings of FSDP, which accelerate hands on in the environment."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(f"expected fsdp_version 2, got {os.environ.get('FSDP_VERSION', '1')}")
    if _is_true("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be false: accelerate hands the weights of the first process on only "
            "where all of the model is divided, and what is trained here is not"
        )
    if _is_true("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError("fsdp_activation_checkpointing must be false: use gradient_checkpointing of finetune")
    if _is_true("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("fsdp_offload_params must be false: finetune keeps the divided base model on the GPUs")


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")
