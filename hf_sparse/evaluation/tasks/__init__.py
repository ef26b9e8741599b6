"""Ask tasks that are scored by what a model generates: retrieval, tracing, aggregation, questions about documents."""

from hf_sparse.evaluation.tasks.base import Draft as Draft
from hf_sparse.evaluation.tasks.base import Task as Task
from hf_sparse.evaluation.tasks.haystack import Haystack as Haystack
from hf_sparse.evaluation.tasks.longbench import Document as Document
from hf_sparse.evaluation.tasks.longbench import read_longbench as read_longbench
from hf_sparse.evaluation.tasks.run import DEPTHS as DEPTHS
from hf_sparse.evaluation.tasks.run import TASKS as TASKS
from hf_sparse.evaluation.tasks.run import check_tasks as check_tasks
from hf_sparse.evaluation.tasks.run import run_longbench as run_longbench
from hf_sparse.evaluation.tasks.run import run_task as run_task
from hf_sparse.evaluation.tasks.suite import Suite as Suite
from hf_sparse.evaluation.tasks.traces import TRACES as TRACES
