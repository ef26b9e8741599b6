"""What a predicted graph of entmax attention is worth, beside the graphs that others attend by."""

from hf_sparse.methods.sparsefinder.evaluation.analyse import FORMAT as FORMAT
from hf_sparse.methods.sparsefinder.evaluation.analyse import SPARSITIES as SPARSITIES
from hf_sparse.methods.sparsefinder.evaluation.analyse import analyse as analyse
from hf_sparse.methods.sparsefinder.evaluation.describe import describe_graphs as describe_graphs
from hf_sparse.methods.sparsefinder.evaluation.operating_points import adapter_settings as adapter_settings
from hf_sparse.methods.sparsefinder.evaluation.operating_points import predicting_layers as predicting_layers
from hf_sparse.methods.sparsefinder.evaluation.patterns import PATTERNS as PATTERNS
from hf_sparse.methods.sparsefinder.evaluation.show import graph_table as graph_table
from hf_sparse.methods.sparsefinder.evaluation.show import point_name as point_name
