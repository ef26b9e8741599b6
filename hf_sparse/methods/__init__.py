"""Sparse attention methods: what a method learns, computes and caches, apart from any model family."""
