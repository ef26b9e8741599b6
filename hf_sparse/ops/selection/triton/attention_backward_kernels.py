"""Compute the gradients of SparseK attention in two kernels; the docstring of `attention_backward` says how they run.

With e = exp(logit) / mass and P = gate * e,

    d gate = e * (<do, v> - delta),   d logit = P * (<do, v> - delta),   delta = <do, o>

which stays finite as a gate goes to 0.
"""

import triton
import triton.language as tl

from hf_sparse.ops.selection.triton.attention_forward import LENGTHS
from hf_sparse.ops.selection.triton.scan_kernels import first_of
from hf_sparse.ops.selection.triton.walk import (
    begins,
    consecutive,
    front_keys,
    gates,
    gather,
    hide_ends,
    listed,
    listed_gates,
    mixed,
    reach,
    rest_and_leavers,
    rows_of,
)


@triton.jit(do_not_specialize=LENGTHS)
def query_gradients(
    Q, K, V, Z, Tau, Begin, Until, Lists, Leavers, Bounds, Scores, Ends, First, Out, Grad, Lse, Delta, DQuery, DScores,
    DTau, scaling, scale, queries, keys, heads, width, tiles, tile, left, right, sinks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row, g_batch, g_head,
    g_row, d_batch, d_head, d_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, SOFT: tl.constexpr, CAUSAL: tl.constexpr,
    ALWAYS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    MIXED_STAGES: tl.constexpr, WIDE: tl.constexpr, QUERY: tl.constexpr, ATOMIC: tl.constexpr, TAU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)  # of [B, Hkv]
    batch, head = row // heads, row % heads
    flat, query, member, exists, t_first, t_last = rows_of(tl.program_id(0), queries, GROUP, M)
    t = query.to(tl.int64)
    dim = tl.arange(0, PADDED)
    inside = exists[:, None] & (dim < D)[None, :]
    o_rows = batch * o_batch + (head * GROUP + member) * o_head + t * o_row
    g_rows = batch * g_batch + (head * GROUP + member) * g_head + t * g_row
    grad = tl.load(Grad + g_rows[:, None] + dim[None, :], mask=inside, other=0.0)
    out = tl.load(Out + o_rows[:, None] + dim[None, :], mask=inside, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    per_row = row * queries * GROUP + flat
    tl.store(Delta + per_row, delta, mask=exists)

    if QUERY or ATOMIC or TAU:
        K += batch * k_batch + head * k_head
        V += batch * v_batch + head * v_head
        q_rows = batch * q_batch + (head * GROUP + member) * q_head + t * q_row
        q = tl.load(Q + q_rows[:, None] + dim[None, :], mask=inside, other=0.0)
        lse = tl.load(Lse + per_row, mask=exists, other=0.0)[:, None]

        tables, position, tau, first, front, live, gone, begin, full_begin, full_end, end = reach(
            row, batch, query, exists, t_first, t_last, Z, Tau, Begin, Until, Lists, Leavers, Bounds, Scores, Ends,
            First, queries, keys, width, tiles, tile, left, right, sinks, SOFT, CAUSAL, TILE,
        )  # fmt: skip
        Z, Begin, Until, Lists, Leavers, Scores, Ends = tables
        step = tl.arange(0, N)
        d_query = tl.zeros([M, PADDED], tl.float32)
        d_tau = tl.zeros([M], tl.float32)

        if QUERY:
            front = front // N * N
            for start in range(0, front, N):
                key = front_keys(start, Lists, first, sinks, N)
                k = gather(K, key, key >= 0, k_row, D, PADDED, False, WIDE)
                share = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse)
                v = gather(V, key, key >= 0, v_row, D, PADDED, False, WIDE)
                credit = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
                d_query = tl.dot((share * credit).to(k.dtype), k, d_query, input_precision=PRECISION)
        if QUERY and CAUSAL and not SOFT and PADDED <= 64:  # with larger heads no registers are left for this
            low = t_first + keys - queries
            for start in range(0, end - begin, N):
                at = begin + start
                k = consecutive(K, at, k_row, end, N, D, PADDED, True)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse
                share = tl.exp2(hide_ends(logits, at, position, full_begin, low, end, Until, N))
                v = consecutive(V, at, v_row, end, N, D, PADDED, True)
                credit = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
                d_query = tl.dot((share * credit).to(k.dtype), k, d_query, input_precision=PRECISION)
            for start in tl.range(0, live - front + gone, N, num_stages=MIXED_STAGES):
                key, sees = rest_and_leavers(
                    start + step, position, front, live, gone, Until, Lists, Leavers, first, sinks, width, keys
                )
                there = key >= 0
                k = gather(K, key, there, k_row, D, PADDED, True, WIDE)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse
                share = tl.exp2(tl.where(sees, logits, float("-inf")))
                v = gather(V, key, there, v_row, D, PADDED, True, WIDE)
                credit = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
                d_query = tl.dot((share * credit).to(k.dtype), k, d_query, input_precision=PRECISION)
        else:
            if QUERY:
                taken = (full_end - full_begin) // N * N
                for start in range(0, taken, N):
                    k = consecutive(K, full_begin + start, k_row, end, N, D, PADDED, False)
                    share = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse)
                    v = consecutive(V, full_begin + start, v_row, end, N, D, PADDED, False)
                    credit = tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None]
                    d_query = tl.dot((share * credit).to(k.dtype), k, d_query, input_precision=PRECISION)
                right_begin = full_begin + taken
            else:  # gates differ from 1 in the list and left of every window only
                right_begin = end
                if not CAUSAL:
                    begin = full_begin

            if SOFT and CAUSAL:
                for start in range(tl.maximum(front, sinks), live, N):
                    slot = start + step
                    key = tl.maximum(listed(slot, live, Lists, first, sinks, width, keys), 0)
                    gate, z = listed_gates(slot, live, Scores, Ends, sinks, width, position, tau)
                    k = gather(K, key, key >= 0, k_row, D, PADDED, False)
                    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse
                    share = tl.exp2(tl.where(gate > 0, logits, float("-inf")))
                    v = gather(V, key, key >= 0, v_row, D, PADDED, False)
                    credit = share * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                    if ATOMIC or TAU:
                        d_gate = tl.where(z[None, :] - 1.0 < tau, credit, 0.0)
                        if ATOMIC:
                            to = DScores + row * keys + key
                            tl.atomic_add(to, tl.sum(d_gate, 0), mask=slot < live, sem="relaxed")
                        if TAU:
                            d_tau -= tl.sum(d_gate, 1)
                    if QUERY:
                        d_query = tl.dot((credit * gate).to(k.dtype), k, d_query, input_precision=PRECISION)
                live = tl.maximum(tl.minimum(live, sinks), front)

            rest = live - front + gone + full_begin - begin + end - right_begin
            for start in tl.range(0, rest, N, num_stages=MIXED_STAGES):
                key, sees = mixed(
                    start + step, position, front, live, gone, begin, full_begin, right_begin, end, Begin, Until, Lists,
                    Leavers, first, sinks, width, keys, ALWAYS, CAUSAL,
                )  # fmt: skip
                there = key >= 0
                k = gather(K, key, there, k_row, D, PADDED, True)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse
                share = tl.exp2(tl.where(sees, logits, float("-inf")))
                v = gather(V, key, there, v_row, D, PADDED, True)
                credit = share * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                if SOFT:
                    z = tl.load(Z + key, mask=there, other=0.0)[None, :]
                    gate, near = gates(position, tau, key[None, :], z, left, right)
                    if ATOMIC or TAU:
                        free = sees & (near == 0) & (z > tau) & (z - 1.0 < tau)
                        d_gate = tl.where(free, credit, 0.0)
                        if ATOMIC:
                            tl.atomic_add(DScores + row * keys + key, tl.sum(d_gate, 0), mask=there, sem="relaxed")
                        if TAU:
                            d_tau -= tl.sum(d_gate, 1)
                    credit = credit * gate
                if QUERY:
                    d_query = tl.dot(credit.to(k.dtype), k, d_query, input_precision=PRECISION)

        if QUERY:
            d_rows = batch * d_batch + (head * GROUP + member) * d_head + t * d_row
            d_query = (d_query * scaling).to(DQuery.dtype.element_ty)
            tl.store(DQuery + d_rows[:, None] + dim[None, :], d_query, mask=inside)
        if TAU:
            tl.store(DTau + per_row, d_tau, mask=exists)


