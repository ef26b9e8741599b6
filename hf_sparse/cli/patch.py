"""Write an untrained adapter: `hf-sparse patch`."""

from dataclasses import fields
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from hf_sparse.cli.common import Dtype, Output, load_workflow, say_written
from hf_sparse.cli.methods import METHODS, options_of
from hf_sparse.cli.options import option, with_options
from hf_sparse.methods import DEFAULT

_SETTINGS = options_of(lambda method: [method.adapter])
_METHOD = option(
    "method",
    Literal[tuple(METHODS)],
    DEFAULT,
    " ".join(f"{method.name}: {method.summary}." for method in METHODS.values()),
)
_MAKING = [
    option("seed", int, 0, "Seed of the first weights of what is learned."),
    option("dtype", Dtype, "auto", "Dtype of the base model while it is patched. auto: as stored."),
    option("force", bool, False, "Write into a DIR that is not empty.", "--force"),
]


@with_options(choice=[_METHOD], settings=_SETTINGS.parameters, making=_MAKING)
def patch(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder; `demo` is the bundled checkpoint.")],
    output: Output,
    choice: dict[str, str],
    settings: dict[str, Any],
    making: dict[str, Any],
) -> None:
    """Write an untrained adapter for a base model."""
    method = METHODS[choice["method"]]
    checked = method.adapter(**_SETTINGS.given(context, method.name))
    workflow = load_workflow()
    from hf_sparse.core.registry import registered_methods

    config = registered_methods()[method.peft_type].config(
        **{field.name: getattr(checked, field.name) for field in fields(checked)}
    )
    trainable, total = workflow.create_adapter(model, config, output, **making).get_nb_trainable_parameters()
    console = Console()
    console.print(
        f"{trainable:,} trainable parameters of {total:,} ({trainable / total:.3%}); {checked.attended()}",
        soft_wrap=True,
    )
    say_written(console, output, "untrained adapter")
