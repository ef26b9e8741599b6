"""Give pretrained transformers learned sparse attention.

Importing this registers the methods with PEFT and transformers; it changes no model. The one exception is the process
of the command line itself: it registers them (`import hf_sparse.library`) when a verb begins its work, so that help and
mistakes in arguments need not wait for torch.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from hf_sparse.command_line import started_as_command_line
from hf_sparse.late_imports import late_imports

__all__ = [
    "CapturedDecoding",
    "HfSparseError",
    "SparseCache",
    "SparseKCache",
    "SparseKConfig",
    "SparsefinderConfig",
    "attention_graphs",
    "from_pretrained",
    "patch",
    "patched",
    "push_to_hub",
    "unpatch",
    "unrecorded",
]

__version__ = _version("hf-sparse")

if TYPE_CHECKING or not started_as_command_line():
    from hf_sparse.library import (
        CapturedDecoding,
        HfSparseError,
        SparseCache,
        SparsefinderConfig,
        SparseKCache,
        SparseKConfig,
        attention_graphs,
        from_pretrained,
        patch,
        patched,
        push_to_hub,
        unpatch,
        unrecorded,
    )
else:
    __getattr__ = late_imports(__name__, "hf_sparse.library", __all__)
