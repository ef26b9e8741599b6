from typing import TYPE_CHECKING

if __name__ != "hf_sparse.finetune":
    raise ImportError(
        f"import this package as hf_sparse.finetune, not as {__name__}: under two names its classes would exist twice"
    )

from hf_sparse.late_imports import late_imports

__all__ = ["FinetuneConfig", "config_file", "estimate", "finetune"]

from hf_sparse.finetune.config import FinetuneConfig
from hf_sparse.finetune.launch import config_file

if TYPE_CHECKING:
    from hf_sparse.finetune.loop import estimate, finetune
else:
    __getattr__ = late_imports(__name__, f"{__name__}.loop", ["estimate", "finetune"])
