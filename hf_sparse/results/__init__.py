"""The results of every method, which `hf_sparse.workflow`, `repo`, `card` and `report` ask."""

from typing import Any

from hf_sparse.methods import method_of
from hf_sparse.methods.base import SparseMethod
from hf_sparse.methods.sparsefinder import SparsefinderAttention
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.results.base import Pictures as Pictures
from hf_sparse.results.base import Results
from hf_sparse.results.sparsefinder import SPARSEFINDER
from hf_sparse.results.sparsek import SPARSEK

RESULTS: dict[type[SparseMethod], Results] = {SparseKAttention: SPARSEK, SparsefinderAttention: SPARSEFINDER}


def results_of(config: Any) -> Results:
    """The results of adapters with a configuration like this."""
    return RESULTS[method_of(config).attention]
