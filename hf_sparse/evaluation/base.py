"""Define what is asked of a method so that its models can be measured. All modules beside this one build on it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from hf_sparse.core.checks import is_integer
from hf_sparse.core.method_settings import NoSettings
from hf_sparse.errors import DataError
from hf_sparse.model_kinds import Kind

if TYPE_CHECKING:
    from rich.table import Table

DENSE, LEARNED = "dense", "learned"


class Budget(Protocol):
    """Describe how many keys a query attends to at most. It is hashable, and equal budgets are interchangeable."""

    @property
    def slots(self) -> int:
        """Return the number of keys."""

    @property
    def sizes(self) -> dict[str, int]:
        """Return its entries in eval.json, `slots` among them."""

    def resized(self, slots: int) -> Self:
        """Return a budget of another number of keys, divided in the same way; `ValueError` for too few."""


@dataclass(frozen=True)
class Request:
    """Describe one measurement of one model.

    Attributes:
        kind: what the model is for.
        tokens: `[N, T]` int64.
        labels: `[N, T]` for a masked language model, `None` for others.
        contenders: the names to compare, in the order of the result.
        stride: the last tokens of each chunk that count; `None` is all but the first.
        batch_size: chunks at a time.
        speed_tokens: tokens to decode at most, to measure the speed of a causal language model.
        progress: whether to show a progress bar on stderr.
        settings: the options of the method, an instance of `AbstractEvaluation.settings_type`.
    """

    kind: Kind
    tokens: Tensor
    labels: Tensor | None
    contenders: Sequence[str]
    stride: int | None
    batch_size: int
    speed_tokens: int
    progress: bool
    settings: Any


class AbstractEvaluation(ABC):
    """Say what is asked of a method whose models are measured; a method inherits from the subclass `Evaluation`.

    Attributes:
        name: the name of the method, as in its `hf_sparse.core.registry.Method`.
        settings_type: a frozen dataclass with the options that only this method has, keyword arguments of
            `hf_sparse.evaluation.evaluate`. The `metadata` of its fields have `help` for the command line.
        chunks: the number of chunks of a text that are measured by default, so that it takes minutes.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type] = NoSettings
    chunks: ClassVar[int] = 16

    def length(self, config: Any) -> int:
        """Return the tokens per chunk that an adapter is trained and measured on by default.

        Args:
            config: of the adapter. Where the model has fewer positions, chunks are shorter.
        """
        return 2048

    def batch_size(self, model: nn.Module, length: int) -> int:
        """Return how many chunks of `length` tokens are measured at a time by default."""
        return 1

    def contenders(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of all that can be compared in a patched model, in the order of results."""
        return DENSE, LEARNED

    def generating(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the contenders that can generate, and so answer tasks.

        Raises:
            DataError: models of this method answer no tasks; the message says why.
        """
        return self.contenders(model)

    def check_contenders(self, model: nn.Module, names: Sequence[str]) -> None:
        """Raise `ValueError` for names that are not among the contenders of a model, and for none."""
        check_names(names, self.contenders(model))

    def budget(self, model: nn.Module) -> Budget | None:
        """Return the budget of the active adapter; `None` for a method that has no fixed number of keys."""
        return None

    def budgets(self, model: nn.Module, settings: Any) -> list[Budget | None]:
        """Return the budgets to measure at: that of the active adapter, then those that the options ask for."""
        return [self.budget(model)]

    def at_budget(self, model: nn.Module, budget: Any) -> AbstractContextManager[None]:
        """Give the active adapter a budget within a `with` block."""
        return nullcontext()

    @contextmanager
    def using(self, model: nn.Module, name: str, budget: Any = None) -> Iterator[None]:
        """Let a contender or `"dense"` attend within a `with` block, at the adapter's budget or at the one given.

        Raises:
            ValueError: the name is neither.
        """
        if name not in (known := dict.fromkeys((DENSE, *self.contenders(model)))):
            raise ValueError(f"a contender is one of {', '.join(known)}, got {name!r}")
        with nullcontext() if budget is None else self.at_budget(model, budget), self.attending(model, name):
            yield

    @abstractmethod
    def attending(self, model: nn.Module, name: str) -> AbstractContextManager[None]:
        """Let a contender, whose name was checked, attend within a `with` block."""

    def bookkeeping_bytes(self, cache: Any) -> int:
        """Return the bytes that a filled KV cache holds besides keys and values."""
        return 0

    def check(self, model: nn.Module, request: Request) -> None:
        """Check that a measurement can be made, before it is; the checks of all methods have passed already.

        Raises:
            DataError: chunks that cannot be measured.
            ValueError: options out of range.
        """
        length = request.tokens.shape[1]
        slots = max((budget.slots for budget in self.budgets(model, request.settings) if budget is not None), default=0)
        if length <= slots:
            raise DataError(
                f"nothing is evicted: the budget of {slots} slots covers the whole text of {length} tokens; "
                "use longer chunks or a smaller budget"
            )
        if request.stride is not None and (request.kind != "causal" or not is_integer(request.stride, 1, length - 1)):
            raise ValueError(
                f"stride is for causal language models, 1 to {length - 1} tokens of chunks of {length}; "
                f"got {request.stride!r} for a model of the kind {request.kind!r}"
            )

    @abstractmethod
    def subject(self, model: nn.Module) -> dict[str, Any]:
        """Return the first entries of eval.json, which say what was measured."""

    @abstractmethod
    def measure(self, model: nn.Module, request: Request) -> dict[str, Any]:
        """Return what was measured: the entries of eval.json after `metric`.

        Args:
            model: a patched model in `eval` mode, which comes back as it was.
            request: what to measure, checked.
        """

    def made(self, result: dict[str, Any]) -> bool:
        """Tell whether the content of an eval.json is of this method."""
        return result.get("method") == self.name

    @abstractmethod
    def tables(self, result: dict[str, Any]) -> list["Table"]:
        """Return tables for people of the content of an eval.json; tasks have tables of their own."""


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise `ValueError` for names that are not known, for none, and for a single string in the place of a list."""
    if isinstance(names, str):
        raise ValueError(f"selections must be a list of names, such as [{names!r}], got {names!r}")
    if not names or not set(names) <= set(known):
        raise ValueError(f"selections must be among {', '.join(known)}, got {list(names)}")
