"""Predict in Triton kernels; import its modules only where `hf_sparse.ops.triton.available` says that they run."""
