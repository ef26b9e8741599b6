"""Give the `k` places by other scores than the learned one, behind the same cache and the same code path.

A baseline gives the keys of one attention module their scores; everything else stays as it is, so that a baseline
differs from the learned model in the selection alone. All have the same slots, sinks and window counted in.

    frozen      a score on arrival that never changes, as the learned one: exact in one pass, in chunks and in steps
    adaptive    scores that follow the attention which the cached keys receive (`adaptive`)
"""

from hf_sparse.methods.sparsek.baselines.adaptive import AdaptiveBaseline as AdaptiveBaseline
from hf_sparse.methods.sparsek.baselines.attention_scores import H2O as H2O
from hf_sparse.methods.sparsek.baselines.attention_scores import TOVA as TOVA
from hf_sparse.methods.sparsek.baselines.attention_scores import SnapKV as SnapKV
from hf_sparse.methods.sparsek.baselines.baseline import Arrivals as Arrivals
from hf_sparse.methods.sparsek.baselines.baseline import Baseline as Baseline
from hf_sparse.methods.sparsek.baselines.keys import KeyDifference as KeyDifference
from hf_sparse.methods.sparsek.baselines.keys import KeyNorm as KeyNorm
from hf_sparse.methods.sparsek.baselines.oracle import Oracle as Oracle
from hf_sparse.methods.sparsek.baselines.positions import PromptRandom as PromptRandom
from hf_sparse.methods.sparsek.baselines.positions import Random as Random
from hf_sparse.methods.sparsek.baselines.positions import Recency as Recency

recency, random = Recency(), Random()

#: Baselines by the name that evaluation prints.
BASELINES: dict[str, Baseline] = {
    "recency": recency,
    "random": random,
    "prompt_random": PromptRandom(),
    "key_norm": KeyNorm(),
    "key_difference": KeyDifference(),
    "oracle": Oracle(),
    "h2o": H2O(),
    "tova": TOVA(),
    "snapkv": SnapKV(),
}
