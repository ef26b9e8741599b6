if __name__ != "hf_sparse.patches":
    raise ImportError(
        f"import this package as hf_sparse.patches, not as {__name__}: under two names its classes would exist twice"
    )

from hf_sparse.patches import bert as bert
from hf_sparse.patches import cohere as cohere
from hf_sparse.patches import distilbert as distilbert
from hf_sparse.patches import electra as electra
from hf_sparse.patches import gemma as gemma
from hf_sparse.patches import glm as glm
from hf_sparse.patches import gpt2 as gpt2
from hf_sparse.patches import gpt_neox as gpt_neox
from hf_sparse.patches import gptj as gptj
from hf_sparse.patches import granite as granite
from hf_sparse.patches import llama as llama
from hf_sparse.patches import llava as llava
from hf_sparse.patches import mistral as mistral
from hf_sparse.patches import mixtral as mixtral
from hf_sparse.patches import modernbert as modernbert
from hf_sparse.patches import olmo2 as olmo2
from hf_sparse.patches import olmo3 as olmo3
from hf_sparse.patches import opt as opt
from hf_sparse.patches import phi as phi
from hf_sparse.patches import phi3 as phi3
from hf_sparse.patches import qwen2 as qwen2
from hf_sparse.patches import qwen3 as qwen3
from hf_sparse.patches import qwen3_moe as qwen3_moe
from hf_sparse.patches import roberta as roberta
from hf_sparse.patches import smollm3 as smollm3
from hf_sparse.patches import stablelm as stablelm
from hf_sparse.patches import starcoder2 as starcoder2
from hf_sparse.patches import xlm_roberta as xlm_roberta
from hf_sparse.patches.attach import patch as patch
from hf_sparse.patches.attach import patched as patched
from hf_sparse.patches.attach import sparse_layers as sparse_layers
from hf_sparse.patches.attach import sparse_layers_in_use as sparse_layers_in_use
from hf_sparse.patches.attach import unpatch as unpatch
from hf_sparse.patches.base import Family as Family
from hf_sparse.patches.base import register_family as register_family
from hf_sparse.patches.base import supported_model_types as supported_model_types
from hf_sparse.patches.cache import SparseCache as SparseCache
from hf_sparse.patches.cache import SparseKCache as SparseKCache
from hf_sparse.patches.captured import CapturedDecoding as CapturedDecoding
from hf_sparse.patches.interface import NAME as NAME
