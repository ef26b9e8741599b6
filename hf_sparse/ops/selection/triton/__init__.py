"""Run SparseK attention in Triton kernels. Import a module of this package only where `available` is true."""
