"""Load adapters and full models from the Hub and push them there.

Published cards and notebooks know this module by its name.
"""

from hf_sparse.adapters.folder import write_repo as write_repo
from hf_sparse.adapters.hub import plan_push as plan_push
from hf_sparse.adapters.hub import push_to_hub as push_to_hub
from hf_sparse.adapters.hub import save_full_model as save_full_model
from hf_sparse.adapters.load import from_pretrained as from_pretrained
from hf_sparse.base_model import resolve_base as resolve_base
