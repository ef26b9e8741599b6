"""Replace products, in the graph of a compiled step, by calls of `hf_sparse.ops.products`, which do more at a time.

Products of one input become one call. If that is a gate and what it lets through, as in the MLP of a Llama, the call
computes what is left of both too, and a product that is added to another tensor, as to the residual stream, takes the
sum with it.

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
from hf_sparse.ops.products import KERNELS, MOST_WEIGHTS, begin_product, is_faster

_ATEN = torch.ops.aten
_SHAPED = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)
_TURNED = ((_ATEN.permute.default, ([1, 0],)), (_ATEN.t.default, ()))
_CAST = torch.ops.prims.convert_element_type.default


class ShareProducts(CustomGraphPass):
    """Join the products of a graph that are faster together, each with what follows it.

    Args:
        is_worth_it: tells so from the input, the weights and the biases, which are fake tensors.
    """

    def __init__(self, is_worth_it: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], bool] = is_faster) -> None:
        self.is_worth_it = is_worth_it

    def __call__(self, graph: fx.Graph) -> None:
        groups: dict[Hashable, list[fx.Node]] = {}
        for node in graph.nodes:
            if product := _product(node):
                kind = (_unshaped(product.x), product.x.meta["val"].shape, product.bias is None)
                groups.setdefault(kind, []).append(node)
        for group in groups.values():
            for begin in range(0, len(group), MOST_WEIGHTS):
                # Looked at again: the input of one may be what a call has replaced since.
                some = [product for node in group[begin : begin + MOST_WEIGHTS] if (product := _product(node))]
                nodes = (some[0].x, [p.weight for p in some], [p.bias for p in some if p.bias is not None])
                tensors: Any = fx.map_arg(nodes, lambda node: node.meta["val"])
                if not self.is_worth_it(*tensors):
                    continue
                if not (len(some) == len(group) and (_join_gate(graph, some) or _join_sum(graph, some))):
                    _share(graph, nodes, [p.node for p in some])
        for node in graph.nodes:
            if node.target in KERNELS:  # while torch compiles the rest of the graph
                values: Any = fx.map_arg(node.args, lambda one: one.meta["val"])
                begin_product(node.target, values, values[0].device)

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


def _join_gate(graph: fx.Graph, products: list[_Product]) -> bool:
    """Put one call in the place of two products and `silu(gate) * up`; return False, with nothing changed, if not."""
    if len(products) != 2 or products[0].bias is not None:
        return False
    for gate, up in (products, products[::-1]):
        let_through, end = _in_shape(up.node), _silu(_in_shape(gate.node))
        last = end and _only_user(end)
        if not end or not last or last.target is not _ATEN.mul.Tensor or _only_user(let_through) is not last:
            continue
        if _are_alike(last, end, let_through):
            call = torch.ops.hf_sparse.gated_product.default
            _replace(graph, last, gate.node, call, (gate.x, gate.weight, up.weight))
            return True
    return False


def _join_sum(graph: fx.Graph, products: list[_Product]) -> bool:
    """Put one call in the place of a product and a sum with another tensor; return False, with nothing changed, if not.

    A sum with a number of another type, or of another shape, is another one.
    """
    (product, *more) = products
    result = _in_shape(product.node)
    added = _only_user(result)
    if more or not added or added.target is not _ATEN.add.Tensor or added.kwargs:
        return False
    (addend,) = [one for one in added.args if one is not result] or (None,)
    if not isinstance(addend, fx.Node) or not _are_alike(added, result, addend):
        return False
    with graph.inserting_before(added):
        shape = list(product.node.meta["val"].shape)
        flat = _with_value(graph.call_function(_ATEN.reshape.default, (addend, shape)), product.node)
    arguments = (product.x, product.weight, product.bias, flat)
    _replace(graph, added, product.node, torch.ops.hf_sparse.product_added.default, arguments)
    return True


def _in_shape(node: fx.Node) -> fx.Node:
    """Return the only view of a node that the graph uses, or the node itself."""
    user = _only_user(node)
    return _in_shape(user) if user and user.target in _SHAPED else node


def _silu(node: fx.Node) -> fx.Node | None:
    """Return the only use of a tensor, if that is its `silu`, which inductor has written out in float32."""
    single = _only_user(node)
    if single and single.target is _ATEN.silu.default:
        return single
    if not single or single.target is not _CAST or single.args[1] != torch.float32 or len(single.users) != 2:
        return None
    for negated in single.users:
        power = negated.target is _ATEN.neg.default and _only_user(negated)
        below = power and power.target is _ATEN.exp.default and _only_user(power)
        ratio = below and (below.target, below.args[1:]) == (_ATEN.add.Tensor, (1,)) and _only_user(below)
        if ratio and (ratio.target, ratio.args) == (_ATEN.div.Tensor, (single, below)):
            end = _only_user(ratio)
            return end if end and (end.target, end.args[1]) == (_CAST, node.meta["val"].dtype) else None
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the one node that uses a node, be it as several of its arguments; `None` for none or several nodes."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _are_alike(*nodes: fx.Node) -> bool:
    """Tell whether tensors have one shape and one dtype."""
    return len({(node.meta["val"].shape, node.meta["val"].dtype) for node in nodes}) == 1


def _replace(graph: fx.Graph, last: fx.Node, product: fx.Node, target: Any, arguments: tuple[Any, ...]) -> None:
    """Put a call, whose result has the shape of a product, in the place of the last of the nodes that it stands for."""
    with graph.inserting_before(last):
        call = _with_value(graph.call_function(target, arguments), product)
        shaped = graph.call_function(_ATEN.reshape.default, (call, list(last.meta["val"].shape)))
    shaped.meta.update(last.meta)
    last.replace_all_uses_with(shaped)
    _erase(graph, last)


def _with_value(node: fx.Node, like: fx.Node) -> fx.Node:
    """Return a new node, with the fake tensor of another one."""
    node.meta["val"] = like.meta["val"]
    return node


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a node that nothing uses, and what only it used."""
    if node.op == "call_function" and not node.users:
        inputs = node.all_input_nodes
        graph.erase_node(node)
        for one in inputs:
            _erase(graph, one)
