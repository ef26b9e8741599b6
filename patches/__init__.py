import pkgutil
from importlib import import_module

if __name__ != "hf_sparse.patches":
    raise ImportError(
        f"import this package as hf_sparse.patches, not as {__name__}: under two names its classes would exist twice"
    )

from hf_sparse.patches.attach import patch as patch
from hf_sparse.patches.attach import patched as patched
from hf_sparse.patches.attach import unpatch as unpatch
from hf_sparse.patches.attached import sparse_layers as sparse_layers
from hf_sparse.patches.attached import sparse_layers_in_use as sparse_layers_in_use
from hf_sparse.patches.base import Family as Family
from hf_sparse.patches.base import register_family as register_family
from hf_sparse.patches.base import supported_model_types as supported_model_types
from hf_sparse.patches.cache import SparseCache as SparseCache
from hf_sparse.patches.cache import SparseKCache as SparseKCache
from hf_sparse.patches.captured import CapturedDecoding as CapturedDecoding
from hf_sparse.patches.interface import NAME as NAME
from hf_sparse.patches.recorded_prompts import unrecorded as unrecorded

# A file of this folder that describes a family registers it.
for _file in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
