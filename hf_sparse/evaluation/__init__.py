"""Measure what sparse attention costs in quality and what it saves.

Perplexity by position and divergence from dense attention at one or several budgets, tasks that are scored by
generation, bytes of keys and values, and speed; every one for the dense model, the trained method and baselines of
equal size. What is compared and what else is measured is the method's: its `Evaluation` says so.
"""

from hf_sparse.evaluation.base import Request as Request
from hf_sparse.evaluation.contenders import Evaluation as Evaluation
from hf_sparse.evaluation.measure import FORMAT as FORMAT
from hf_sparse.evaluation.measure import evaluate as evaluate
from hf_sparse.evaluation.quality import compare as compare
from hf_sparse.evaluation.quality import divergence as divergence
from hf_sparse.evaluation.quality import embeddings as embeddings
from hf_sparse.evaluation.quality import masked_perplexity as masked_perplexity
from hf_sparse.evaluation.quality import perplexity as perplexity
from hf_sparse.evaluation.show import readable_bytes as readable_bytes
from hf_sparse.evaluation.show import table as table
from hf_sparse.evaluation.show import tables as tables
from hf_sparse.evaluation.show import task_table as task_table
from hf_sparse.evaluation.switching import evaluation_of as evaluation_of
from hf_sparse.evaluation.switching import using as using
from hf_sparse.patches.cache import kv_bytes as kv_bytes
