"""Predict a graph from queries and keys. Each predictor is a class in a file of its own, made of a configuration."""

from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.predictors.balanced import BalancedClustering
from hf_sparse.methods.sparsefinder.predictors.base import AttentionInputs as AttentionInputs
from hf_sparse.methods.sparsefinder.predictors.base import Predictor as Predictor
from hf_sparse.methods.sparsefinder.predictors.bound import Bound
from hf_sparse.methods.sparsefinder.predictors.clustering import Clustering
from hf_sparse.methods.sparsefinder.predictors.distance import Distance
from hf_sparse.methods.sparsefinder.predictors.fixed import FixedBins
from hf_sparse.methods.sparsefinder.predictors.full import Full
from hf_sparse.methods.sparsefinder.predictors.pooled import Pooled
from hf_sparse.methods.sparsefinder.predictors.projected import ProjectedPredictor as ProjectedPredictor
from hf_sparse.methods.sparsefinder.predictors.quantization import Quantization


def predictor_of(config: SparsefinderConfig) -> Predictor:
    """Make the predictor that a configuration asks for."""
    kinds: dict[str, type[Predictor]] = {
        "clustering": BalancedClustering if config.balanced else Clustering,
        "quantization": FixedBins if config.bin_kind == "fixed" else Quantization,
        "distance": Distance,
        "bound": Bound,
        "pooled": Pooled,
        "full": Full,
    }
    return kinds[config.predictor](config)
