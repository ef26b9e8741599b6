"""What a predicted graph of entmax attention is worth, beside the graphs that others attend by."""

from hf_sparse.evaluation.graphs.analyse import FORMAT as FORMAT
from hf_sparse.evaluation.graphs.analyse import SPARSITIES as SPARSITIES
from hf_sparse.evaluation.graphs.analyse import analyse as analyse
from hf_sparse.evaluation.graphs.describe import describe_graphs as describe_graphs
from hf_sparse.evaluation.graphs.patterns import PATTERNS as PATTERNS
from hf_sparse.evaluation.graphs.points import adapter_settings as adapter_settings
from hf_sparse.evaluation.graphs.points import predicting_methods as predicting_methods
from hf_sparse.evaluation.graphs.show import graph_table as graph_table
from hf_sparse.evaluation.graphs.show import point_name as point_name
