"""Register SparseK with PEFT."""

from typing import Any

from hf_sparse.core.registry import Method
from hf_sparse.methods.sparsek.attention import SparseKAttention as SparseKAttention
from hf_sparse.methods.sparsek.budget import Budget as Budget
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer as SparseKCacheLayer
from hf_sparse.methods.sparsek.config import SparseKConfig as SparseKConfig
from hf_sparse.methods.sparsek.settings import SETTINGS
from hf_sparse.tuner import SparseModel, register_method


class SparseKModel(SparseModel):
    """Attach SparseK to a model for `peft.get_peft_model`."""

    prefix = "sparsek_"


def _training() -> Any:
    from hf_sparse.methods.sparsek.training import SparseKTraining

    return SparseKTraining


def _evaluation() -> Any:
    from hf_sparse.methods.sparsek.evaluation import SparseKEvaluation

    return SparseKEvaluation()


def _report() -> Any:
    from hf_sparse.methods.sparsek.report import SparseKReport

    return SparseKReport()


register_method(
    Method(
        name=SETTINGS.name,
        peft_type=SETTINGS.peft_type,
        config=SparseKConfig,
        layer=SparseKAttention,
        tuner=SparseKModel,
        prefix=SparseKModel.prefix,
        training=_training,
        evaluation=_evaluation,
        report=_report,
    )
)
