"""Measure what a predicted graph of entmax attention is worth, beside the graphs that others attend by."""

from hf_sparse.methods.sparsefinder.evaluation.attention_graph import AttentionGraph as AttentionGraph
from hf_sparse.methods.sparsefinder.evaluation.attention_graph import attention_graphs as attention_graphs
from hf_sparse.methods.sparsefinder.evaluation.contenders import SparsefinderEvaluation as SparsefinderEvaluation
from hf_sparse.methods.sparsefinder.evaluation.describe import describe_graphs as describe_graphs
from hf_sparse.methods.sparsefinder.evaluation.measure import measure_graphs as measure_graphs
from hf_sparse.methods.sparsefinder.evaluation.operating_points import adapter_settings as adapter_settings
from hf_sparse.methods.sparsefinder.evaluation.operating_points import predicting_layers as predicting_layers
from hf_sparse.methods.sparsefinder.evaluation.patterns import CONTENDERS as CONTENDERS
from hf_sparse.methods.sparsefinder.evaluation.show import graph_table as graph_table
from hf_sparse.methods.sparsefinder.evaluation.show import point_name as point_name
