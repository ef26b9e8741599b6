"""Import what the library offers and register the methods with PEFT and transformers."""

# Programs reach these as attributes after `import hf_sparse` alone.
from hf_sparse import demo as demo
from hf_sparse import evaluation as evaluation
from hf_sparse import finetune as finetune
from hf_sparse import methods
from hf_sparse import retrieval as retrieval
from hf_sparse.adapters.peft_cards import register
from hf_sparse.errors import HfSparseError as HfSparseError
from hf_sparse.hub import from_pretrained as from_pretrained
from hf_sparse.hub import push_to_hub as push_to_hub
from hf_sparse.methods.sparsefinder import SparsefinderConfig as SparsefinderConfig
from hf_sparse.methods.sparsefinder.evaluation import attention_graphs as attention_graphs
from hf_sparse.methods.sparsek import SparseKConfig as SparseKConfig
from hf_sparse.patches import CapturedDecoding as CapturedDecoding
from hf_sparse.patches import SparseCache as SparseCache
from hf_sparse.patches import SparseKCache as SparseKCache
from hf_sparse.patches import patch as patch
from hf_sparse.patches import patched as patched
from hf_sparse.patches import unpatch as unpatch
from hf_sparse.patches import unrecorded as unrecorded

methods.register_all()
register()
