"""Replace products of one input, in the graph of a compiled step, by one call of `hf_sparse.ops.products`.

This is a pass of inductor (`torch._inductor.custom_graph_pass`) over a graph without side effects, in which a linear
layer is `mm` or `addmm` of the input, two-dimensional, and the transposed weight. Weights that are computed in the
graph, as quantised ones are, are left alone. Gradients, if any, have been derived before.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from hf_sparse.ops import products as module
from hf_sparse.ops.products import MOST_WEIGHTS, begin_products, is_faster

_ATEN = torch.ops.aten
_SHAPED = (_ATEN.view.default, _ATEN.reshape.default)
_TURNED = ((_ATEN.permute.default, ([1, 0],)), (_ATEN.t.default, ()))


class ShareProducts(CustomGraphPass):
    """Join the products of a graph that are faster together.

    Args:
        is_worth_it: tells so from the input, the weights and the biases, which are fake tensors.
    """

    def __init__(self, is_worth_it: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], bool] = is_faster) -> None:
        self.is_worth_it = is_worth_it

    def __call__(self, graph: fx.Graph) -> None:
        groups: dict[Hashable, list[_Product]] = {}
        for node in graph.nodes:
            if product := _product(node):
                kind = (_unshaped(product.x), product.x.meta["val"].shape, product.bias is None)
                groups.setdefault(kind, []).append(product)
        for group in groups.values():
            for begin in range(0, len(group), MOST_WEIGHTS):
                some = group[begin : begin + MOST_WEIGHTS]
                nodes = (some[0].x, [p.weight for p in some], [p.bias for p in some if p.bias is not None])
                tensors: Any = fx.map_arg(nodes, lambda node: node.meta["val"])
                if self.is_worth_it(*tensors):
                    begin_products(*tensors)  # while torch compiles the rest of the graph
                    _share(graph, nodes, [p.node for p in some])

    def uuid(self) -> Any:
        """Return what torch's caches of compiled code tell passes apart by: the text of this one and of its rule."""
        rule = f"{self.is_worth_it.__module__}.{self.is_worth_it.__qualname__}"
        return get_hash_for_files((__file__, module.__file__), rule)


SHARE_PRODUCTS = ShareProducts()  # one object: torch compiles anew for another one


class _Product(NamedTuple):
    """Hold a product `node` and what it multiplies, all nodes of a graph."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def _product(node: fx.Node) -> _Product | None:
    """Return what a node multiplies; `None` if it is no product with a weight and a bias that the graph is given."""
    if node.target not in (_ATEN.mm.default, _ATEN.addmm.default) or node.kwargs:
        return None
    arguments: Any = node.args
    *biases, x, turned = arguments
    if (turned.target, turned.args[1:]) not in _TURNED:
        return None
    weight, bias = turned.args[0], biases[0] if biases else None
    if any(one is not None and one.op not in ("placeholder", "get_attr") for one in (weight, bias)):
        return None
    if bias is not None and bias.meta["val"].shape != node.meta["val"].shape[1:]:
        return None
    return _Product(node, x, weight, bias)


def _unshaped(node: Any) -> fx.Node:
    """Return the tensor that a node is a view of by shape alone."""
    return _unshaped(node.args[0]) if node.target in _SHAPED else node


def _share(graph: fx.Graph, arguments: tuple[Any, ...], nodes: list[fx.Node]) -> None:
    """Put one call in the place of the nodes, before the first of them: all its arguments are there."""
    with graph.inserting_before(nodes[0]):
        call = graph.call_function(torch.ops.hf_sparse.products.default, arguments)
        call.meta["val"] = [node.meta["val"] for node in nodes]
        for place, node in enumerate(nodes):
            item = graph.call_function(operator.getitem, (call, place))
            item.meta.update(node.meta)
            node.replace_all_uses_with(item)
    for node in nodes:
        graph.erase_node(node)
