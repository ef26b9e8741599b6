"""Compute the gradients of SparseK attention. Both kernels recompute the weights from the stored log mass.

`query_gradients` goes over the keys of a block of rows, as the forward does: d query, and the gradients of thresholds
and gates. `key_gradients` goes over the queries of a block of keys: d key, d value and d scores. It runs twice, for the
pairs in the window and for those of the lists, a span of queries at a time, which are added to the first by atomic
additions. Where sums must have a fixed order it runs once: every key is met on one contiguous interval of queries, so
keys of about the same interval are put together and each is written once, at the cost of pairs that do not attend.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hf_sparse.ops.selection.triton.attention_backward_kernels import key_gradients, query_gradients
from hf_sparse.ops.selection.triton.attention_forward import LOG2_E, constants, far, lengths, mixed_stages
from hf_sparse.ops.selection.triton.lists import Tables, by_lifetime, leavers
from hf_sparse.ops.selection.triton.program_sizes import ProgramSizes, by_key_sizes, by_query_sizes
from hf_sparse.ops.triton.launch import launch
from hf_sparse.ops.triton.replay import empty, empty_like, zeros

# Queries whose part of d key and d value is summed before it is added to memory: in tiles of a list, and without.
_TILES_AT_ONCE = 4
_QUERIES_AT_ONCE = 1024


class Gradients(NamedTuple):
    """Hold the gradients of the inputs of `attention.attend_listed`, `None` where not needed.

    Those of key and value are float32 unless sums have a fixed order, and that of tau is `[B, Hkv, Tq, group]`, to be
    summed over the group.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    scores: Tensor | None
    tau: Tensor | None


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor | None,
    tau: Tensor | None,
    output: Tensor,
    lse: Tensor,
    tables: Tables,
    scaling: float,
    *,
    want: tuple[bool, bool, bool, bool, bool],
    deterministic: bool,
    blocks: ProgramSizes | None = None,
) -> Gradients:
    """Compute the gradients of `attention.attend_listed` that are asked for (key and value go together).

    Args:
        grad: `[B, Hq, Tq, D]`, of the output, its last dimension contiguous.
        query, key, value, scores, tau, tables, scaling: the arguments of `attend_listed`; scores and tau contiguous.
        output, lse: the results of `attention_forward.forward`.
        want: whether to compute the gradients of query, key, value, scores and tau.
        deterministic: sum in a fixed order, without atomic additions.
        blocks: sizes of the programs; by default what suits dtype and head size.
    """
    want_query, want_key, want_value, want_scores, want_tau = want
    of_keys = want_key or want_value
    atomic = want_scores and not of_keys and not deterministic
    inputs = (grad, query, key, value, scores, tau, output, lse, tables, scaling)
    d_scores = None
    if scores is not None and want_scores:
        make = zeros if atomic else empty
        d_scores = make(scores.shape, scores.dtype, scores.device)
    delta, d_query, d_rows = by_query(
        *inputs, d_scores=d_scores if atomic else None, want_query=want_query, want_tau=want_tau, blocks=blocks
    )
    d_key = d_value = None
    if of_keys or (want_scores and not atomic):
        d_key, d_value = by_key(
            *inputs, delta=delta, d_scores=d_scores, of_keys=of_keys, deterministic=deterministic, blocks=blocks
        )
    return Gradients(d_query, d_key if want_key else None, d_value if want_value else None, d_scores, d_rows)


