"""Predict which keys a query attends to, without the `Tq x Tk` logits: projections, clusters, bins, distances."""
