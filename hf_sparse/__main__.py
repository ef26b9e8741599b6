"""`python -m hf_sparse`: the command line, for launchers of several processes too."""

from hf_sparse.cli import main

main()
