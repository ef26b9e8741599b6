"""Run several processes with accelerate's launcher, and check that a launcher gave what it was asked for."""

import os
from collections.abc import Sequence
from pathlib import Path

from hf_sparse.environment import is_launched, launched_processes

_CONFIGS = Path(__file__).parent / "configs"

#: The configurations of `accelerate launch` that come with hf-sparse.
CONFIGS = ("ddp", "fsdp2")

# Engines that accelerate can start and `finetune` cannot train with, by the variable that asks for them.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def config_file(name: str) -> Path:
    """Return the file of a configuration for `accelerate launch --config_file`.

    Args:
        name: `"ddp"`: every process holds the whole model. `"fsdp2"`: the frozen base model is divided among the
            processes. Or the path of a file that `accelerate config` wrote.

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
        ValueError: there is no such configuration.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--config_file", str(config_file(config)), "--num_processes", str(processes)]
    parsed = launch_command_parser().parse_args([*options, "--module", "hf_sparse", *arguments])
    try:
        launch_command(parsed)
    except ChildFailedError as error:  # the process has said why
        return max(1, int(error.get_first_failure()[1].exitcode))  # below 0 it is the signal that ended the process
    return 0


def is_sharded() -> bool:
    """Tell whether a launcher asked for FSDP, which divides the base model among the processes."""
    return _is_true("ACCELERATE_USE_FSDP")


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
                "among processes use FSDP2 (hf_sparse.finetune.config_file('fsdp2'))"
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
    if is_sharded():
        _check_sharding()


def check_devices(*, cpu: bool) -> None:
    """Check that every process of this machine has a GPU of its own, unless all work on the CPU.

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1
    if not cpu and 0 < torch.cuda.device_count() < local:
        raise ValueError(f"expected a GPU for each of {local} processes, got {torch.cuda.device_count()}")


def _check_sharding() -> None:
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
