"""Measure SparseK attention: contenders with as many slots, budgets, and shares of the layers and heads."""

from hf_sparse.methods.sparsek.evaluation.contenders import CONTENDERS as CONTENDERS
from hf_sparse.methods.sparsek.evaluation.contenders import ENCODER_CONTENDERS as ENCODER_CONTENDERS
from hf_sparse.methods.sparsek.evaluation.contenders import GENERATING as GENERATING
from hf_sparse.methods.sparsek.evaluation.contenders import SparseKEvaluation as SparseKEvaluation
from hf_sparse.methods.sparsek.evaluation.contenders import at_budget as at_budget
from hf_sparse.methods.sparsek.evaluation.contenders import budget_of as budget_of
from hf_sparse.methods.sparsek.evaluation.head_shares import divide_heads as divide_heads
from hf_sparse.methods.sparsek.evaluation.head_shares import head_damages as head_damages
from hf_sparse.methods.sparsek.evaluation.layer_shares import divide_layers as divide_layers
from hf_sparse.methods.sparsek.evaluation.layer_shares import layer_damages as layer_damages
