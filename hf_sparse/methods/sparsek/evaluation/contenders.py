"""Which keys a patched model attends to, for as long as something is measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.methods.sparsek.baselines import BASELINES, Oracle
from hf_sparse.patches import sparse_layers_in_use

#: What attends: the base model, the baselines at equal slots, and the trained scorers.
SELECTIONS = ("dense", *BASELINES, "learned")

#: Those that can generate: all but the one that must see the whole text first.
GENERATING = tuple(name for name in SELECTIONS if not isinstance(BASELINES.get(name), Oracle))

#: What attends in both directions, where the nearest keys of a query are those of a wider window.
ENCODER_SELECTIONS = ("dense", "window", "random", "learned")

_BASELINE_OF = {"window": "recency"}


def selections_of(model: nn.Module) -> tuple[str, ...]:
    """The selections that can be compared in a patched model, dense attention and the scorers included.

    Raises:
        ValueError: a model that is not patched.
    """
    return SELECTIONS if patched_layers(model)[0].causal else ENCODER_SELECTIONS


@contextmanager
def selection(model: nn.Module, name: str) -> Iterator[None]:
    """Let `name` choose the keys within a `with` block, whatever happens in it.

    Args:
        model: a patched model.
        name: one of `selections_of(model)`. `"dense"` switches sparse attention off, LoRA included; `"learned"` is the
            scorers; any other name is a baseline with as many slots, see `hf_sparse.methods.sparsek.baselines`. It has
            the LoRA of the adapter too: only the selection differs. `"recency"` is called `"window"` where attention
            has both directions.

    Raises:
        ValueError: another name, or a model that is not patched.
    """
    methods, known = patched_layers(model), selections_of(model)
    if name not in known:
        raise ValueError(f"selection must be one of {', '.join(known)}, got {name!r}")
    before = [(method, method.policy, method.disable_adapters) for method in methods]
    try:
        for method in methods:
            method.policy = BASELINES.get(_BASELINE_OF.get(name, name))
            method.switch(name != "dense")
        yield
    finally:
        for method, policy, disabled in before:
            method.policy = policy
            method.switch(not disabled)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`eval` mode, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def patched_layers(model: nn.Module) -> list[SparseKAttention]:
    """What `sparse_layers_in_use` returns, of which there must be some.

    Raises:
        ValueError: a model that is not patched.
    """
    methods = sparse_layers_in_use(model, SparseKAttention)
    if not methods and (others := sparse_layers_in_use(model)):
        raise ValueError(
            f"this is about the slots of SparseK attention, and the model has {others[0].label} attention, without any"
        )
    if not methods:
        raise ValueError(
            f"expected a model with sparse attention, got a {type(model).__name__} without; "
            "use hf_sparse.patch, peft.get_peft_model or hf_sparse.from_pretrained first"
        )
    return methods


def check_selections(names: Sequence[str], known: Sequence[str]) -> None:
    """See that selections are known, and at least one.

    Raises:
        ValueError: they are not.
    """
    if not names or not set(names) <= set(known):
        raise ValueError(f"selections must be among {', '.join(known)}, got {list(names)}")
