"""Learned sparse attention for pretrained transformers.

Importing this registers the methods with PEFT and transformers; it changes no model.
"""

from importlib.metadata import version as _version

from hf_sparse.adapters.peft_cards import register as _register_cards
from hf_sparse.errors import HfSparseError as HfSparseError
from hf_sparse.hub import from_pretrained as from_pretrained
from hf_sparse.hub import push_to_hub as push_to_hub
from hf_sparse.methods.sparsefinder import SparsefinderConfig as SparsefinderConfig
from hf_sparse.methods.sparsek import SparseKConfig as SparseKConfig
from hf_sparse.patches import SparseCache as SparseCache
from hf_sparse.patches import SparseKCache as SparseKCache
from hf_sparse.patches import patch as patch
from hf_sparse.patches import patched as patched
from hf_sparse.patches import unpatch as unpatch

__version__ = _version("hf-sparse")

_register_cards()
