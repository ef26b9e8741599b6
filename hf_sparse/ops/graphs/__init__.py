"""Predicted attention graphs: who may attend to whom, found without the `Tq x Tk` logits."""

from hf_sparse.ops.graphs.tiles import Tiles as Tiles
from hf_sparse.ops.graphs.tiles import window_and_global as window_and_global
