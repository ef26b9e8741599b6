"""Load adapters from the Hub and push them there; published cards and notebooks know this module by its name."""

from hf_sparse.adapters.hub import from_pretrained as from_pretrained
from hf_sparse.adapters.hub import push_to_hub as push_to_hub
from hf_sparse.adapters.hub import resolve_base as resolve_base
from hf_sparse.adapters.hub import write_repo as write_repo
