"""Run everything offline: the bundled checkpoint, and text that every Python has."""

from hf_sparse.bundled import BASE_NAME as BASE_NAME
from hf_sparse.bundled import CHECKPOINT as CHECKPOINT

#: Training steps that the demo was tuned for.
STEPS = 70
