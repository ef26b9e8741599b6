"""Attend by entmax with a few queries per head, as a decoding step does: no gradient, and nothing waits for the device.

On a GPU two kernels read every key once, and the values of the keys with weight. Elsewhere plain PyTorch does it. A
text may grow in tensors of fixed size: with `first_query` all keys behind the last query are the future, so the length
may be a number on the device alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.ops.entmax.inputs import without_padding
from hf_sparse.ops.entmax.threshold import powers, relative_threshold
from hf_sparse.ops.entmax.triton import takes_kernels

MOST_QUERIES = 16  # per head
MOST_ROWS = 64  # queries of all heads that share a KV head


@dataclass(frozen=True)
class Scales:
    """Hold alpha and the scale of every query head as a step takes them.

    Attributes:
        scale: `[Hq]`, contiguous; z is `factor * scale * <query, key>`.
        exponent: `[Hq]`, contiguous, 1 / (alpha - 1); `None` where `kind` says it.
        kind: 2 or 1 where the exponent of all heads is that number, and 0 otherwise.
        factor: see `scale`.
        is_log: whether `scale` holds logarithms.
    """

    scale: Tensor
    exponent: Tensor | None
    kind: int
    factor: float = 1.0
    is_log: bool = False

    @classmethod
    def of(cls, alpha: float | Tensor, scaling: float | Tensor, query: Tensor) -> "Scales":
        """Make them from what `entmax_attention` gets, without a check, for queries `[B, Hq, Tq, D]`."""
        heads, dtype, device = query.shape[1], torch.promote_types(query.dtype, torch.float32), query.device

        def per_head(number: float | Tensor) -> Tensor:
            if isinstance(number, Tensor):
                return number.to(device, dtype).contiguous()
            return torch.full((heads,), number, dtype=dtype, device=device)

        alpha = alpha.to(dtype) if isinstance(alpha, Tensor) else float(alpha)
        kind = _kind(alpha)
        return cls(per_head(scaling * (alpha - 1)), None if kind else per_head(1 / (alpha - 1)), kind)

    @classmethod
    def of_logarithm(cls, alpha: float, scaling: float, log_scale: Tensor) -> "Scales":
        """Make them from a number alpha and logarithms of scales, `[Hq]`, which a step reads as they are then."""
        kind = _kind(alpha)
        exponent = None if kind else torch.full_like(log_scale, 1 / (alpha - 1), dtype=torch.float32)
        return cls(log_scale.detach(), exponent, kind, scaling * (alpha - 1), True)


def _kind(alpha: float | Tensor) -> int:
    """Return the exponent 1 / (alpha - 1) where it is 1 or 2 for all heads, and 0 otherwise."""
    exponent = 1 / (alpha - 1) if isinstance(alpha, float) else 0.0
    return int(exponent) if exponent in (1.0, 2.0) else 0


def is_step(query: Tensor, key: Tensor) -> bool:
    """Tell whether so few queries `[B, Hq, Tq, D]` come that `attend_few` is for them."""
    queries = query.shape[2]
    return 0 < queries <= MOST_QUERIES and query.shape[1] // key.shape[1] * queries <= MOST_ROWS


def attend_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scales: Scales,
    *,
    causal: bool,
    valid: Tensor | None = None,
    first_query: Tensor | None = None,
    index: Tensor | None = None,
    size: int = 1,
) -> Tensor:
    """Attend with a few queries to all allowed keys, or to those in listed tiles; nothing is checked.

    Args:
        query, key, value, causal: as in `hf_sparse.ops.entmax.entmax_attention`, of equal dtype.
        scales: of these queries.
        valid: `[B, Tk]` bool, False for padding, whatever it holds, also where a query stands.
        first_query: `[B]` integers, position of the first query of each text; the queries are the last positions by
            default. Keys behind the queries are the future if causal. May come together with `valid`.
        index: `[B, H, 1, m]` int64, tiles of keys for a single query, each at most once; -1, anywhere, is none. `H` is
            `Hq`, `Hkv` or 1, and `B` may be 1.
        size: keys per tile.

    Returns:
        `[B, Hq, Tq, D]` in the dtype of `query`, contiguous; zeros for a query without a key, or at padding.
    """
    tensors = (query, key, value, scales.scale, scales.exponent, scales.kind, scales.factor, scales.is_log)
    if torch.compiler.is_compiling():
        return torch.ops.hf_sparse.entmax_few(*tensors, causal, valid, first_query, index, size)
    return _attend(*tensors, causal, valid, first_query, index, size)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    exponent: Tensor | None,
    kind: int,
    factor: float,
    is_log: bool,
    causal: bool,
    valid: Tensor | None,
    first_query: Tensor | None,
    index: Tensor | None,
    size: int,
) -> Tensor:
    """Attend as `attend_few`, with the fields of `Scales` one by one, as operators and the kernels take them."""
    arguments = (query, key, value, scale, exponent, kind, factor, is_log, causal, valid, first_query, index, size)
    if not takes_kernels(query, key, value):
        return _plain(*arguments)
    from hf_sparse.ops.entmax.triton.step import step  # Triton is there only beside a CUDA device

    if query.device.index == torch.cuda.current_device():
        return step(*arguments)
    with torch.cuda.device_of(query):  # where Triton launches
        return step(*arguments)


# A compiled model holds it as one operator: it decides by itself what to launch.
_operator = torch.library.custom_op("hf_sparse::entmax_few", mutates_args=())(_attend)


@_operator.register_fake
def _shape(query: Tensor, *_: object) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    exponent: Tensor | None,
    kind: int,
    factor: float,
    is_log: bool,
    causal: bool,
    valid: Tensor | None,
    first_query: Tensor | None,
    index: Tensor | None,
    size: int,
) -> Tensor:
    """Attend as `_attend`, in plain PyTorch and at least in float32: the reference of the kernels."""
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    device, dtype = query.device, torch.promote_types(query.dtype, torch.float32)
    scale = factor * (scale.to(dtype).exp() if is_log else scale.to(dtype))
    if valid is not None:
        query_position = _positions(queries, keys, first_query, device).expand(batch, -1)
        exists = valid.gather(1, query_position.clamp(0, keys - 1))
        query = query.masked_fill(~exists[:, None, :, None], 0)
        key, value = without_padding(key, valid), without_padding(value, valid)
    lists = kv_heads
    column, there = torch.arange(keys, device=device)[None, None], None  # positions of keys, [B, H, S]
    if index is not None:
        lists = max(kv_heads, index.shape[1])
        index = index.expand(batch, lists, -1, -1)[:, :, 0]
        column = (index[..., None] * size + torch.arange(size, device=device)).flatten(2)
        there = (index >= 0).repeat_interleave(size, -1) & (column < keys)
        column = column.clamp(0, keys - 1)
        row, head = torch.arange(batch, device=device), torch.arange(lists, device=device) * kv_heads // lists
        key, value = (part[row[:, None, None], head[:, None], column] for part in (key, value))
    with torch.autocast(device.type, enabled=False):
        of_lists = (query.to(dtype) * scale[:, None, None]).reshape(batch, lists, heads * queries // lists, dim)
        z = (of_lists @ key.to(dtype).transpose(-1, -2)).unflatten(2, (-1, queries))  # [B, lists, share, Tq, S]
        seen = _seen(queries, keys, causal, valid, first_query, column, there)
        if seen is not None:
            z = z.masked_fill_(~seen[:, :, None], -torch.inf)
        z -= z.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        power: float | Tensor = float(kind) if exponent is None else exponent.to(dtype).view(1, lists, -1, 1, 1)
        weight, _ = powers(z.sub_(relative_threshold(z, power)).clamp_(min=0), power)
        mass = weight.sum(-1, keepdim=True)
        weight /= mass.masked_fill_(mass == 0, 1.0)
        output = weight.flatten(2, 3) @ value.to(dtype)
    return output.view(batch, heads, queries, dim).to(query.dtype)


def _positions(queries: int, keys: int, first_query: Tensor | None, device: torch.device) -> Tensor:
    """Return the positions of the queries, `[B, Tq]`; `B` is 1 where they are the last ones."""
    number = torch.arange(queries, device=device)
    return (keys - queries + number)[None] if first_query is None else first_query[:, None] + number


def _seen(
    queries: int,
    keys: int,
    causal: bool,
    valid: Tensor | None,
    first_query: Tensor | None,
    column: Tensor,
    there: Tensor | None,
) -> Tensor | None:
    """Tell which keys each query sees, `[B, H, Tq, S]`, where `B`, `H` and `Tq` may be 1; `None` for all."""
    seen = None if there is None else there[:, :, None]
    if first_query is not None or valid is not None or (causal and queries > 1) or there is not None:
        position = _positions(queries, keys, first_query, column.device)[:, None, :, None]
        exists = (position >= 0) & (position < keys)
        if causal:
            exists = exists & (column[:, :, None] <= position)
        if valid is not None:
            batch = torch.arange(len(valid), device=column.device)[:, None, None]
            of_query = position.expand(len(valid), -1, -1, -1)[:, 0, :, 0].clamp(0, keys - 1)
            exists = exists & valid[batch, column][:, :, None] & valid.gather(1, of_query)[:, None, :, None]
        seen = exists if seen is None else seen & exists
    return seen