@triton.jit
def _pairs(
    Q, Grad, Lse, Delta, k, v, start, end, scale,
    q_head, q_row, g_head, g_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Load rows of queries from `start` on (up to `end` with MASKED), and compute their pairs with N keys.

    Returns rows `[M, PADDED]` of the query and of the output's gradient; and for every pair of key and row, `[N, M]`,
    its logit less the logarithm of the mass, and `<do, v> - delta`."""
    step = tl.arange(0, M)
    row = start + step
    if M % GROUP == 0:  # whole queries: from block to block only the first changes
        first = tl.cast(start // GROUP, tl.int64)
        Q += first * q_row
        Grad += first * g_row
        near = step
    else:
        near = row
    query, member, exists = (near // GROUP).to(tl.int64), (near % GROUP).to(tl.int64), row < end
    q = gather(Q, member * q_head + query * q_row, exists, 1, D, PADDED, MASKED)
    grad = gather(Grad, member * g_head + query * g_row, exists, 1, D, PADDED, MASKED)
    if MASKED:
        lse = tl.load(Lse + row, mask=exists, other=0.0)
        delta = tl.load(Delta + row, mask=exists, other=0.0)
    else:
        lse = tl.load(Lse + row)
        delta = tl.load(Delta + row)
    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :]
    return q, grad, logits, tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :]


@triton.jit(do_not_specialize=["span", *LENGTHS])
def key_gradients(
    Q, K, V, Z, Tau, Begin, Until, Lists, Leavers, First, Grad, Lse, Delta, DKey, DValue, DScores, scaling, scale, span,
    queries, keys, heads, width, tiles, tile, left, right, sinks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row, g_batch, g_head,
    g_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, SOFT: tl.constexpr, CAUSAL: tl.constexpr,
    ALWAYS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    KEYS: tl.constexpr, SCORES: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """Compute d key, d value and d scores of a block of keys; `SOURCE` selects the keys and parts of their intervals.

    "all"     blocks of the order `Lists`, whole intervals
    "window"  consecutive keys, in the window of the query
    "list"    keys that some of `span` queries have in their lists, outside the window; added to what memory holds
    """
    row = tl.program_id(1).to(tl.int64)  # of [B, Hkv]
    batch, head = row // heads, row % heads
    Q += batch * q_batch + head * GROUP * q_head
    Grad += batch * g_batch + head * GROUP * g_head
    Lse += row * GROUP * queries
    Delta += row * GROUP * queries
    place = tl.program_id(0) * N + tl.arange(0, N)
    offset = keys - queries
    t_low, t_high = 0, queries
    if SOURCE == "list":
        t_low = tl.program_id(2) * span
        t_high = tl.minimum(t_low + span, queries)
        first = first_of(First, batch)
        Lists += (row * tiles + t_low // tile) * width
        key = listed(place, sinks + width, Lists, first, sinks, width, keys)
        if CAUSAL:  # and the leavers of these queries
            Leavers += (row * tl.num_programs(2) + tl.program_id(2)) * span
            entry = place - sinks - width
            key = tl.maximum(key, tl.load(Leavers + entry, mask=(entry >= 0) & (entry < span), other=-1))
        there = key >= 0
    else:
        there = place < keys
        key = place
        if SOURCE == "all":
            key = tl.load(Lists + row * keys + place, mask=there, other=0).to(tl.int32)
    if not CAUSAL:
        Begin += row * keys
    since = begins(key, there, Begin, CAUSAL)
    until = tl.load(Until + row * keys + key, mask=there, other=0)
    if SOURCE == "window":
        since = tl.maximum(since, key - right)
        until = tl.minimum(until, key + left + 1)
    elif SOURCE == "list" and CAUSAL:
        since = key + left + 1
    k = gather(K + batch * k_batch + head * k_head, key, there, k_row, D, PADDED, True)
    v = gather(V + batch * v_batch + head * v_head, key, there, v_row, D, PADDED, True)
    if SOFT and SOURCE != "window":
        z = tl.load(Z + row * keys + key, mask=there, other=0.0)[:, None]

    attended = there & (until > since) & (since < t_high + offset) & (until > t_low + offset)
    t_first = tl.maximum(tl.min(tl.where(attended, since, keys), 0) - offset, t_low)
    t_end = tl.minimum(tl.max(tl.where(attended, until, 0), 0) - offset, t_high)
    dim = tl.arange(0, PADDED)
    d_key = tl.zeros([N, PADDED], tl.float32)
    d_value = tl.zeros([N, PADDED], tl.float32)
    d_scores = tl.zeros([N], tl.float32)

    # First the queries that see all of these keys with gate 1, a whole number of blocks, without any mask.
    full_begin, full_end = t_first * GROUP, t_first * GROUP
    if SOURCE == "window" or (not SOFT and (CAUSAL or SOURCE == "all")):
        all_begin = tl.max(tl.where(attended, since, 0), 0) - offset
        all_begin = tl.minimum(tl.maximum(all_begin, t_first), tl.maximum(t_end, t_first))
        all_end = tl.minimum(tl.min(tl.where(attended, until, 1 << 30), 0) - offset, t_end)
        full_begin = all_begin * GROUP
        full_end = full_begin + tl.maximum(all_end - all_begin, 0) * GROUP // M * M
    for start in range(full_begin, full_end, M):
        q, grad, logits, credit = _pairs(
            Q, Grad, Lse, Delta, k, v, start, full_end, scale, q_head, q_row, g_head, g_row,
            GROUP, D, PADDED, M, PRECISION, False,
        )  # fmt: skip
        share = tl.exp2(logits)
        credit = share * credit
        if KEYS:
            d_value = tl.dot(share.to(grad.dtype), grad, d_value, input_precision=PRECISION)
            d_key = tl.dot(credit.to(q.dtype), q, d_key, input_precision=PRECISION)

    # Then those before and after them, each from a block of its own on.
    since = tl.where(attended, since, 1 << 30)[:, None]
    until = until[:, None]
    before = tl.cdiv(full_begin - t_first * GROUP, M)
    after = tl.cdiv(t_end * GROUP - full_end, M)
    for block in range(0, before + after):
        start = tl.where(block < before, t_first * GROUP + block * M, full_end + (block - before) * M)
        end = tl.where(block < before, full_begin, t_end * GROUP)
        q, grad, logits, credit = _pairs(
            Q, Grad, Lse, Delta, k, v, start, end, scale, q_head, q_row, g_head, g_row,
            GROUP, D, PADDED, M, PRECISION, True,
        )  # fmt: skip
        row_of = start + tl.arange(0, M)
        position = tl.where(row_of < end, row_of // GROUP + offset, -(1 << 30))[None, :]
        sees = (since <= position) & (until > position)
        if SOURCE == "list" and not CAUSAL:
            sees = sees & ((key[:, None] < position - left) | (key[:, None] > position + right))
        share = tl.exp2(tl.where(sees, logits, float("-inf")))
        credit = share * credit
        if SOFT and SOURCE != "window":
            tau = 0.0
            if CAUSAL:
                tau = tl.load(Tau + row * queries + row_of // GROUP, mask=row_of < end, other=0.0)[None, :]
            gate, near = gates(position, tau, key[:, None], z, left, right)
            if SCORES:
                free = sees & (near == 0) & (z > tau) & (z - 1.0 < tau)
                d_scores += tl.sum(tl.where(free, credit, 0.0), 1)
            credit = credit * gate
            share = share * gate
        if KEYS:
            d_value = tl.dot(share.to(grad.dtype), grad, d_value, input_precision=PRECISION)
            d_key = tl.dot(credit.to(q.dtype), q, d_key, input_precision=PRECISION)

    if KEYS:
        written = there[:, None] & (dim < D)[None, :]
        at = key.to(tl.int64)
        to_key = DKey + (batch * dk_batch + head * dk_head + at * dk_row)[:, None] + dim[None, :]
        to_value = DValue + (batch * dv_batch + head * dv_head + at * dv_row)[:, None] + dim[None, :]
        d_key = tl.where(attended[:, None], d_key * scaling, 0.0)
        d_value = tl.where(attended[:, None], d_value, 0.0)
        if SOURCE == "list":
            if t_first < t_end:
                written = written & attended[:, None]
                tl.atomic_add(to_key, d_key, mask=written, sem="relaxed")
                tl.atomic_add(to_value, d_value, mask=written, sem="relaxed")
        else:
            tl.store(to_key, d_key.to(DKey.dtype.element_ty), mask=written)
            tl.store(to_value, d_value.to(DValue.dtype.element_ty), mask=written)
    if SCORES:
        if SOURCE == "list":
            tl.atomic_add(DScores + row * keys + key, d_scores, mask=attended, sem="relaxed")
        else:
            tl.store(DScores + row * keys + key, d_scores, mask=there)
