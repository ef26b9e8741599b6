"""SparseK: a learned scorer keeps the k best older keys beside a sliding window and sinks."""

from hf_sparse.methods.registry import Method, register_method
from hf_sparse.methods.sparsek.attention import SparseKAttention as SparseKAttention
from hf_sparse.methods.sparsek.budget import Budget as Budget
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer as SparseKCacheLayer
from hf_sparse.methods.sparsek.config import PEFT_TYPE
from hf_sparse.methods.sparsek.config import SparseKConfig as SparseKConfig

register_method(Method(PEFT_TYPE, SparseKConfig, SparseKAttention, prefix="sparsek_"))
