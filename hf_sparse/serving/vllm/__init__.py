"""Serve patched models in vLLM."""
