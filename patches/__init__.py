if __name__ != "hf_sparse.patches":
    raise ImportError(
        f"import this package as hf_sparse.patches, not as {__name__}: under two names its classes would exist twice"
    )

from hf_sparse.patches import llama as llama
from hf_sparse.patches.attach import methods_of as methods_of
from hf_sparse.patches.attach import patch as patch
from hf_sparse.patches.attach import patched as patched
from hf_sparse.patches.attach import unpatch as unpatch
from hf_sparse.patches.base import Family as Family
from hf_sparse.patches.base import register_family as register_family
from hf_sparse.patches.base import supported_model_types as supported_model_types
from hf_sparse.patches.interface import NAME as NAME
