"""Register Sparsefinder with PEFT."""

from typing import Any

from hf_sparse.core.registry import Method
from hf_sparse.methods.sparsefinder.attention import SparsefinderAttention as SparsefinderAttention
from hf_sparse.methods.sparsefinder.cache import SparsefinderCacheLayer as SparsefinderCacheLayer
from hf_sparse.methods.sparsefinder.config import SparsefinderConfig as SparsefinderConfig
from hf_sparse.methods.sparsefinder.fit import fit_predictors as fit_predictors
from hf_sparse.methods.sparsefinder.settings import SETTINGS
from hf_sparse.tuner import SparseModel, register_method


class SparsefinderModel(SparseModel):
    """Attach Sparsefinder to a model for `peft.get_peft_model`."""

    prefix = "sparsefinder_"


def _training() -> Any:
    from hf_sparse.methods.sparsefinder.training import SparsefinderTraining

    return SparsefinderTraining


def _evaluation() -> Any:
    from hf_sparse.methods.sparsefinder.evaluation import SparsefinderEvaluation

    return SparsefinderEvaluation()


def _report() -> Any:
    from hf_sparse.methods.sparsefinder.report import SparsefinderReport

    return SparsefinderReport()


register_method(
    Method(
        name=SETTINGS.name,
        peft_type=SETTINGS.peft_type,
        config=SparsefinderConfig,
        layer=SparsefinderAttention,
        tuner=SparsefinderModel,
        prefix=SparsefinderModel.prefix,
        training=_training,
        evaluation=_evaluation,
        report=_report,
    )
)
