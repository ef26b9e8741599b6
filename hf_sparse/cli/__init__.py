"""Define the command line. Nothing here imports torch before a verb begins its work."""

from hf_sparse.cli.program import app as app
from hf_sparse.cli.program import main as main
