"""The command line. Nothing here imports torch before a verb begins its work."""

from hf_sparse.cli.app import app as app
from hf_sparse.cli.app import main as main
