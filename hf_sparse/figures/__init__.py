"""The pictures of an adapter: what its measurements say, for the model card and the report.

Each function takes the content of a JSON file and writes one PNG, which appears whole or not at all.
"""

from hf_sparse.figures.budgets import budgets_figure as budgets_figure
from hf_sparse.figures.covered import covered_figure as covered_figure
from hf_sparse.figures.graphs import graphs_figure as graphs_figure
from hf_sparse.figures.kept import heads_figure as heads_figure
from hf_sparse.figures.kept import shade as shade
from hf_sparse.figures.kept import tokens_figure as tokens_figure
from hf_sparse.figures.pareto import pareto_figure as pareto_figure
from hf_sparse.figures.positions import positions_figure as positions_figure
from hf_sparse.figures.quality import divergence_figure as divergence_figure
from hf_sparse.figures.quality import quality_figure as quality_figure
from hf_sparse.figures.tasks import task_figure as task_figure
from hf_sparse.figures.training import training_figure as training_figure
