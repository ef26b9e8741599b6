"""Draw pictures of measurements: what the figures of all methods share, and the curve of a training run."""

from hf_sparse.figures.training import training_figure as training_figure
