"""Write our card where PEFT's own methods or transformers' Trainer save and push an adapter.

They write a card of blanks, or keep the one that is there, whatever it claims, and have no place to ask a method for
another. So a `PeftModel` that holds a method of hf-sparse becomes one of a subclass, at the moment when PEFT puts the
tuner into it; classes of others stay as they are.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from hf_sparse.adapters.files import CARD, EVALUATION, TRAINING, WEIGHTS
from hf_sparse.adapters.folder import AdapterFolder
from hf_sparse.errors import DataError, HfSparseError
from hf_sparse.tuner import SparseModel

# Metadata of a replaced card that stays, for hf-sparse cannot know it.
_KEPT = ("license", "license_name", "license_link", "language", "datasets")

# Texts by which the cards are known that PEFT and the Trainer generate.
_BLANK, _DRAFTED = "[More Information Needed]", "generated automatically according to the information the Trainer"


class _OwnCard:
    """Write the card of hf-sparse where a `PeftModel` writes its own."""

    def save_pretrained(self, save_directory: str, *args: Any, **options: Any) -> None:
        """Save, and write our card beside every adapter that has no card written by a person."""
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
        for name in options.get("selected_adapters") or self.peft_config:  # type: ignore[attr-defined]
            folder = Path(save_directory, *([] if name == "default" else [name]))
            if options.get("is_main_process", True) and _is_replaceable(folder / CARD):
                _write(folder)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write our card over what the Trainer drafted; `save_pretrained` calls this too, before there are weights."""
        path = Path(output_dir, CARD)
        if path.is_file() and _DRAFTED in path.read_text("utf-8", errors="replace"):
            _write(Path(output_dir))

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **options: Any) -> Any:
        """Write our card after `push_to_hub` has written its own, and before it uploads."""
        if _is_replaceable(Path(working_dir, CARD)):
            _write(Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **options)  # type: ignore[misc]


#: The subclass of each class of PEFT's; pickle finds them in this module by their names.
CLASSES: dict[type, type] = {
    kind: type(kind.__name__, (_OwnCard, kind), {"__module__": __name__})
    for kind in vars(peft).values()
    if isinstance(kind, type) and issubclass(kind, PeftModel)
}
globals().update({kind.__name__: kind for kind in CLASSES.values()})


def _adopt(model: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Give a `PeftModel` its subclass at the moment when a tuner of hf-sparse becomes a module of it."""
    if isinstance(submodule, SparseModel) and type(model) in CLASSES:
        model.__class__ = CLASSES[type(model)]


def register() -> None:
    """Give every `PeftModel` that holds a method of hf-sparse from now on the card of hf-sparse."""
    global _registered
    if not _registered:
        register_module_module_registration_hook(_adopt)
        _registered = True


_registered = False


def _is_replaceable(path: Path) -> bool:
    """Tell whether a card is missing, blank or ours, and not one that a person wrote."""
    if not path.is_file():
        return True
    text = path.read_text("utf-8", errors="replace")
    return _BLANK in text or _DRAFTED in text or "\n- hf-sparse\n" in text


def _write(folder: Path, repo_id: str | None = None) -> None:
    """Write the card of an adapter that was just saved; what was measured of other weights is not on it."""
    if not (folder / WEIGHTS).is_file():
        return  # PEFT saved a pickle, which hf-sparse does not read
    try:
        adapter = AdapterFolder(folder)
        adapter.write_card(
            _unless_damaged(folder / EVALUATION, lambda: adapter.evaluation),
            _unless_damaged(folder / TRAINING, lambda: adapter.training),
            repo_id=repo_id,
            left_out=(EVALUATION, TRAINING) if repo_id else (),  # an earlier push may have left them there
            **_metadata_and_tags(folder / CARD),
        )
    except HfSparseError as error:  # the weights are saved, and must not be lost for a page of text
        warnings.warn(f"no card was written for {folder}: {error}", stacklevel=3)


def _unless_damaged(path: Path, read: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the content of a measurement, or warn that it is damaged and return `None`."""
    try:
        return read()
    except DataError as error:
        warnings.warn(f"the card of {path.parent} does without {path.name}: {error}", stacklevel=4)
        return None


def _metadata_and_tags(path: Path) -> dict[str, Any]:
    """Return tags of the card that is replaced, and the metadata that hf-sparse cannot know."""
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except ValueError:
        return {}
    tags = data.get("tags")
    return {
        "metadata": {name: data[name] for name in _KEPT if name in data},
        "tags": [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else [],
    }
