"""Entmax attention against the definition: all keys, edges and tiles; outputs, gradients, and the promises."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hf_sparse.ops.entmax import blocks, certified_entmax_attention, entmax, entmax_attention, support
from hf_sparse.ops.tiles.tiles import Tiles, tile_counts

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Case:
    """Random inputs of one shape."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 1
    queries: int = 37
    keys: int = 37
    dim: int = 8
    alpha: float | Tensor = 1.5
    scaling: float | Tensor = 0.3
    causal: bool = True
    padding: str | None = None  # left, right or both
    size: int = 8  # keys per tile
    rows: int | None = None  # queries per tile, as many by default
    dtype: torch.dtype = torch.float64
    inputs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        heads = self.kv_heads * self.group
        q = torch.randn(self.batch, heads, self.queries, self.dim, dtype=torch.float64) * 2
        k = torch.randn(self.batch, self.kv_heads, self.keys, self.dim, dtype=torch.float64)
        self.inputs = [tensor.to(self.dtype) for tensor in (q, k, torch.randn_like(k))]

    @property
    def valid(self) -> Tensor | None:
        if self.padding is None:
            return None
        at = torch.arange(self.keys)
        left, right = at >= 11, at < self.keys - 5
        rows = {"left": [at >= 0, left], "right": [right, at >= 0], "both": [left & right, at % 3 > 0]}[self.padding]
        return torch.stack([rows[row % 2] for row in range(self.batch)])

    @property
    def options(self) -> dict:
        return {"alpha": self.alpha, "scaling": self.scaling, "causal": self.causal, "valid": self.valid}

    def tiles(self, heads: int | None = None, share: float = 0.5) -> Tiles:
        listed, total = tile_counts(self.queries, self.keys, self.size, self.rows)
        heads = heads or self.kv_heads * self.group
        return Tiles.of_mask(torch.rand(self.batch, heads, listed, total) < share, self.size, self.rows)

    def edges(self, tiles: Tiles) -> Tensor:
        """The pairs inside listed tiles, allowed or not, by a loop."""
        rows = self.rows or self.size
        first = (self.keys - self.queries) // rows
        heads = self.kv_heads * self.group
        edges = torch.zeros(self.batch, heads, self.queries, self.keys, dtype=torch.bool)
        for b in range(self.batch):
            for h in range(heads):
                lists = tiles.index[b, h * tiles.index.shape[1] // heads]
                for t in range(self.queries):
                    for tile in lists[(self.keys - self.queries + t) // rows - first].tolist():
                        if tile >= 0:
                            edges[b, h, t, tile * tiles.size : (tile + 1) * tiles.size] = True
        return edges


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float | Tensor,
    scaling: float | Tensor,
    causal: bool,
    valid: Tensor | None = None,
    edges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and probabilities, by the `entmax` package over all pairs."""
    group, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    allowed = torch.ones(len(query), 1, queries, keys, dtype=torch.bool)
    if causal:
        allowed = allowed & (torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None])
    if valid is not None:
        allowed = allowed & valid[:, None, None, :] & valid[:, None, keys - queries :, None]
    if edges is not None:
        allowed = allowed & edges
    if isinstance(scaling, Tensor):
        scaling = scaling[:, None, None]
    if isinstance(alpha, Tensor):
        alpha = alpha[:, None, None].expand(*query.shape[:3], 1)
    logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    probabilities = entmax(logits.masked_fill(~allowed, -torch.inf), alpha)
    return probabilities @ value.repeat_interleave(group, 1), probabilities


CASES = {
    "causal": Case(),
    "encoder": Case(causal=False),
    "grouped": Case(group=3),
    "left": Case(padding="left"),
    "right": Case(padding="right", group=2, causal=False),
    "anywhere": Case(padding="both"),
    "chunk": Case(group=2, queries=21, keys=37),
    "chunk of a padded text": Case(queries=5, keys=37, padding="both"),
    "decode": Case(group=2, queries=1, keys=37),
    "one tile": Case(queries=5, keys=5),
    "a list per query": Case(group=2, rows=1),
    "a list for 2 queries": Case(rows=2, queries=22, padding="both"),
    "a list for 4 queries of an encoder": Case(rows=4, causal=False, padding="right"),
    "one token": Case(queries=1, keys=1),
    "sparsemax": Case(alpha=2.0, group=2),
    "alpha 1.2": Case(alpha=1.2, causal=False),
    "alpha and scaling per head": Case(
        group=2, alpha=torch.tensor([1.2, 1.5, 1.8, 2.0]).double(), scaling=torch.tensor([0.1, 0.3, 0.2, 0.5]).double()
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture(params=[1 << 19, 700], ids=["one block", "many blocks"])
def buffer(request, monkeypatch):
    monkeypatch.setitem(blocks.BUFFER, "cpu", request.param)


def run(attend, case: Case) -> list[Tensor]:
    """Output and the gradients of everything that can have one, for a fixed random upstream gradient."""
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    options = case.options
    for name in ("alpha", "scaling"):
        if isinstance(options[name], Tensor):
            options[name] = options[name].clone().requires_grad_()
            inputs.append(options[name])
    output = attend(*inputs[:3], **options)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output * upstream).sum(), inputs)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.cross("values")
@every_case
def test_all_keys(case, buffer):
    assert_equal(run(entmax_attention, case), run(lambda *x, **o: definition(*x, **o)[0], case))


@pytest.mark.cross("values")
@every_case
@pytest.mark.parametrize("lists", ["query heads", "kv heads", "one"])
def test_tiles(case, lists, buffer):
    tiles = case.tiles({"query heads": case.kv_heads * case.group, "kv heads": case.kv_heads, "one": 1}[lists])
    edges = case.edges(tiles)
    assert_equal(
        run(lambda *x, **o: entmax_attention(*x, tiles=tiles, **o), case),
        run(lambda *x, **o: definition(*x, edges=edges, **o)[0], case),
    )


@pytest.mark.cross("values")
@every_case
def test_edges(case, buffer):
    edges = torch.rand(case.batch, case.kv_heads * case.group, case.queries, case.keys) < 0.3
    assert_equal(
        run(lambda *x, **o: entmax_attention(*x, edges=edges, **o), case),
        run(lambda *x, **o: definition(*x, edges=edges, **o)[0], case),
    )


@pytest.mark.parametrize("case", [Case(batch=1, kv_heads=1, group=2, queries=9, keys=11, size=4, dim=3)])
def test_gradients_are_those_of_finite_differences(case):
    alpha, scaling = torch.tensor([1.3, 1.6]).double(), torch.tensor([0.4, 0.2]).double()
    inputs = [tensor.clone().requires_grad_() for tensor in (*case.inputs, alpha, scaling)]
    tiles = case.tiles(share=0.7)
    assert torch.autograd.gradcheck(
        lambda q, k, v, a, s: entmax_attention(q, k, v, alpha=a, scaling=s, causal=True, tiles=tiles), inputs, atol=1e-6
    )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.padding is None])
def test_gold(name):
    case = CASES[name]
    query, key, value = case.inputs
    options = {"alpha": case.alpha, "scaling": case.scaling, "causal": case.causal}
    _, expected = definition(query, key, value, **options)
    gold, probabilities = support(query, key, **options)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-12)
    assert torch.equal(gold, expected > 0)
    rows = torch.tensor([case.queries - 1, 0])
    some = support(query, key, **options, rows=rows)
    assert torch.equal(some[0], gold[:, :, rows])
    torch.testing.assert_close(some[1], probabilities[:, :, rows])


def test_a_superset_of_the_support_gives_the_same_rows():
    case = Case(group=2)
    query, key, _ = case.inputs
    gold, _ = support(query, key, alpha=1.5, scaling=0.3, causal=True)
    more = gold | (torch.rand(gold.shape) < 0.2)
    full = entmax_attention(*case.inputs, **case.options)
    for edges in (gold, more):
        torch.testing.assert_close(
            entmax_attention(*case.inputs, edges=edges, **case.options), full, rtol=0, atol=1e-14
        )


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0])
def test_a_dropped_mass_moves_the_distribution_by_twice_itself(alpha):
    """The output of one-hot values is the distribution."""
    case = Case(batch=1, kv_heads=1, queries=64, keys=64, dim=64, alpha=alpha, causal=False, scaling=0.04)
    query, key, _ = case.inputs
    value = torch.eye(64, dtype=torch.float64)[None, None]
    full = entmax_attention(query, key, value, **case.options)
    edges = torch.rand(64, 64) < 0.6
    dropped = full.masked_fill(edges, 0.0).sum(-1)
    less = entmax_attention(query, key, value, edges=edges, **case.options)
    torch.testing.assert_close((full - less).abs().sum(-1), 2 * dropped, rtol=0, atol=1e-12)
    assert 0.1 < float(dropped.mean()) < 0.9


@pytest.mark.parametrize("graph", ["all", "edges", "tiles"])
def test_what_padding_holds_is_never_seen(graph):
    case = Case(padding="both", group=2)
    graphs: dict = {"all": {}, "edges": {"edges": torch.rand(2, 4, 37, 37) < 0.5}, "tiles": {"tiles": case.tiles()}}
    clean = run(lambda *x, **o: entmax_attention(*x, **graphs[graph], **o), case)
    case.inputs = [tensor.masked_fill(~case.valid[:, None, :, None], torch.nan) for tensor in case.inputs]
    poisoned = run(lambda *x, **o: entmax_attention(*x, **graphs[graph], **o), case)
    assert_equal(poisoned, clean)
    assert bool((poisoned[0].masked_select(~case.valid[:, None, :, None]) == 0).all())


@pytest.mark.parametrize("graph", ["all", "tiles"])
def test_later_tokens_change_nothing_earlier(graph):
    case = Case(group=2)
    graphs: dict = {} if graph == "all" else {"tiles": case.tiles()}
    before = entmax_attention(*case.inputs, **graphs, **case.options)
    changed = [torch.cat([tensor[:, :, :20], torch.randn_like(tensor[:, :, 20:])], 2) for tensor in case.inputs]
    after = entmax_attention(*changed, **graphs, **case.options)
    torch.testing.assert_close(after[:, :, :20], before[:, :, :20], rtol=0, atol=1e-14)
    assert not torch.allclose(after[:, :, 20:], before[:, :, 20:])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(padding):
    """Token by token: the tiles of a left-padded row are cut elsewhere."""
    case = Case(padding=padding)
    output = entmax_attention(*case.inputs, **case.options)
    for row, real in enumerate(case.valid):
        alone = [tensor[row : row + 1, :, real] for tensor in case.inputs]
        expected = entmax_attention(*alone, alpha=case.alpha, scaling=case.scaling, causal=True)
        torch.testing.assert_close(output[row : row + 1, :, real], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("graph", ["all keys", "edges", "tiles", "complete"])
@pytest.mark.parametrize(("firsts", "queries", "rows"), [((24, 8), 16, 8), ((31, 5), 1, 8), ((30, 5), 7, 1)])
def test_queries_may_stand_at_other_positions_in_each_text(graph, firsts, queries, rows):
    """Padding behind a causal text is the future: each text equals the text alone, and so do its gradients."""
    torch.manual_seed(0)
    case = Case(group=2, keys=40, queries=queries, rows=rows)
    query, key, value = (tensor.requires_grad_() for tensor in case.inputs)
    listed = -(-queries // rows)
    edges, tiles = torch.rand(2, 4, queries, 40) < 0.5, Tiles.of_mask(torch.rand(2, 4, listed, 5) < 0.5, 8, rows)
    options = {"alpha": 1.5, "scaling": 0.3, "causal": True}

    def attend(row: slice, keys: int, **more) -> Tensor:
        graphs = {
            "all keys": {},
            "edges": {"edges": edges[row, :, :, :keys]},
            "tiles": {"tiles": Tiles(tiles.index[row].clone().masked_fill_(tiles.index[row] * 8 >= keys, -1), 8, rows)},
        }
        inputs = query[row], key[row, :, :keys], value[row, :, :keys]
        if graph == "complete":
            completed = certified_entmax_attention(*inputs, **graphs["tiles"], complete=True, **options, **more)
            return completed.output
        return entmax_attention(*inputs, **graphs[graph], **options, **more)

    together = attend(slice(0, 2), 40, first_query=torch.tensor(firsts))
    alone = torch.cat([attend(slice(b, b + 1), first + queries) for b, first in enumerate(firsts)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-11)
    upstream = torch.randn_like(alone)
    for ours, theirs in zip(
        *(torch.autograd.grad(o, (query, key, value), upstream) for o in (together, alone)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_queries_without_listed_keys_get_zeros_and_no_gradient():
    case = Case(queries=16, keys=16, size=8, batch=1)
    tiles = Tiles(torch.tensor([[[[1], [-1]], [[-1], [-1]]]]), 8)  # of tile 0, only keys of the future
    output, *gradients = run(lambda *x, **o: entmax_attention(*x, tiles=tiles, **o), case)
    assert not output.any() and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 0, 5), (1, 2, 0, 0)])
@pytest.mark.parametrize("listed", [False, True])
def test_empty(shape, listed):
    batch, heads, queries, keys = shape
    query, key = torch.zeros(batch, heads, queries, 4, requires_grad=True), torch.zeros(batch, heads, keys, 4)
    graphs: dict = {}
    if listed:
        graphs = {"tiles": Tiles(torch.zeros(batch, heads, tile_counts(queries, keys, 8)[0], 0, dtype=torch.int64), 8)}
    for causal in (True, False):
        output = entmax_attention(query, key, key, alpha=1.5, scaling=1.0, causal=causal, **graphs)
        assert output.shape == query.shape
        output.sum().backward()


@pytest.mark.parametrize("graph", ["all", "tiles"])
def test_half_precision_is_computed_in_float32(graph):
    case = Case(group=2, dtype=torch.bfloat16)
    graphs: dict = {} if graph == "all" else {"tiles": case.tiles()}
    output = entmax_attention(*case.inputs, **graphs, **case.options)
    wide = entmax_attention(*(tensor.float() for tensor in case.inputs), **graphs, **case.options)
    assert torch.equal(output, wide.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = entmax_attention(*(tensor.float() for tensor in case.inputs), **graphs, **case.options)
    assert torch.equal(mixed, output)


def largest(case: Case, tiles: Tiles | None, largest_tensor) -> int:
    with largest_tensor() as tracked:
        run(lambda *x, **o: entmax_attention(*x, tiles=tiles, **o), case)
    return tracked.numel


def test_memory_is_linear(largest_tensor, monkeypatch):
    """Nothing larger than the tensors of the text or the buffer is made, backwards included."""
    monkeypatch.setitem(blocks.BUFFER, "cpu", 1 << 13)
    for keys in (512, 1024):
        case = Case(batch=1, kv_heads=1, queries=keys, keys=keys, size=16)
        lists = torch.arange(keys // 16)[:, None] + torch.tensor([-1, 0])
        lists[0] = torch.tensor([0, -1])
        text = keys * case.dim
        assert largest(case, Tiles(lists[None, None], 16), largest_tensor) <= max(text, 1 << 13) < keys * keys // 8
        # The dense path gathers all keys for a slice of queries.
        assert largest(case, None, largest_tensor) <= 2 * max(text, 1 << 13)


def test_work_is_that_of_the_listed_tiles(monkeypatch):
    """A single long list does not make the short ones cost as much."""
    made: list[int] = []
    original = blocks.Plan._block

    def counted(self, jobs, listed, valid):
        made.append(listed.numel())
        return original(self, jobs, listed, valid)

    monkeypatch.setattr(blocks.Plan, "_block", counted)
    case = Case(batch=1, kv_heads=1, queries=512, keys=512, causal=False)
    mask = torch.eye(64, dtype=torch.bool)
    mask[7] = True
    entmax_attention(*case.inputs, tiles=Tiles.of_mask(mask[None, None], 8), **case.options)
    assert sum(made) == 63 + 64


def bad(match: str, **changes):
    return pytest.param(changes, match, id=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        bad(r"alpha must be in \(1, 2\].*got 1\.0", alpha=1.0),
        bad(r"alpha must be in \(1, 2\].*got 1\.5 to 2\.5", alpha=torch.tensor([1.5, 2.5])),
        bad(r"alpha must be a number or \[Hq\] = \(2,\), got \(3,\)", alpha=torch.full((3,), 1.5)),
        bad(r"scaling must be a number or \[Hq\] = \(2,\), got \(2, 1\)", scaling=torch.ones(2, 1)),
        bad(r"expected query \[B, Hq, Tq, D\]", query=torch.zeros(2, 37, 8)),
        bad("Hq must be a multiple of Hkv", key=torch.zeros(2, 3, 37, 8), value=torch.zeros(2, 3, 37, 8)),
        bad("Tq at most Tk", key=torch.zeros(2, 2, 36, 8), value=torch.zeros(2, 2, 36, 8)),
        bad(r"got query .* and first_query \(3,\)", first_query=torch.zeros(3, dtype=torch.int64)),
        bad(
            "expected no first_query, got both",
            valid=torch.ones(2, 37, dtype=torch.bool),
            first_query=torch.zeros(2, dtype=torch.int64),
        ),
        bad(r"value must have the shape of key.*got \(2, 2, 36, 8\)", value=torch.zeros(2, 2, 36, 8)),
        bad(r"expected valid \[B, 37\] bool", valid=torch.ones(2, 36, dtype=torch.bool)),
        bad(r"valid must be \[B, Tk\] = \(2, 37\)", valid=torch.ones(3, 37, dtype=torch.bool)),
        bad(r"edges must be bool .*= \(2, 2, 37, 37\), got", edges=torch.ones(2, 2, 37, 36, dtype=torch.bool)),
        bad(r"edges must be bool .*float32", edges=torch.ones(2, 2, 37, 37)),
        bad(
            "exclude each other",
            edges=torch.ones(2, 2, 37, 37, dtype=torch.bool),
            tiles=Tiles(torch.zeros(2, 2, 5, 1, dtype=torch.int64), 8),
        ),
        bad("got lists for 4", tiles=Tiles(torch.zeros(2, 2, 4, 1, dtype=torch.int64), 8)),
        bad(r"B = 2 and H of 1, 2 or 2, got \(2, 3", tiles=Tiles(torch.zeros(2, 3, 5, 1, dtype=torch.int64), 8)),
        bad("tiles 0 to 4, or -1 for none, got 0 to 5", tiles=Tiles(torch.arange(6).expand(2, 2, 5, 6), 8)),
        bad("ascending, without duplicates", tiles=Tiles(torch.zeros(2, 2, 5, 2, dtype=torch.int64), 8)),
        bad("every -1 at its end", tiles=Tiles(torch.tensor([-1, 2]).expand(2, 2, 5, 2), 8)),
        bad(
            "lengths of tiles differ",
            tiles=Tiles(torch.tensor([2, -1]).expand(2, 2, 5, 2), 8, lengths=torch.full((2, 2, 5), 2).int()),
        ),
    ],
)
def test_bad_input(changes, match):
    case = Case()
    arguments = dict(zip(("query", "key", "value"), case.inputs, strict=True)) | case.options | changes
    with pytest.raises(ValueError, match=match):
        entmax_attention(**arguments)


@pytest.mark.parametrize("rows", [torch.tensor([37]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.0])])
def test_bad_rows(rows):
    case = Case()
    with pytest.raises(ValueError, match="rows must be"):
        support(*case.inputs[:2], alpha=1.5, scaling=0.3, causal=True, rows=rows)
