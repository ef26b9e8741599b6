"""Call the library's functions so that they launch every kernel with every kind of arguments, for `compile_kernels.py`.

A kernel is compiled anew for each dtype and constant, so that these vary here; shapes are small, and values are zeros.
`CALLS` has every statement of the kernels, and every dtype and head size; `MORE` has what is left of the products.
"""

import importlib
import pkgutil
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import hf_sparse.ops
from hf_sparse.ops import sparsek_attention
from hf_sparse.ops.entmax.inputs import Inputs
from hf_sparse.ops.entmax.layout import layout_of
from hf_sparse.ops.entmax.step import Scales
from hf_sparse.ops.entmax.triton.attention import attend
from hf_sparse.ops.entmax.triton.few import Few
from hf_sparse.ops.entmax.triton.fused import lists_of
from hf_sparse.ops.entmax.triton.groups import Buffered
from hf_sparse.ops.entmax.triton.pooled import fused_pooled_tiles
from hf_sparse.ops.entmax.triton.rows import distribution_of_rows
from hf_sparse.ops.entmax.triton.step import step as entmax_step
from hf_sparse.ops.predictors.profile import BINS
from hf_sparse.ops.predictors.triton.cluster_step import ClusterStep, Lists, Projections, cluster_lists
from hf_sparse.ops.selection import ragged
from hf_sparse.ops.selection.linear_scores import Slopes
from hf_sparse.ops.selection.triton import linear_scores, slot_filling
from hf_sparse.ops.selection.triton import slots as of_slots
from hf_sparse.ops.selection.triton.reading import ReadingSettings, read_text
from hf_sparse.ops.selection.triton.scan import scan_prefixes, select_keys
from hf_sparse.ops.selection.triton.step import StepKernel
from hf_sparse.ops.tiles.tiles import Tiles, tile_counts
from hf_sparse.ops.triton import early as begins
from hf_sparse.ops.triton.causal_attention import attend as attend_to_all
from hf_sparse.ops.triton.divergence import fused_divergence
from hf_sparse.ops.triton.products import ProductSizes, fused_gated_product, fused_product_added, fused_products

MODULES = [
    importlib.import_module(module.name) for module in pkgutil.walk_packages(hf_sparse.ops.__path__, "hf_sparse.ops.")
]
CALLS: list[Any] = []
MORE: list[Any] = []  # with `--full`

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = (SINGLE, BRAIN, HALF)
#: Dtypes and head sizes. To the compiler the two of half precision differ in a name.
SIZES = [*product((SINGLE, BRAIN), (32, 64, 96, 128, 256)), (HALF, 64), (HALF, 128)]
FEW = [(SINGLE, 64), (BRAIN, 96), (HALF, 128)]
LARGE = [(SINGLE, 256), (BRAIN, 64), (BRAIN, 128), (BRAIN, 256)]
CPU = torch.device("cpu")
COUNTS = (300, 40)  # slots of two KV heads that differ


def cross(sizes: list[tuple[torch.dtype, int]], *calls: Any) -> None:
    """Make each call for each dtype and head size, by default so many that every call and every size is there."""
    for (number, size), (place, call) in product(enumerate(sizes), enumerate(calls)):
        once = place == number % len(calls) or number == place % len(sizes)
        (CALLS if once else MORE).append(partial(call, *size))


def rows(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, trained: bool = False) -> Tensor:
    """Make `[B, H, T, D]` as models have it, `[B, T, H, D]` in memory."""
    return torch.zeros(batch, length, heads, dim, dtype=dtype, requires_grad=trained).transpose(1, 2)


def inputs(
    dtype: torch.dtype, dim: int, group: int, queries: int, keys: int, trained: bool = False, batch: int = 2
) -> list[Tensor]:
    """Make query, key and value of two KV heads."""
    return [rows(batch, heads, n, dim, dtype, trained) for heads, n in ((2 * group, queries), (2, keys), (2, keys))]


def backward(output: Tensor) -> None:
    if output.requires_grad:
        output.float().sum().backward()


