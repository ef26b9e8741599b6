"""Hold how the `CONTENDERS` of `hf_sparse.methods.sparsefinder.evaluation` look in pictures, in the same order."""

from hf_sparse.figures.style import BLUE, GREY, ORANGE, Look, Looks

LOOKS = Looks(
    {
        "predicted": Look("predicted graph", BLUE, "o"),
        "longformer": Look("window and global (Longformer)", ORANGE, "s"),
        "windows": Look("windows of fitted widths", "#8c564b", "<"),
        "bigbird": Look("window, global, random (BigBird)", GREY, "d"),
        "strided": Look("strided (Sparse Transformer)", "#009e73", "^"),
        "fixed": Look("fixed (Sparse Transformer)", "#56b4e9", "v"),
        "lsh": Look("hashes (Reformer)", "#d55e00", "D"),
        "routing": Look("k-means (Routing Transformer)", "#cc79a7", "P"),
        "bound": Look("page bound", "#a68a00", "X"),
        "oracle": Look("most mass (oracle)", "#000000", "*"),
    },
    learned="predicted",
    dense="dense softmax (base model)",
)

#: Title and unit of the loss of the training stage that only Sparsefinder has.
STAGES = {"graph": ("Projections", "loss of the predicted graph")}
