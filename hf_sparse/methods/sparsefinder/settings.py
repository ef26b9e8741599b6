"""Describe Sparsefinder and define the settings of its adapters. Nothing here imports torch."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

from hf_sparse.core.adapter_settings import BASE_SHAPE, LAYERS, TARGET_MODULES, AdapterSettings
from hf_sparse.core.checks import MOST_TOKENS, MOST_WIDTH, expected_integer, expected_number, is_finite, is_integer
from hf_sparse.core.method_settings import MethodSettings
from hf_sparse.methods.sparsefinder.evaluation_settings import SparsefinderEvaluationSettings
from hf_sparse.methods.sparsefinder.training_settings import SparsefinderTrainingSettings

# PEFT's error for a type it does not know is nothing but this name, so the name says what to import.
PEFT_TYPE = "HF_SPARSE_SPARSEFINDER"

Predictor = Literal["clustering", "quantization", "distance", "bound", "full", "pooled"]
Bins = Literal["shared", "fixed"]

#: Positions per tile that there are.
TILES = (1, 2, 4, 8, 16, 32, 64, 128)

#: The least alpha that is learned, as where the annealing of AdaSplash begins (arXiv 2502.12082).
LEAST_ALPHA = 1.01


def _is_tile(value: Any) -> bool:
    """Tell whether a value is a size of tiles that there is."""
    return is_integer(value, 1) and value in TILES


@dataclass
class SparsefinderSettings(AdapterSettings):
    """Hold the settings of a Sparsefinder adapter; `SparsefinderConfig` is the configuration that has them."""

    config_name: ClassVar[str] = "SparsefinderConfig"

    alpha: float = field(
        default=1.5,
        metadata={"help": "Alpha of entmax, above 1 (softmax, which has no zeros) and at most 2 (sparsemax)."},
    )
    learn_alpha: bool = field(
        default=False, metadata={"help": f"Learn alpha per query head, from {LEAST_ALPHA} to 2, starting at `alpha`."}
    )
    initial_scale: float = field(
        default=0.3,
        metadata={
            "help": "Where the learned logit scale of every query head starts, above 0. Entmax of the logits of a "
            "softmax model is far too sharp at 1."
        },
    )
    rank: int = field(
        default=4, metadata={"help": "Dimensions to which queries and keys are projected, 1 to the size of a head."}
    )
    shared_projection: bool = field(
        default=False, metadata={"help": "One projection per KV head, for its queries and keys alike."}
    )
    predictor: Predictor = field(
        default="clustering",
        metadata={
            "help": "What joins a query and a key: a common cluster ('clustering'), a common bin in some dimension "
            "('quantization'), or a small distance ('distance', whose cost is quadratic). Nothing is learned for "
            "'bound', every tile that the extremes of its keys do not exclude, which is exact, for 'full', all "
            "keys, nor for 'pooled', tiles by means of `pool` keys, which saves time in long texts."
        },
    )
    clusters: int = field(default=16, metadata={"help": "Clusters per KV head, at least 2."})
    top_clusters: int = field(
        default=2,
        metadata={
            "help": "Clusters that a token is in, 1 to `clusters`, if they are balanced or `tile=None`; otherwise a "
            "key is in its nearest."
        },
    )
    cluster_parts: int = field(
        default=1,
        metadata={
            "help": "Parts of equal rank into which points are cut, each with `clusters` of its own; a key is then the "
            "centroids that are nearest in each part. Far finer than 1, but prediction takes the square of the length. "
            "A divisor of `rank`; for tiles of unbalanced clusters."
        },
    )
    balanced: bool = field(
        default=False, metadata={"help": "Clusters of equal size, for encoders: they depend on the whole text."}
    )
    bin_kind: Bins = field(
        default="shared",
        metadata={
            "help": "'shared': fitted boundaries, the same for queries and keys. 'fixed': `bin_width` tokens by rank, "
            "for encoders, since ranks depend on the whole text."
        },
    )
    bins: int = field(default=16, metadata={"help": "Shared bins per dimension, at least 2."})
    bin_width: int = field(default=16, metadata={"help": "Tokens per fixed bin, at least 1."})
    threshold: float = field(
        default=1.0, metadata={"help": "Squared distance below which tokens are joined, above 0; for `tile=None`."}
    )
    tile: int | None = field(
        default=64,
        metadata={
            "help": "Keys per tile of the graph: a power of 2 up to 128. Smaller ones fit better and take longer to "
            "predict. None joins all single tokens that match: for analysis.",
            "none_as": 0,
        },
    )
    query_tile: int | None = field(
        default=None,
        metadata={
            "help": "Queries per tile of the graph, which have their list of key tiles in common: a power of 2 up to "
            "`tile`; None is `tile`. A causal tile is decided on when its first query comes, so in a causal model 1, a "
            "list for each query, fits far better (docs/experiments.md) and takes longer."
        },
    )
    sparsity: float = field(
        default=0.8,
        metadata={
            "help": "Share of the allowed pairs of tiles that is left out, at least 0 and below 1; in a causal model, "
            "of a text of `length` tokens."
        },
    )
    length: int = field(
        default=1024,
        metadata={
            "help": "Tokens of the text that `sparsity` is meant for in a causal model. The number of key tiles per "
            "query tile that follows holds for texts of any length: a text that grows keeps its graph. At least 1."
        },
    )
    tiles_per_query: int | None = field(
        default=None,
        metadata={
            "help": "Key tiles per query tile, at least 1, in place of `sparsity`. Early causal tiles have fewer."
        },
    )
    window: int = field(
        default=64,
        metadata={
            "help": "Most recent keys, joined whatever is predicted; in an encoder, the nearest on both sides. At "
            "least 0; the query's own position, or tile, is always joined."
        },
    )
    global_tokens: int = field(default=1, metadata={"help": "First keys of a text, joined as well. At least 0."})
    profile: bool = field(
        default=True,
        metadata={
            "help": "Weigh tiles by how the attention of a head falls off with distance, as fitted to text. For graphs "
            "of tiles."
        },
    )
    head_budgets: bool = field(
        default=False,
        metadata={
            "help": "Divide the tiles among heads and layers by what they miss on the text that predictors are fitted "
            "to; `sparsity` or `tiles_per_query` is then the mean. It helped where most attention is covered anyway, "
            "and hurt elsewhere (docs/experiments.md). For graphs of tiles."
        },
    )
    complete: bool = field(
        default=False,
        metadata={
            "help": "Attend by entmax over all keys, which is exact. The graph is predicted for reports alone, where "
            "the extremes of the keys tell the tiles that it lacks."
        },
    )
    per_group: bool = field(
        default=False, metadata={"help": "One graph of tiles for the query heads that share a KV head."}
    )
    entmax_native: float | None = field(
        default=None,
        metadata={
            "help": "Alpha of the entmax that the checkpoint was trained with; transformers loads it as a softmax "
            "model. Logits keep their scale, nothing but the predictor (and LoRA) is learned, and until the predictor "
            "is fitted all keys are attended to: the model as it was trained.",
            "metavar": "ALPHA",
        },
    )
    pool: int = field(
        default=16,
        metadata={
            "help": "Keys whose mean stands for them, for the predictor 'pooled'. At least 1; prediction takes "
            "`1 / pool` of the products of all queries and keys."
        },
    )
    exact_up_to: int = field(
        default=8192,
        metadata={
            "help": "Keys up to which the predictor 'pooled' predicts nothing, and all are attended: lists save no "
            "time there (docs/speed.md). At least 0."
        },
    )
    choices: int = field(
        default=4,
        metadata={
            "help": "Key tiles that each query chooses for its tile of queries, for the predictor 'pooled', in place "
            "of `sparsity` and `tiles_per_query`. At least 1; those of `window` and `global_tokens` come in addition."
        },
    )
    layers: list[int] | None = field(default=None, metadata=LAYERS)
    target_modules: list[str] | str | None = field(default=None, metadata=TARGET_MODULES)
    base_shape: dict[str, Any] | None = field(default=None, metadata=BASE_SHAPE)

    def check_settings(self) -> None:
        super().check_settings()
        for name, options in (("predictor", get_args(Predictor)), ("bin_kind", get_args(Bins))):
            if getattr(self, name) not in options:
                raise ValueError(self._expected(name, f"one of {', '.join(map(repr, options))}"))
        self._check_integers(
            rank=(1, MOST_WIDTH),
            clusters=(2, MOST_WIDTH),
            top_clusters=(1, MOST_WIDTH),
            cluster_parts=(1, MOST_WIDTH),
            bins=(2, MOST_WIDTH),
            bin_width=(1, MOST_TOKENS),
            length=(1, MOST_TOKENS),
            window=(0, MOST_TOKENS),
            global_tokens=(0, MOST_TOKENS),
            pool=(1, MOST_TOKENS),
            exact_up_to=(0, MOST_TOKENS),
            choices=(1, MOST_TOKENS),
        )
        self._check_switches(*(f.name for f in fields(self) if f.type in (bool, "bool")))
        if self.top_clusters > self.clusters:
            raise ValueError(self._expected("top_clusters", f"at most the number of clusters, {self.clusters}"))
        if self.rank % self.cluster_parts:
            raise ValueError(self._expected("cluster_parts", f"a divisor of the rank, {self.rank}"))
        if self.cluster_parts > 1 and (self.predictor != "clustering" or self.tile is None or self.balanced):
            raise ValueError(
                self._expected("cluster_parts", "1 but for the predictor 'clustering' of tiles that is not balanced")
            )
        if self.entmax_native is not None:
            self._check_native(self.entmax_native)
        low, high = (LEAST_ALPHA, 2) if self.learn_alpha else (1, 2)
        if not is_finite(self.alpha) or not low < self.alpha <= high or (self.learn_alpha and self.alpha == high):
            range_of = f"above {low} and {'below' if self.learn_alpha else 'at most'} {high}"
            raise ValueError(self._expected("alpha", f"{range_of}{' to be learned' if self.learn_alpha else ''}"))
        for name in ("initial_scale", "threshold"):
            if not is_finite(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(self._expected(name, expected_number(getattr(self, name), "a number above 0")))
        if self.tile is not None and not _is_tile(self.tile):
            raise ValueError(self._expected("tile", f"None or one of {', '.join(map(str, TILES))}"))
        if self.tile is None and (self.complete or self.predictor in ("bound", "pooled")):
            raise ValueError(
                "SparsefinderConfig.tile must be a number for complete=True and for 'pooled' and 'bound', "
                "which are about tiles, got None"
            )
        if self.query_tile is not None and (
            self.tile is None or not _is_tile(self.query_tile) or self.query_tile > self.tile
        ):
            raise ValueError(self._expected("query_tile", f"None or a power of 2 up to tile, which is {self.tile}"))
        if not is_finite(self.sparsity) or not 0 <= self.sparsity < 1:
            raise ValueError(self._expected("sparsity", "at least 0 and below 1"))
        if self.tiles_per_query is not None and not is_integer(self.tiles_per_query, 1):
            raise ValueError(self._expected("tiles_per_query", f"None or {expected_integer(self.tiles_per_query, 1)}"))

    def _check_native(self, native: float) -> None:
        """Raise `ValueError` for what contradicts `entmax_native`, and fill in the alpha and scale that follow."""
        if not is_finite(native) or not 1 < native <= 2:
            raise ValueError(self._expected("entmax_native", "None or a number above 1 and at most 2"))
        if self.learn_alpha:
            raise ValueError(
                f"SparsefinderConfig.learn_alpha must be False for a checkpoint that was trained with entmax of alpha "
                f"{native:g} (entmax_native)"
            )
        for name, value in (("alpha", float(native)), ("initial_scale", 1.0)):
            if getattr(self, name) not in (value, getattr(SparsefinderSettings, name)):
                raise ValueError(self._expected(name, f"{value:g}, or left out, where entmax_native is {native:g}"))
            setattr(self, name, value)
        without_buckets = self.predictor == "distance" or (
            self.predictor == "quantization" and self.bin_kind == "fixed"
        )
        if without_buckets and (self.tile is None or not (self.profile or self.head_budgets)):
            raise ValueError(
                f"entmax_native attends to all keys until a predictor is fitted, and nothing is fitted for "
                f"{self.predictor!r} without a tile and profile=True: expected these, got tile={self.tile} and "
                f"profile={self.profile}"
            )

    def attended(self) -> str:
        graph = f"tiles of {self.tile}" if self.tile else "single tokens"
        graph = f"{self.predictor}, {graph}, window {self.window}"
        if self.entmax_native is None:
            return graph
        return f"entmax as the checkpoint was trained with, over all keys until a graph is fitted: {graph}"


SETTINGS = MethodSettings(
    name="sparsefinder",
    label="Sparsefinder",
    summary="entmax over a predicted graph",
    peft_type=PEFT_TYPE,
    adapter=SparsefinderSettings,
    training=SparsefinderTrainingSettings,
    evaluation=SparsefinderEvaluationSettings,
)
