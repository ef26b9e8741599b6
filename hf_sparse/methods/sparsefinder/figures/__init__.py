"""Draw the pictures of a Sparsefinder adapter, for its card and its report.

Each function takes the content of a JSON file and writes one PNG, which appears whole or not at all.
"""

from hf_sparse.methods.sparsefinder.figures.covered import covered_figure as covered_figure
from hf_sparse.methods.sparsefinder.figures.graphs import graphs_figure as graphs_figure
from hf_sparse.methods.sparsefinder.figures.pareto import pareto_figure as pareto_figure
from hf_sparse.methods.sparsefinder.figures.weights import weights_figure as weights_figure
