"""Triton kernels of SparseK attention. Import a module of this package only where `available` says that it can run."""
