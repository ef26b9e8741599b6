"""What sparse attention costs in quality and what it saves.

Perplexity by position and divergence from dense attention at one or several budgets, tasks that are scored by
generation, bytes of keys and values, and speed; every one for the dense model, the trained scorers and baselines with
as many slots. Of a predicted graph, what it covers of the gold graph beside other patterns: `graphs`.
"""

from hf_sparse.evaluation.measure import FORMAT as FORMAT
from hf_sparse.evaluation.measure import evaluate as evaluate
from hf_sparse.evaluation.quality import compare as compare
from hf_sparse.evaluation.quality import divergence as divergence
from hf_sparse.evaluation.quality import embeddings as embeddings
from hf_sparse.evaluation.quality import masked_perplexity as masked_perplexity
from hf_sparse.evaluation.quality import perplexity as perplexity
from hf_sparse.evaluation.show import readable_bytes as readable_bytes
from hf_sparse.evaluation.show import sweep_table as sweep_table
from hf_sparse.evaluation.show import table as table
from hf_sparse.evaluation.show import task_table as task_table
from hf_sparse.methods.sparsefinder.evaluation import PATTERNS as PATTERNS
from hf_sparse.methods.sparsefinder.evaluation import SPARSITIES as SPARSITIES
from hf_sparse.methods.sparsefinder.evaluation import analyse as analyse
from hf_sparse.methods.sparsefinder.evaluation import graph_table as graph_table
from hf_sparse.methods.sparsek.evaluation.budgets import at_budget as at_budget
from hf_sparse.methods.sparsek.evaluation.budgets import budget_of as budget_of
from hf_sparse.methods.sparsek.evaluation.contenders import ENCODER_SELECTIONS as ENCODER_SELECTIONS
from hf_sparse.methods.sparsek.evaluation.contenders import GENERATING as GENERATING
from hf_sparse.methods.sparsek.evaluation.contenders import SELECTIONS as SELECTIONS
from hf_sparse.methods.sparsek.evaluation.contenders import check_selections as check_selections
from hf_sparse.methods.sparsek.evaluation.contenders import selection as selection
from hf_sparse.methods.sparsek.evaluation.contenders import selections_of as selections_of
from hf_sparse.methods.sparsek.evaluation.layer_shares import divide_layers as divide_layers
from hf_sparse.methods.sparsek.evaluation.layer_shares import layer_damages as layer_damages
from hf_sparse.patches.cache import kv_bytes as kv_bytes