def by_query(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor | None,
    tau: Tensor | None,
    output: Tensor,
    lse: Tensor,
    tables: Tables,
    scaling: float,
    *,
    d_scores: Tensor | None,
    want_query: bool,
    want_tau: bool,
    blocks: ProgramSizes | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the kernel that owns rows of queries: `delta`, and the gradients of query and tau if they are wanted.

    Args:
        d_scores: zeros, to which the gradient of the scores is added; `None` if `by_key` computes it, or nobody.
        others: as in `backward`.
    """
    d_query = empty_like(query) if want_query else None
    d_rows = empty_like(lse) if want_tau else None  # of tau, for every row
    delta = empty_like(lse)
    strides = [stride for x in (query, key, value, output, grad) for stride in x.stride()[:3]]
    compiled = constants(query, key, scores, tables)
    rows = blocks or by_query_sizes(query, want_query, scores is not None)
    launch(query_gradients, (triton.cdiv(query.shape[2] * compiled["GROUP"], rows.rows), key.shape[0] * key.shape[1]))(
        query,
        key,
        value,
        scores,
        tau,
        tables.begin,
        tables.until,
        tables.lists,
        tables.leavers,
        tables.bounds,
        tables.scores,
        tables.ends,
        tables.first,
        output,
        grad,
        lse,
        delta,
        d_query,
        d_scores,
        d_rows,
        scaling,
        scaling * LOG2_E,
        *lengths(query, key, tables),
        *strides,
        *(d_query.stride()[:3] if d_query is not None else (0, 0, 0)),
        **compiled,
        M=rows.rows,
        N=rows.keys,
        MIXED_STAGES=mixed_stages(rows, tables),
        WIDE=far(key, value),
        QUERY=want_query,
        ATOMIC=d_scores is not None,
        TAU=want_tau,
        num_warps=rows.warps,
        num_stages=rows.stages,
        maxnreg=rows.registers,
    )
    return delta, d_query, d_rows


def by_key(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor | None,
    tau: Tensor | None,
    output: Tensor,
    lse: Tensor,
    tables: Tables,
    scaling: float,
    *,
    delta: Tensor,
    d_scores: Tensor | None,
    of_keys: bool,
    deterministic: bool,
    blocks: ProgramSizes | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the kernel that owns keys: the gradients of key and value if `of_keys`, and of the scores.

    Args:
        delta: of `by_query`.
        d_scores: is written; `None` if nobody wants it, or `by_query` computed it.
        others: as in `backward`.
    """
    d_key = d_value = None
    if of_keys:
        wide = None if deterministic else torch.float32
        d_key, d_value = empty_like(key, wide), empty_like(value, wide)
    strides = [stride for x in (query, key, value, output, grad) for stride in x.stride()[:3]]
    compiled = constants(query, key, scores, tables)
    columns = blocks or by_key_sizes(query, compiled["GROUP"])
    slots = tables.sinks + tables.lists.shape[-1]
    span, gone = _QUERIES_AT_ONCE, None
    if compiled["CAUSAL"]:
        span = _TILES_AT_ONCE * tables.tile
        slots += span
        gone = None if deterministic else leavers(tables, query.shape[2], span)
    heads = key.shape[0] * key.shape[1]
    passes = {
        "window": (triton.cdiv(key.shape[2], columns.keys), heads, 1),
        "list": (triton.cdiv(slots, columns.keys), heads, triton.cdiv(query.shape[2], span)),
    }
    if deterministic:
        passes = {"all": passes["window"]}
    for source, grid in passes.items():
        launch(key_gradients, grid)(
            query,
            key,
            value,
            scores,
            tau,
            tables.begin,
            tables.until,
            by_lifetime(tables) if deterministic else tables.lists,
            gone,
            tables.first,
            grad,
            lse,
            delta,
            d_key,
            d_value,
            d_scores,
            scaling,
            scaling * LOG2_E,
            span,
            *lengths(query, key, tables),
            *strides,
            *(d_key.stride()[:3] if d_key is not None else (0, 0, 0)),
            *(d_value.stride()[:3] if d_value is not None else (0, 0, 0)),
            **compiled,
            M=columns.rows,
            N=columns.keys,
            KEYS=of_keys,
            SCORES=d_scores is not None,
            SOURCE=source,
            num_warps=columns.warps,
            num_stages=columns.stages,
            maxnreg=columns.registers,
        )
    return d_key, d_value