def sparsek(
    dtype: torch.dtype, dim: int, *, group: int = 4, queries: int = 300, keys: int = 300, start: bool = False,
    trained: bool = True, frozen: bool = False, deterministic: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Attend with SparseK, and back: to the scores alone where all else is frozen."""
    tensors = inputs(dtype, dim, group, queries, keys, trained and not frozen)
    scores = torch.zeros(2, 2, keys, requires_grad=trained)
    first = torch.tensor([0, 7]) if start else None
    torch.use_deterministic_algorithms(deterministic)
    given = {"k": 21, "window": 17, "sinks": 3} | options
    backward(sparsek_attention(*tensors, scores, start=first, implementation="triton", **given))
    torch.use_deterministic_algorithms(False)


cross(
    SIZES,
    partial(sparsek, gates="soft", support=64),
    partial(sparsek, gates="hard"),
    partial(sparsek, gates="soft", causal=False),
    partial(sparsek, gates="hard", causal=False),
)
cross(
    FEW,
    partial(sparsek, gates="soft", start=True, group=1, k=(21, 5), support=(64, 70)),
    partial(sparsek, gates="hard", start=True, group=1, k=(21, 5)),
    partial(sparsek, gates="soft", queries=1, trained=False, scaling=-0.3),
    partial(sparsek, gates="soft", frozen=True, group=3, support=64),
    partial(sparsek, gates="soft", frozen=True, causal=False),
    partial(sparsek, gates="soft", start=True, causal=False, group=3, deterministic=True),
    partial(sparsek, gates="soft", keys=2100, queries=2100, group=1, deterministic=True),
)


def scan(k: int, size: int, keys: int, tile: int) -> None:
    """Find thresholds, and back, and select keys."""
    scores = torch.zeros(2, keys, requires_grad=True)
    options = {"queries": keys // 2, "window": 3, "tile": tile}
    found = scan_prefixes(scores, k, size=size, with_lists=True, **options)
    assert found.tau is not None
    found.tau.sum().backward()
    select_keys(scores.detach(), size, **options)


for tile in (16, 256):
    CALLS.append(partial(scan, 5, 9, 1500, tile))
    MORE.append(partial(scan, 300, 2000, 9000, tile))


def scores(dtype: torch.dtype, of_weight: torch.dtype, heads: int, columns: int, slope: bool) -> None:
    """Score tokens, and back."""
    states = torch.zeros(2, 37, columns, dtype=dtype, requires_grad=True)
    weight = torch.zeros(heads, columns, dtype=of_weight, requires_grad=True)
    for wanted in ((True, True), (True, False), (False, True)) if heads == 1 else ((True, True),):
        states.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
        linear_scores.linear_scores(states, weight).sum().backward()
    learned, index = torch.zeros(heads) if slope else None, torch.arange(37).expand(2, -1)
    tensors = (states.detach(), weight.detach(), learned, index)
    linear_scores.token_scores(*tensors, slopes=Slopes(0.01, 256, 9))


for dtype in DTYPES:
    CALLS.append(partial(scores, dtype, SINGLE, 8, 576, True))
CALLS.append(partial(scores, HALF, SINGLE, 1, 16, False))
CALLS.append(partial(scores, BRAIN, BRAIN, 3, 100, True))


def slots(dtype: torch.dtype, dim: int, *, batch: int = 2, number: int = 300, unequal: bool = False) -> list[Tensor]:
    """Make keys, values, scores, positions, seen, padded_late and the count."""
    shape = (batch, sum(COUNTS)) if unequal else (batch, 2, number)
    keys, values = torch.zeros(2, *shape, dim, dtype=dtype)
    seen, late = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.bool)
    return [keys, values, torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), seen, late, seen.sum()]


def apart(dtype: torch.dtype, dim: int, *, group: int, unequal: bool, batch: int) -> None:
    """Fill slots, and take a step in the kernels that are one after another."""
    state = slots(dtype, dim, unequal=unequal, batch=batch)
    offsets = ragged.offsets_of(COUNTS, CPU) if unequal else None
    layout = {"counts": COUNTS, "offsets": offsets} if unequal else {}
    query, key, value = inputs(dtype, dim, group, 1, 1, batch=batch)
    text = inputs(dtype, dim, group, 700, 700, batch=batch)[1:]
    filled = {"window": 5, "sinks": 2} | ({"offsets": offsets, "most": max(COUNTS)} if unequal else {})
    slot_filling.fill_slots(*state[:5], *text, torch.zeros(batch, 2, 700), **filled)
    for valid in (None, torch.ones(batch, dtype=torch.bool)):
        new = (key, value, torch.zeros(batch, 2, 1))
        of_slots.insert_token(*state[:5], *new, valid, window=5, sinks=2, **layout)
    of_slots.attend_slots(query, *state[:2], state[3], scaling=0.3, **layout)


for group, unequal, batch in ((4, False, 1), (1, True, 300)):
    cross([*LARGE, *FEW], partial(apart, group=group, unequal=unequal, batch=batch))


def step(
    dtype: torch.dtype, dim: int, *, group: int = 4, batch: int = 2, number: int = 300, masked: bool = False,
    indexed: bool = False, unequal: bool = False, linear: bool = True, learned: bool = False, slope: float = 0.0,
) -> None:  # fmt: skip
    """Take a step in one kernel."""
    state = slots(dtype, dim, number=number, unequal=unequal, batch=batch)
    query, key, value = inputs(dtype, dim, group, 1, 1, batch=batch)
    states = torch.zeros(batch, 1, 576, dtype=dtype) if linear else torch.zeros(batch, 2, 1)
    weight, learned_slope = torch.zeros(2, 576) if linear else None, torch.zeros(2) if learned else None
    layout = {"counts": COUNTS, "offsets": ragged.offsets_of(COUNTS, CPU)} if unequal else {}
    kernel = StepKernel(
        state[:5] if indexed else state, query, key, value, weight, learned_slope,
        slopes=Slopes(slope, 256, 0 if slope else 9),
        masked=masked, indexed=indexed, window=5, sinks=2, scaling=0.3, **layout,
    )  # fmt: skip
    valid = torch.ones(batch, dtype=torch.bool) if masked else None
    rows_of_pool = torch.arange(batch) if indexed else None
    kernel(query, key, value, states, weight, learned_slope, valid, rows_of_pool, state[:5])


cross(SIZES, step, partial(step, indexed=True, unequal=True, learned=True, slope=0.01))
cross(
    FEW,
    partial(step, group=1, masked=True, slope=0.01),
    partial(step, group=20, unequal=True, masked=True, linear=False),
    partial(step, batch=300, number=16, indexed=True),
    partial(step, number=5000, batch=1, group=7, linear=False, indexed=True),
)


def read(dtype: torch.dtype, dim: int, *, length: int, learned: bool, unequal: bool) -> None:
    """Read a text without padding into slots."""
    k = {"k": 40, "k_of_heads": (40, 9)} if unequal else {"k": 40}
    settings = ReadingSettings(**k, window=21, sinks=4, scaling=0.2, slopes=Slopes(0.01, 256, 9 if learned else 0))
    states, slope = torch.zeros(2, length, 576, dtype=dtype), torch.zeros(2) if learned else None
    read_text(*inputs(dtype, dim, 4, length, length), states, torch.zeros(2, 576), slope, settings)


def short_text(dtype: torch.dtype, dim: int, *, group: int, scaling: float) -> None:
    attend_to_all(*inputs(dtype, dim, group, 70, 70), scaling)


cross(SIZES, partial(short_text, group=4, scaling=0.2), partial(short_text, group=1, scaling=-0.2))
for length in (20, 700):
    cross(FEW, *(partial(read, length=length, learned=learned, unequal=not learned) for learned in (True, False)))


def divergence(dtype: torch.dtype, columns: int, trained: bool) -> None:
    student, teacher = torch.zeros(2, 3, columns, dtype=dtype)
    backward(fused_divergence(student.requires_grad_(trained), teacher))


for dtype, columns in zip(DTYPES, (100, 9001, 100), strict=True):
    CALLS += [partial(divergence, dtype, columns, trained) for trained in (False, True)]


def products(
    dtype: torch.dtype, number: int, columns: int, counts: tuple[int, ...], bias: bool,
    sizes: ProductSizes | None = None,
) -> None:  # fmt: skip
    """Multiply an input of so many rows by several weights."""
    weights = [torch.zeros(count, columns, dtype=dtype) for count in counts]
    biases = [torch.zeros(count, dtype=dtype) for count in counts] if bias else []
    fused_products(torch.zeros(number, columns, dtype=dtype), weights, biases, sizes)


def further(dtype: torch.dtype, number: int, columns: int, count: int, bias: bool) -> None:
    """Multiply an input of so many rows, and add another tensor, or take the product of a gate."""
    x, weight = torch.zeros(number, columns, dtype=dtype), torch.zeros(count, columns, dtype=dtype)
    fused_product_added(
        x, weight, torch.zeros(count, dtype=dtype) if bias else None, torch.zeros(number, count, dtype=dtype)
    )
    fused_gated_product(x, weight, weight)


for dtype, number in product((BRAIN, HALF), (1, 5, 16)):
    CALLS.append(partial(products, dtype, number, 4096, (4096, 1024, 1024), False))
    CALLS.append(partial(products, dtype, number, 4096, (4096,), False))
    MORE.append(partial(products, dtype, number, 576, (576,), True))
    CALLS.append(partial(further, dtype, number, 4096, 4096, False))
CALLS += [partial(products, BRAIN, number, 129, (33, 7), True) for number in (1, 5)]
MORE += [partial(further, BRAIN, number, 129, 33, True) for number in (1, 5)]
CALLS.append(partial(products, BRAIN, 8, 4096, (4096,), False, ProductSizes(64, 128, 1, 4, 4)))


def alpha_of(kind: str, heads: int) -> float | Tensor:
    """Return 1.5, 2 (sparsemax), 1.3 or a number for each head, which wants a gradient."""
    return torch.full((heads,), 1.5, requires_grad=True) if kind == "heads" else float(kind)


def listed(heads: int, queries: int, keys: int, size: int, of_queries: int) -> Tiles:
    """List all tiles of keys."""
    tiles, total = tile_counts(queries, keys, size, of_queries)
    return Tiles(torch.arange(total).expand(2, heads, tiles, total).contiguous(), size, of_queries)


def entmax(
    dtype: torch.dtype, dim: int, *, group: int = 3, queries: int = 300, keys: int = 300, alpha: str = "1.5",
    causal: bool = True, valid: bool = False, first: bool = False, trained: bool = True, lists: Any = None,
    **sizes: Any,
) -> None:  # fmt: skip
    """Attend with entmax over all keys or listed tiles (of so many keys, for so many queries and heads), and back."""
    tensors = inputs(dtype, dim, group, queries, keys, trained)
    number = alpha_of(alpha, 2 * group)
    scaling = torch.full((2 * group,), 0.3, requires_grad=True) if alpha == "heads" else 0.3
    options = {"alpha": number, "scaling": scaling, "causal": causal}
    options |= {"kept": 16} | sizes  # so that other groups of queries go to the kernels that keep nothing
    options["valid"] = torch.ones(2, keys, dtype=torch.bool) if valid else None
    options["first_query"] = torch.tensor([0, 3]) if first else None
    if lists is not None:
        size, of_queries, heads = lists
        described = Inputs(*tensors[:2], 1.0, causal, options["valid"], options["first_query"])
        options["lists"] = lists_of(listed(heads, queries, keys, size, of_queries), described)
    with torch.set_grad_enabled(trained):
        backward(attend(*tensors, **options)[0])


cross(
    [*LARGE, *FEW],
    partial(entmax, alpha="heads"),
    partial(entmax, kept=None, lists=(64, 64, 6)),
    partial(entmax, kept=None, capacity=1),
    partial(entmax, kept=None, queries=1, keys=4200, probe=16),
    partial(entmax, kept=None, few=Few(16, 2), buffered=Buffered(32, 4, 4, 3, 32, 128)),
    partial(entmax, group=1, causal=False, valid=True, alpha="2.0"),
    partial(entmax, queries=8, first=True, valid=True, trained=False, alpha="1.3"),
    partial(entmax, lists=(8, 1, 6), valid=True, alpha="2.0"),
    partial(entmax, lists=(16, 16, 2), causal=False, alpha="heads", queries=290),
)


def decode(dtype: torch.dtype, dim: int, *, kind: str, index: int = 0, padded: bool = False, new: bool = False) -> None:
    """Take a step of entmax over all keys, or over tiles of `index` keys."""
    query, key, value = inputs(dtype, dim, 4, 1, 300)
    scales = (
        Scales.of_logarithm(float(kind), 0.3, torch.zeros(8)) if new else Scales.of(alpha_of(kind, 8), 0.3, query)
    )  # fmt: skip
    numbers = (scales.scale, scales.exponent, scales.kind, scales.factor, scales.is_log)
    valid, first = (torch.ones(2, 300, dtype=torch.bool), torch.tensor([7, 299])) if padded else (None, None)
    tiles = listed(8, 1, 300, index, 1).index if index else None
    newest = (key[:, :, -1:].clone(), value[:, :, -1:].clone()) if new else None
    with torch.no_grad():
        entmax_step(query, key, value, *numbers, True, valid, first, tiles, index, newest=newest)


cross(
    [*LARGE, *FEW],
    partial(decode, kind="1.5", new=True),
    partial(decode, kind="heads", index=8),
    partial(decode, kind="2.0", index=1, padded=True),
    partial(decode, kind="1.3", padded=True),
)


def pooled(
    dtype: torch.dtype, dim: int, *, grouped: bool, causal: bool = True, pool: int = 8, first: bool = False
) -> None:
    """List tiles by mean keys."""
    query, key, _ = inputs(dtype, dim, 3, 150, 150)
    start = torch.tensor([0, 32]) if first else None
    layout = layout_of(Inputs(query, key, 1.0, causal, None, start), 2 if grouped else 6, 32, 32 if grouped else 16)
    fused_pooled_tiles(query, key, 0.3, layout, causal, 2, pool, 9, 1)


def early(call: Any, dtype: torch.dtype, dim: int) -> None:
    """Make a call as on a GPU where kernels may begin while others end."""
    before, begins._launches_early = begins._launches_early, lambda: True
    try:
        call(dtype, dim)
    finally:
        begins._launches_early = before


cross(FEW, partial(early, partial(entmax, kept=None)), partial(early, partial(pooled, grouped=True)))
cross(
    FEW,
    partial(pooled, grouped=True),
    partial(pooled, grouped=False, first=True, pool=1),
    partial(pooled, grouped=False, causal=False, pool=4),
)
for exponent, length in product((2.0, 1.0, 1 / 0.3, torch.ones(3)[:, None, None]), (37, 5000)):
    CALLS.append(partial(distribution_of_rows, torch.zeros(2, 3, 4, length), exponent))


def clusters(dtype: torch.dtype, dim: int, *, kind: str, variant: int, size: int = 8, rank: int = 4) -> None:
    """Take a step of entmax over tiles that clusters choose, and list the tiles."""
    query, key, value = inputs(dtype, dim, 4, 1, 300)
    lists = Lists(size, 1 if variant else 2, 5, 1, 20, variant == 1)
    of_query = torch.zeros(2 if variant == 2 else 8, dim, rank)
    bias = None if variant == 2 else torch.zeros(8, rank)
    profile = torch.zeros(8, BINS) if variant else None
    projections = Projections(of_query, bias, torch.zeros(2, dim, rank), torch.zeros(2, 6, rank), profile)
    is_log = variant == 0 and kind != "heads"
    scales = (
        Scales.of_logarithm(float(kind), 0.3, torch.zeros(8)) if is_log else Scales.of(alpha_of(kind, 8), 0.3, query)
    )
    order = torch.arange(300).expand(2, -1) if variant == 1 else None
    position = torch.tensor([299, 7]) if variant else None
    place = torch.tensor([299]) if variant == 2 else None
    codes = torch.zeros(2, 8, 300, rank), torch.zeros(2, 2, 300, 1, dtype=torch.int64)
    newest = key[:, :, -1:].clone(), value[:, :, -1:].clone()
    step = ClusterStep(query, key, value, lists, projections, kind=scales.kind, is_log=is_log)
    with torch.no_grad():
        step(
            query, key, value, newest, codes, projections, scales.scale, scales.exponent, scales.factor, order,
            position, place,
        )  # fmt: skip
    cluster_lists(torch.zeros(2, 8, rank), codes[1], projections.centroids, profile, torch.tensor([299, 7]), lists)


cross(
    [*LARGE, *FEW],
    partial(clusters, kind="1.5", variant=0),
    partial(clusters, kind="heads", variant=1, size=1),
    partial(clusters, kind="2.0", variant=2, size=16, rank=3),
    partial(clusters, kind="1.3", variant=0),
)
