"""Define what these kernels share: powers of an excess, a step of Newton's method, rows and keys of a program.

With z = scale * <query, key> and e = 1 / (alpha - 1), the threshold tau of a row solves || [z - tau]_+ ||_e = 1. Steps
of Newton's method from the left never pass it, see `hf_sparse.ops.entmax.threshold`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse.ops.triton.sizes import padded

STEPS = tl.constexpr(60)  # a guard: far more steps than the digits of float32 take
CLOSE = tl.constexpr(1e-6)  # a step below it ends the search; the probabilities are normalised afterwards


@dataclass(frozen=True)
class Lists:
    """Hold tiles of keys for every tile of queries.

    index: `[B, H, nq, m]` int64, ascending, -1 behind the last.
    counts: `[B, H, nq]` int32, how many are listed, contiguous.
    size, rows: keys and queries of a tile.
    lead: rows of the first tile of queries that lie before the first query.
    """

    index: Tensor
    counts: Tensor
    size: int
    rows: int
    lead: int


class Numbers(NamedTuple):
    """Hold what makes z and weights of a product: z is `factor * scale * <query, key>`, e is `exponent`.

    scale: `[Hq]` float32, contiguous; None for ones.
    factor: of all heads.
    exponent: `[Hq]` float32, contiguous; None where `kind` says it.
    kind: see `kind_of`.
    """

    scale: Tensor | None
    factor: float
    exponent: Tensor | None
    kind: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of a kernel from `Scale` to `Exponent`."""
        return self.scale, self.factor, self.exponent


def kind_of(exponent: float | Tensor) -> int:
    """Return 2 or 1 where e is that number, for which powers are products, and 0 otherwise."""
    return int(exponent) if isinstance(exponent, float) and exponent in (1.0, 2.0) else 0


def is_slim(query: Tensor) -> bool:
    """Tell whether heads have at most 64 dimensions in half precision, for which sizes of their own were measured."""
    return query.shape[3] <= 64 and query.dtype != torch.float32


def precision_of(dtype: torch.dtype) -> str:
    """Return how matrix products treat float32: as three products of TF32. In half precision there is no choice."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def per_head(number: float | Tensor, heads: int, device: torch.device) -> Tensor:
    """Return `[Hq]` float32, contiguous."""
    if isinstance(number, Tensor):
        return number.float().contiguous()
    return torch.full((heads,), number, dtype=torch.float32, device=device)


def scale_and_factor(scaling: float | Tensor, alpha: float | Tensor) -> tuple[Tensor | None, float]:
    """Return scales of the heads, `[Hq]` float32, and a factor, whose product is `scaling * (alpha - 1)`."""
    if isinstance(alpha, Tensor):
        scaling, alpha = scaling * (alpha - 1), 2.0
    if isinstance(scaling, Tensor):
        return scaling.float().contiguous(), alpha - 1
    return None, scaling * (alpha - 1)


def constants(query: Tensor, key: Tensor, kind: int, causal: bool) -> dict[str, Any]:
    """Return what every kernel is compiled for."""
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "D": query.shape[3],
        "PADDED": padded(query.shape[3]),
        "KIND": kind,
        "CAUSAL": causal,
        "PRECISION": precision_of(query.dtype),
    }


@triton.jit
def powers(excess, exponent, KIND: tl.constexpr):
    """Return `excess ** e` and `excess ** (e - 1)`, both 0 where the excess is 0."""
    if KIND == 2:
        weight, slope = excess * excess, excess
    elif KIND == 1:
        weight, slope = excess, tl.where(excess > 0, 1.0, 0.0)
    else:
        logarithm = tl.log2(tl.maximum(excess, 1e-37))
        slope = tl.where(excess > 0, tl.exp2(logarithm * (exponent - 1)), 0.0)
        weight = slope * excess
    return weight, slope


@triton.jit
def scale_of(Scale, factor, head):
    """Return the scale of the products of a head, or of the heads of some rows; without `Scale` all have the factor."""
    scale = (head * 0).to(tl.float32) + factor if Scale is None else tl.load(Scale + head) * factor
    return scale


@triton.jit
def exponent_of(Exponent, head, KIND: tl.constexpr):
    """Return e of a head, or of the heads of some rows."""
    exponent = tl.load(Exponent + head) if KIND == 0 else (head * 0 + KIND).to(tl.float32)
    return exponent


@triton.jit
def origin_of(First, batch, queries, keys):
    """Return the position of the first query of a text: the queries are the last ones unless it is given."""
    origin = keys - queries if First is None else tl.load(First + batch)
    return origin


@triton.jit
def newton_step(mass, slope, exponent, KIND: tl.constexpr):
    """Return by how much tau rises, from the sums of the powers over a row; 0 for a row without any."""
    some = mass > 0
    mass, slope = tl.where(some, mass, 1.0), tl.where(some, slope, 1.0)
    if KIND == 2:
        norm = tl.sqrt(mass)
        rise = (norm - 1) * norm / slope
    elif KIND == 1:
        rise = (mass - 1) / slope
    else:
        norm = tl.exp2(tl.log2(mass) / exponent)
        rise = (norm - 1) * mass / (norm * slope)
    return tl.where(some, tl.maximum(rise, 0.0), 0.0)


@triton.jit
def gathered_logits(q, k, key, there, exists, position, scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """Return z `[M, C]` of gathered keys, `-inf` where a row does not see a key."""
    if CAUSAL:  # one comparison for all three
        sees = tl.where(there, key, 2147483647)[None, :] <= tl.where(exists, position, -1)[:, None]
    else:
        sees = there[None, :] & exists[:, None]
    return tl.where(sees, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[:, None], float("-inf"))


@triton.jit
def summed(rows):
    """Add up every 32nd column of `[M, C]`, which a thread holds: `[M, 32]`, or as it is where C is at most 32."""
    C: tl.constexpr = rows.shape[1]
    return tl.sum(tl.reshape(rows, [rows.shape[0], C // 32, 32]), 1) if C > 32 else rows


@triton.jit
def largest(rows):
    """Return the largest number of every 32nd column, as `summed`."""
    C: tl.constexpr = rows.shape[1]
    return tl.max(tl.reshape(rows, [rows.shape[0], C // 32, 32]), 1) if C > 32 else rows


@triton.jit
def goes_on(rise, tau, slope, total, KIND: tl.constexpr):
    """Tell whether tau may still be too low after a step of Newton's method over so many keys, with that sum of slopes.

    Where e is 2, the norm f of the excesses has at most `total` for a second derivative, where f is at least 1. Its
    first derivative at the threshold t is -s, the sum of excesses there: at least 1, and at least
    `slope - total * (t - tau)`, with tau before the step. So the step ends at most `total * rise ** 2 / (2 * s)` below
    t, and t at most `2 * rise` above tau where `total * rise` is at most 2."""
    close = CLOSE * (1 + tl.abs(tau))
    goes = rise > close
    if KIND == 2:
        excess = total * rise
        least = tl.maximum(slope - 2 * excess, 1.0)
        goes &= (excess > 1) | (2 * excess * rise > close * least)
    return goes


@triton.jit
def load_rows(Base, offset, exists, dim, D: tl.constexpr):
    """Load rows `[M, PADDED]`, zeros for those that do not exist and behind the head size."""
    return tl.load(Base + offset[:, None] + dim[None, :], mask=exists[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def ones_of(word):
    """Return how many bits of a uint32 are 1."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)
