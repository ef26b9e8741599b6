"""Rank the tiles of keys for one causal query per head from the clusters of the keys.

The kernel computes what `hf_sparse.methods.sparsefinder` defines for clusters of any size: the mass of a tile is the
sum of `exp(-|q - c|^2)` over the centroids c of its keys, times the profile of the distance; and then the order in
which `hf_sparse.ops.tiles.select.step_tiles` takes tiles. It either gets the points that describe the queries, or
projects the newest query and key itself and puts their codes, the key and the value where a cache keeps them.
"""

import triton
import triton.language as tl

_NUMBERS = [
    "keys", "total", "width", "tables", "heads", "clusters", "rank", "window", "global_tokens", "q_batch", "q_head",
    "n_batch", "n_head", "w_batch", "w_head", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "x_batch",
    "x_head", "x_row", "c_batch", "c_head", "c_row", "o_batch", "p_batch",
]  # fmt: skip
_ADDRESSES = [
    "Points", "Q", "NewK", "NewV", "K", "V", "QueryCodes", "KeyCodes", "QueryWeight", "Bias", "KeyWeight", "Centroids",
    "Profile", "Order", "Position", "Newest", "Scratch",
]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ADDRESSES)
def rank_tiles(
    Points, Q, NewK, NewV, K, V, QueryCodes, KeyCodes, QueryWeight, Bias, KeyWeight, Centroids, Profile, Order,
    Position, Newest, Scratch, keys, total, width, tables, heads, clusters, rank, window, global_tokens,
    q_batch, q_head, n_batch, n_head, w_batch, w_head, k_batch, k_head, k_row, v_batch, v_head, v_row, x_batch, x_head,
    x_row, c_batch, c_head, c_row, o_batch, p_batch,
    GROUP: tl.constexpr, SHARE: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr,
    CLUSTERS: tl.constexpr, W: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Write the ranks of a share of the tiles of one list, negative for those that may not be listed.

    Program: part of the tiles, list, text.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    number, lists = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    pair = batch * lists + number
    first_head = number * SHARE
    kv = (first_head // GROUP).to(tl.int64)
    position = keys - 1
    if Position is not None:
        position = tl.load(Position + batch * p_batch).to(tl.int32)
    newest = (keys - 1).to(tl.int64)  # where the newest token lies, whatever padding is before it
    if Newest is not None:
        newest = tl.load(Newest)
    cluster, tile, inside, dim = tl.arange(0, CLUSTERS), tl.arange(0, W), tl.arange(0, SIZE), tl.arange(0, PADDED)
    tables += (pair * splits + split) * SHARE * clusters
    KeyCodes += batch * c_batch + kv * c_head

    # A list is described by the queries up to the first one of its tile of queries.
    start = position // ROWS * ROWS
    described = start - (ROWS - 1) + tl.arange(0, ROWS)
    earlier = (described >= 0) & (described < position)
    place_of = described.to(tl.int64)
    if Order is not None:
        place_of = tl.load(Order + batch * o_batch + described, mask=earlier, other=0)
    number_of = tl.sum(((described >= 0) & (described <= position)).to(tl.int32), 0).to(tl.float32)
    for member in range(SHARE):  # the weight of every cluster for every head
        head = (first_head + member).to(tl.int64)
        query_codes = QueryCodes
        if Points is None:
            q = tl.load(Q + batch * q_batch + head * q_head + dim, mask=dim < D, other=0.0).to(tl.float32)
            query_codes = QueryCodes + batch * x_batch + head * x_head
        distance = tl.zeros([CLUSTERS], tl.float32)
        for place in range(rank):
            if Points is None:
                weight_head = kv if SHARED else head
                weights = tl.load(QueryWeight + (weight_head * D + dim) * rank + place, mask=dim < D, other=0.0)
                point = tl.sum(q * weights.to(tl.float32), 0)
                if Bias is not None:
                    point += tl.load(Bias + head * rank + place).to(tl.float32)
                if split == 0:
                    tl.store(query_codes + newest * x_row + place, point)
                if ROWS > 1:
                    points = tl.load(query_codes + place_of * x_row + place, mask=earlier, other=0.0)
                    point = (tl.sum(points, 0) + tl.where(start == position, point, 0.0)) / number_of
            else:
                point = tl.load(Points + (batch * heads + head) * rank + place)
            center = tl.load(Centroids + (kv * clusters + cluster) * rank + place, mask=cluster < clusters, other=0.0)
            away = point - center.to(tl.float32)
            distance += away * away
        distance = tl.where(cluster < clusters, distance, float("inf"))
        weight = tl.exp((tl.min(distance, 0) - distance).to(tl.float64))
        tl.store(
            Scratch + tables + member * clusters + cluster, weight.to(tl.int64, bitcast=True), mask=cluster < clusters
        )
    new_code = position * 0
    if Points is None:
        k = tl.load(NewK + batch * n_batch + kv * n_head + dim, mask=dim < D, other=0.0)
        distance = tl.zeros([CLUSTERS], tl.float32)
        for place in range(rank):
            weights = tl.load(KeyWeight + (kv * D + dim) * rank + place, mask=dim < D, other=0.0)
            point = tl.sum(k.to(tl.float32) * weights.to(tl.float32), 0)
            center = tl.load(Centroids + (kv * clusters + cluster) * rank + place, mask=cluster < clusters, other=0.0)
            away = point - center.to(tl.float32)
            distance += away * away
        distance = tl.where(cluster < clusters, distance, float("inf"))
        new_code = tl.argmin(distance, 0).to(tl.int32)
        if (split == 0) & (first_head % GROUP == 0):
            v = tl.load(NewV + batch * w_batch + kv * w_head + dim, mask=dim < D, other=0.0)
            tl.store(K + batch * k_batch + kv * k_head + newest * k_row + dim, k, mask=dim < D)
            tl.store(V + batch * v_batch + kv * v_head + newest * v_row + dim, v, mask=dim < D)
            tl.store(KeyCodes + newest * c_row, new_code.to(tl.int64))
    tl.debug_barrier()  # the tables are written

    own = position // SIZE
    near = tl.maximum(position // ROWS * ROWS - (window - 1), 0) // SIZE
    blocks = tl.cdiv(total, W)
    share = tl.cdiv(blocks, splits)
    for block in range(split * share, tl.minimum(split * share + share, blocks)):
        index = block * W + tile
        key = index[:, None] * SIZE + inside[None, :]
        there = (key < keys) & (key <= position)
        coded = there
        if Points is None:
            coded &= key < position  # the code of the newest key may not be written yet
        place_of_key = key.to(tl.int64)
        if Order is not None:
            place_of_key = tl.load(Order + batch * o_batch + key, mask=coded, other=0)
        code = tl.load(KeyCodes + place_of_key * c_row, mask=coded, other=-1).to(tl.int32)
        if Points is None:
            code = tl.where(key == position, new_code, code)
        there &= (code >= 0) & (code < clusters)
        away = tl.abs(index - own)
        octave = tl.zeros([W], tl.int32)
        for power in tl.static_range(1, BINS // 4):
            octave += (away >= (4 << power)).to(tl.int32)
        column = tl.where(away < 4, away, 4 + 4 * octave + ((away - (4 << octave)) >> octave))
        column = tl.minimum(column, BINS - 1)
        peak = tl.full([W], float("-inf"), tl.float32)
        mass = tl.zeros([W], tl.float32)
        for member in range(SHARE):
            weight = tl.load(Scratch + tables + member * clusters + code, mask=there, other=0)
            score = tl.log(tl.maximum(tl.sum(weight.to(tl.float64, bitcast=True), 1), 1e-30)).to(tl.float32)
            if Profile is not None:
                score += tl.log(
                    tl.maximum(tl.load(Profile + (first_head + member) * BINS + column).to(tl.float32), 1e-4)
                )
            higher = tl.maximum(peak, score)
            mass = mass * tl.exp(peak - higher) + tl.exp(score - higher)
            peak = higher
        score = peak + tl.log(mass) if SHARE > 1 else peak
        always = (index == own) | (index * SIZE < global_tokens) | ((index >= near) & (window > 0))
        level = always.to(tl.int64) + (index == own).to(tl.int64)
        level = tl.where(index <= own, level, -1)
        bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True).to(tl.int64)
        ascending = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2147483648
        value = (level << 56) + (ascending << 24) + (total - 1 - index).to(tl.int64)
        tl.store(Scratch + pair * width + index, value, mask=index < total)
