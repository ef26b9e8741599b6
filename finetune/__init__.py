if __name__ != "hf_sparse.finetune":
    raise ImportError(
        f"import this package as hf_sparse.finetune, not as {__name__}: under two names its classes would exist twice"
    )

from hf_sparse.finetune.config import FinetuneConfig as FinetuneConfig
from hf_sparse.finetune.loop import finetune as finetune
