"""Measure SparseK attention: contenders with as many slots, budgets, and shares of the layers."""
