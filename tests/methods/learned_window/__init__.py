"""Attend within a sliding window whose width each query head learns: the method that CONTRIBUTING.md explains."""
