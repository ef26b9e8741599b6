"""Draw the pictures of a SparseK adapter, for its card and its report.

Each function takes the content of a JSON file and writes one PNG, which appears whole or not at all.
"""

from hf_sparse.methods.sparsek.figures.budgets import budgets_figure as budgets_figure
from hf_sparse.methods.sparsek.figures.kept import heads_figure as heads_figure
from hf_sparse.methods.sparsek.figures.kept import shade as shade
from hf_sparse.methods.sparsek.figures.kept import tokens_figure as tokens_figure
from hf_sparse.methods.sparsek.figures.positions import positions_figure as positions_figure
from hf_sparse.methods.sparsek.figures.quality import divergence_figure as divergence_figure
from hf_sparse.methods.sparsek.figures.quality import quality_figure as quality_figure
from hf_sparse.methods.sparsek.figures.shares import shares_figure as shares_figure
from hf_sparse.methods.sparsek.figures.tasks import task_figure as task_figure
