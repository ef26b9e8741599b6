"""Hold what Sparsefinder learns for one attention module.

Parameters and buffers lie directly on the module, not on submodules: PEFT strips the adapter's name from the
next-to-last part of a key only. Buffers are NaN until they are fitted, and travel in the safetensors.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hf_sparse.core.layer import AttentionShape
from hf_sparse.methods.sparsefinder.config import SparsefinderConfig
from hf_sparse.methods.sparsefinder.predictors import predictor_of
from hf_sparse.methods.sparsefinder.predictors.budgets import MEANS
from hf_sparse.methods.sparsefinder.settings import LEAST_ALPHA
from hf_sparse.ops.entmax.step import Scales
from hf_sparse.ops.predictors.profile import BINS


class SparsefinderParameters(nn.Module):
    """Hold logit scales, projections, and what a predictor was fitted to.

    Attributes:
        predictor: what the configuration asks for.
        log_scale: `[Hq]`, logarithm of the logit scale; with `entmax_native` a buffer of zeros, which nothing trains.
        alpha_logit: `[Hq]`, with `learn_alpha`.
        projection: `[Hkv, D, r]`, with `shared_projection`.
        query_projection, query_bias, key_projection: `[Hq, D, r]`, `[Hq, r]` and `[Hkv, D, r]`, otherwise. Only the
            difference of a query's bias and a key's would matter, so there is one.
        centroids: `[Hkv, C, r]`, for clustering; with `cluster_parts` the columns of each part belong together.
        boundaries: `[Hkv, r, bins - 1]`, for quantization with shared bins.
        profile: `[Hq, BINS]`, attention by the distance of tiles, see `hf_sparse.ops.predictors.profile`.
        budgets: `[lists, MEANS]`, column `m - 1` has the tiles per query tile of each list where the mean over all
            heads and layers is `m`. There is a list per query head, or per KV head with `per_group`.
    """

    log_scale: Tensor
    centroids: Tensor
    boundaries: Tensor
    profile: Tensor
    budgets: Tensor

    def __init__(self, config: SparsefinderConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config = config
        # Empty, not `None`, before the first step: `model_state` looks at plain values, and nothing changes with it.
        self._step_scales: tuple[()] | tuple[tuple[float, float, int], Scales] = ()
        heads, kv_heads, rank = shape.num_attention_heads, shape.num_key_value_heads, config.rank
        log_scale = torch.full((heads,), math.log(config.initial_scale))
        if config.entmax_native is None:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        if config.learn_alpha:
            share = (config.alpha - LEAST_ALPHA) / (2 - LEAST_ALPHA)
            self.alpha_logit = nn.Parameter(torch.full((heads,), math.log(share / (1 - share))))
        self.predictor = predictor_of(config)
        self._fitted: dict[str, tuple[Tensor, int]] = {}  # buffers that were not NaN, with their versions
        if not self.predictor.learns_graph:
            return
        common = torch.randn(kv_heads, shape.head_dim, rank) * shape.head_dim**-0.5
        if config.shared_projection:
            self.projection = nn.Parameter(common)
        else:  # a query and a key that are alike start near each other
            self.query_projection = nn.Parameter(common.repeat_interleave(heads // kv_heads, dim=0))
            self.query_bias = nn.Parameter(torch.zeros(heads, rank))
            self.key_projection = nn.Parameter(common.clone())
        for name, size in self.predictor.buffers(kv_heads).items():
            self.register_buffer(name, torch.full(size, torch.nan))
        if config.tile is not None and config.profile:
            self.register_buffer("profile", torch.full((heads, BINS), torch.nan))
        if config.tile is not None and config.head_budgets:
            lists = kv_heads if config.per_group else heads
            self.register_buffer("budgets", torch.full((lists, MEANS), torch.nan))

    @property
    def scale(self) -> Tensor:
        """Return what multiplies the logits of each query head, `[Hq]` float32."""
        return self.log_scale.float().exp()

    @property
    def alpha(self) -> float | Tensor:
        """Return the alpha of entmax: a number, or `[Hq]` float32 where it is learned."""
        if not self.config.learn_alpha:
            return float(self.config.alpha)
        return LEAST_ALPHA + (2 - LEAST_ALPHA) * self.alpha_logit.float().sigmoid()

    @property
    def log_profile(self) -> Tensor:
        """Return the logarithm of the profile, nowhere below that of 1e-4, `[Hq, BINS]` float32."""
        return self.profile.float().clamp(min=1e-4).log()

    def step_scales(self, query: Tensor, scaling: float) -> Scales:
        """Return alpha and the scales for a decoding step with queries `[B, Hq, Tq, D]`.

        Args:
            query: whose dtype and device are theirs.
            scaling: multiplies the logits, beside the learned scale.
        """
        if self.config.learn_alpha or query.dtype == torch.float64:
            return Scales.of(self.alpha, scaling * self.scale, query)
        alpha = float(self.config.alpha)
        if torch.compiler.is_compiling():
            return Scales.of_logarithm(alpha, scaling, self.log_scale)
        # A step reads the scales at their address, whatever they are then; alpha can be overridden.
        made_of = (alpha, scaling, self.log_scale.data_ptr())
        if not self._step_scales or self._step_scales[0] != made_of:
            self._step_scales = made_of, Scales.of_logarithm(alpha, scaling, self.log_scale)
        return self._step_scales[1]

    def scales(self) -> Iterator[nn.Parameter]:
        """Yield what is learned of the attention over all keys: logit scales, and alpha where it is learned."""
        return (p for name, p in self.named_parameters() if name in ("log_scale", "alpha_logit"))

    def projections(self) -> Iterator[nn.Parameter]:
        """Yield what decides where a query or key is projected to; none for a predictor without projections."""
        return (p for name, p in self.named_parameters() if "projection" in name or name == "query_bias")

    def project_queries(self, query: Tensor) -> Tensor:
        """Return the points `[B, Hq, T, r]` float32 of queries `[B, Hq, T, D]`."""
        if self.config.shared_projection:
            group = query.shape[1] // self.projection.shape[0]
            return _project(query, self.projection.repeat_interleave(group, dim=0))
        return _project(query, self.query_projection) + self.query_bias.float()[:, None]

    def project_keys(self, key: Tensor) -> Tensor:
        """Return the points `[B, Hkv, T, r]` float32 of keys `[B, Hkv, T, D]`."""
        return _project(key, self.projection if self.config.shared_projection else self.key_projection)

    @property
    def is_fitted(self) -> bool:
        """Tell whether the clusters, bins and profiles of the predictor were fitted, as far as it has any."""
        return self._unfitted() is None

    def _unfitted(self) -> str | None:
        """Return the name of a buffer that was never fitted.

        A buffer that has not changed since is not looked at again, for looking waits for the device.
        """
        for name, buffer in self.named_buffers():
            version = None if buffer.is_inference() else buffer._version
            known, when = self._fitted.get(name, (None, None))
            if known is buffer and version is not None and when == version:
                continue
            if bool(buffer.isnan().any()):
                return name
            if version is not None:
                self._fitted[name] = (buffer, version)
        return None

    def check_fitted(self) -> None:
        """Raise `ValueError` if the predictor has clusters or bins that were never fitted."""
        name = self._unfitted()
        if name is not None:
            raise ValueError(
                f"this {self.config.predictor} predictor was never fitted, it has no {name}: train the adapter "
                "(`hf-sparse finetune`, hf_sparse.finetune.finetune), load one that was trained, fit it to text with "
                "hf_sparse.methods.sparsefinder.fit_predictors, or choose SparsefinderConfig(predictor='bound'), "
                "'full' or 'pooled', which have nothing to fit"
            )


def _project(tensor: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(tensor.device.type, enabled=False):
        return tensor.float() @ weight.float()
