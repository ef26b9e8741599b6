"""Run the command line as `python -m hf_sparse`, for launchers of several processes too."""

from hf_sparse.cli import main

main()
