"""Write an adapter's two files into a folder."""

import shutil
from pathlib import Path

from peft import PeftModel

from hf_sparse.adapters.files import CARD, CONFIG, WEIGHTS
from hf_sparse.atomic_files import check_place
from hf_sparse.folders import is_empty, recover, staged


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, both or none."""
    with staged(folder, first=(CONFIG, WEIGHTS)) as stage:
        model.save_pretrained(str(stage), save_embedding_layers=False)
        (stage / CARD).unlink(missing_ok=True)  # it is written anew from the measurements of the folder
        shutil.copymode(stage / CONFIG, stage / WEIGHTS)  # safetensors lets nobody but the owner read what it writes


def check_free(folder: Path, force: bool = False, way_out: str = "") -> None:
    """Refuse a place for new files: a file, a folder that is not empty, or one that cannot be made.

    Args:
        folder: the place.
        force: take a folder that is not empty.
        way_out: ends the message of a caller that can be told to do so.

    Raises:
        ValueError: something is there.
        PermissionError: the folder does not exist and cannot be made.
    """
    check_place(folder)
    recover(folder)
    if folder.exists() and not (folder.is_dir() and (force or is_empty(folder))):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another{way_out}")
