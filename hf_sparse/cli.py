"""The command line. Each verb is a few lines around a function of `hf_sparse.workflow`, `hub` or `demo`."""

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _Group(TyperGroup):
    """Turns what can go wrong in ordinary use into one line and exit code 1; with `--debug` the traceback shows."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.params["debug"]:
            with _without_secrets():
                return super().invoke(ctx)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # for those who program against the libraries
                return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("interrupted; files are as they were")
            raise typer.Exit(130) from None
        except Exception as error:
            if not _is_expected(error):
                _scrub(error)
                raise
            _complain(f"[red]error:[/red] {escape(_line(error))}")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they may hold a token
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `hf-sparse`."""
    app(prog_name="hf-sparse")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-sparse {version('hf-sparse')}")
        raise typer.Exit()


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Learned sparse attention for pretrained transformers: patch a checkpoint, train what is small, push it."""
    verb = context.invoked_subcommand
    if verb != "finetune" and "LOCAL_RANK" in os.environ:  # otherwise nobody waits for torch to be imported
        from hf_sparse.environment import launched_processes

        if (count := launched_processes()) > 1:
            raise ValueError(
                f"{count} processes were launched, each of which would do all of `hf-sparse {verb}`: run it without a "
                "launcher, `hf-sparse finetune` alone shares its work"
            )


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of an adapter, made by `hf-sparse patch`.")]
Texts = Annotated[list[Path] | None, typer.Option("--text", metavar="FILE", help="UTF-8 text; may be repeated.")]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens per chunk, more than the slots; by default 2048, of Sparsefinder what --sparsity is meant for, or "
        "the model's context if shorter."
    ),
]
Chunks = Annotated[str | None, typer.Option(metavar="START:STOP", help="Only these chunks of the text.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Whether chunks of a decoder begin with the BOS token; by default as its tokenizer begins a text.",
    ),
]
OnDevice = Annotated[Device, typer.Option(help="auto: CUDA where there is a GPU.")]
OfDtype = Annotated[
    Dtype, typer.Option(help="Of the base model. auto: bfloat16 on CUDA if it is stored so, else float32.")
]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected whole numbers such as 0,1, got {text!r}") from None


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers such as 0.5,0.8, got {text!r}") from None


# Where the options of one method are listed; one that is given with the other method is an error.
_PANELS = {"sparsek": "Options of SparseK", "sparsefinder": "Options of Sparsefinder"}


def _k(help: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PANELS["sparsek"], **options)


def _graph(help: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PANELS["sparsefinder"], **options)


def _was_given(context: typer.Context, name: str) -> bool:
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def _only_with(context: typer.Context, what: str, *names: str) -> None:
    """Of options that are about something that is not there, none must have been given."""
    for option in context.command.params:
        if option.name in names and _was_given(context, option.name):
            raise typer.BadParameter(f"{option.opts[0]} has no effect without {what}")


def _settings(context: typer.Context, method: str) -> dict[str, Any]:
    """Values of the options of a method by name; those of the others must not have been given."""
    found = {}
    for option in context.command.params:
        name, panel = option.name or "", getattr(option, "rich_help_panel", None)
        if panel == _PANELS[method]:
            found[name] = context.params[name]
        elif panel in _PANELS.values() and _was_given(context, name):
            raise typer.BadParameter(f"{option.opts[0]} is no option of {method}: see {panel!r} in --help")
    return found


@app.command()
def patch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder; `demo` is the bundled checkpoint.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the adapter goes.")],
    context: typer.Context,
    method: Annotated[
        Literal["sparsek", "sparsefinder"],
        typer.Option(help="sparsek: a fixed number of keys. sparsefinder: entmax over a predicted graph."),
    ] = "sparsek",
    window: Annotated[
        int, typer.Option(help="Most recent keys, in an encoder the nearest on both sides, always attended.")
    ] = 64,
    layers: Annotated[
        Any, typer.Option(metavar="0,1,...", parser=_numbers, help="Layers to patch; all by default.")
    ] = None,
    lora_rank: Annotated[
        int, typer.Option(help="Rank of LoRA on queries, keys, values and output of the patched layers; 0: none.")
    ] = 0,
    lora_alpha: Annotated[
        float | None, typer.Option(help="LoRA is multiplied by this over its rank; by default twice the rank.")
    ] = None,
    k: Annotated[
        int, _k("Keys kept per KV head: the best-scored of those that are older, or in an encoder of all.", "--k")
    ] = 188,
    sinks: Annotated[int, _k("First keys, always attended.")] = 4,
    scorer: Annotated[Literal["linear", "mlp"], _k("What scores the keys.")] = "linear",
    position_slope: Annotated[float, _k("Added to a score per token of position.")] = 0.0,
    learn_slope: Annotated[bool, _k("Every head learns a slope of its own; not in an encoder.")] = True,
    support: Annotated[int, _k("In training, gates spread over SUPPORT * k keys at most; 0 is no bound.")] = 4,
    alpha: Annotated[float, _graph("Of entmax, above 1 (softmax) and at most 2 (sparsemax).")] = 1.5,
    learn_alpha: Annotated[bool, _graph("Every query head learns its alpha, starting there.")] = False,
    initial_scale: Annotated[float, _graph("Where the learned logit scale of every query head starts.")] = 0.3,
    predictor: Annotated[
        Literal["clustering", "quantization", "distance", "bound", "full"],
        _graph("What joins a query and a key. bound: exact, by the extremes of tiles. full: all keys."),
    ] = "clustering",
    rank: Annotated[int, _graph("Dimensions to which queries and keys are projected.")] = 4,
    shared_projection: Annotated[bool, _graph("One projection for the queries and keys of a KV head.")] = False,
    clusters: Annotated[int, _graph("Clusters per KV head.")] = 16,
    top_clusters: Annotated[int, _graph("Clusters that a query or key is in.")] = 2,
    cluster_parts: Annotated[int, _graph("Parts of points that have clusters of their own: finer, slower.")] = 1,
    balanced: Annotated[bool, _graph("Clusters of equal size, for encoders.")] = False,
    bin_kind: Annotated[
        Literal["shared", "fixed"], _graph("shared: fitted boundaries. fixed: by rank, for encoders.")
    ] = "shared",
    bins: Annotated[int, _graph("Shared bins per dimension.")] = 16,
    bin_width: Annotated[int, _graph("Tokens per fixed bin.")] = 16,
    threshold: Annotated[float, _graph("Squared distance below which tokens are joined; with --tile 0.")] = 1.0,
    tile: Annotated[int, _graph("Keys per tile: a power of 2 up to 128; 0 joins single tokens that match.")] = 64,
    query_tile: Annotated[
        int | None, _graph("Queries per tile, up to --tile, which is the default. 1 fits a causal model best.")
    ] = None,
    sparsity: Annotated[float, _graph("Share of the pairs of tiles that is left out.")] = 0.8,
    length: Annotated[int, _graph("Tokens of the causal text that --sparsity is meant for.")] = 1024,
    tiles_per_query: Annotated[int | None, _graph("Key tiles per query tile, in place of --sparsity.")] = None,
    global_tokens: Annotated[int, _graph("First keys, always attended.")] = 1,
    profile: Annotated[bool, _graph("Weigh tiles by how the attention of a head falls off with distance.")] = True,
    head_budgets: Annotated[bool, _graph("Divide the tiles among heads and layers by what they miss.")] = False,
    complete: Annotated[bool, _graph("Add the tiles that may be missing, which makes it exact.")] = False,
    per_group: Annotated[bool, _graph("One graph for the query heads that share a KV head.")] = False,
    seed: Annotated[int, typer.Option(help="Of the first weights of what is learned.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model while it is patched. auto: as stored.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Write into a DIR that is not empty.")] = False,
) -> None:
    """Write an untrained adapter for a base model."""
    settings = _settings(context, method)
    workflow = _workflow()
    from hf_sparse import SparsefinderConfig, SparseKConfig

    config: Any
    shared: dict[str, Any] = {"window": window, "layers": layers, "lora_rank": lora_rank, "lora_alpha": lora_alpha}
    if method == "sparsek":
        config = SparseKConfig(**shared, **settings | {"support": support or None})
        attends = f"{config.slots} keys per query and KV head: {sinks} sinks, window {window}, {k} selected"
    else:
        config = SparsefinderConfig(**shared, **settings | {"tile": tile or None})
        attends = f"{predictor}, {f'tiles of {tile}' if tile else 'single tokens'}, window {window}"
    trainable, total = workflow.create_adapter(
        model, config, output, seed=seed, dtype=dtype, force=force
    ).get_nb_trainable_parameters()
    console = Console()
    console.print(
        f"{trainable:,} trainable parameters of {total:,} ({trainable / total:.3%}); {attends}", soft_wrap=True
    )
    _wrote(console, output, "untrained adapter")


@app.command()
def finetune(
    context: typer.Context,
    folder: Folder,
    text: Texts = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Dataset on the Hub, or a folder or file (.jsonl, ...), instead of --text."),
    ] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Configuration of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Part of the dataset, such as train[:1%].")] = "train",
    column: Annotated[str, typer.Option(help="Column of the dataset that holds the text.")] = "text",
    steps: Annotated[int, typer.Option(help="Optimiser steps of the objective.")] = 300,
    objective: Annotated[
        Literal["distill", "attention", "lm", "graph"],
        typer.Option(
            help="distill: stay close to dense attention. lm: predict tokens. attention (SparseK): regress its mass. "
            "graph (Sparsefinder): projections only."
        ),
    ] = "distill",
    warm_start_steps: Annotated[int, _k("Steps of `attention` before the others.")] = 40,
    lora_steps: Annotated[
        int, _k("Steps of LoRA alone after the others, with hard selection; 0 trains it beside the scorers.")
    ] = 0,
    graph_steps: Annotated[int, _graph("Steps of `graph` after the others.")] = 100,
    graph_loss: Annotated[
        Literal["profile_nce", "pair_hinge", "sum_hinge", "mass_hinge", "info_nce"],
        _graph("What the projections are trained with."),
    ] = "profile_nce",
    graph_rows: Annotated[int, _graph("Queries per text and layer that `graph` looks at.")] = 128,
    graph_learning_rate: Annotated[float, _graph("Peak of the schedule of `graph`.")] = 1e-2,
    alpha_start: Annotated[float | None, _graph("Alpha grows from there to its own.")] = None,
    length: Length = None,
    chunks: Chunks = None,
    batch_size: Annotated[int, typer.Option(help="Chunks per step and process.")] = 2,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches per optimiser step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 2e-2,
    lora_learning_rate: Annotated[float, typer.Option(help="That of LoRA, if the adapter has it.")] = 2e-4,
    seed: Annotated[int, typer.Option(help="Of the order of the chunks, and of hidden tokens.")] = 0,
    mixed_precision: Annotated[Literal["no", "bf16"], typer.Option(help="Accelerate's.")] = "no",
    checkpoint_every: Annotated[int, typer.Option(metavar="N", help="Steps between checkpoints; 0: none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in DIR.")] = False,
    bos: Bos = None,
    device: OnDevice = "auto",
    dtype: OfDtype = "auto",
) -> None:
    """Train the adapter in DIR and write it back, with finetune.json."""
    if bool(text) == bool(dataset):
        raise typer.BadParameter("expected either --text FILE or --dataset NAME")
    if not dataset:
        _only_with(context, "--dataset", "dataset_config", "split", "column")
    workflow = _workflow()
    from hf_sparse.environment import is_main_process
    from hf_sparse.finetune import FinetuneConfig
    from hf_sparse.finetune.checkpoint import latest
    from hf_sparse.texts import read_dataset, read_texts

    config = FinetuneConfig(
        objective=objective,
        steps=steps,
        warm_start_steps=warm_start_steps,
        graph_steps=graph_steps,
        graph_loss=graph_loss,
        graph_rows=graph_rows,
        graph_learning_rate=graph_learning_rate,
        alpha_start=alpha_start,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        lora_learning_rate=lora_learning_rate,
        lora_steps=lora_steps,
        seed=seed,
        mixed_precision=mixed_precision,
        output_dir=str(folder),
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    if dataset:
        words = read_dataset(dataset, dataset_config, split, column)
    else:
        words, _ = read_texts(text or [])
    try:
        metrics = workflow.train_adapter(
            folder, words, config, length=length, chunks=chunks, bos=bos, device=device, dtype=dtype
        )
    except KeyboardInterrupt:
        saved = latest(folder)
        how = (
            f"the same command with --resume continues from {saved.name}"
            if saved
            else "with --checkpoint-every N a run can be resumed"
        )
        _complain(f"interrupted; the adapter in {folder} is as it was; {how}")
        raise typer.Exit(130) from None
    if not is_main_process():
        return
    console = Console()
    first, last = metrics["history"][0], metrics["history"][-1]
    console.print(
        f"{last['step']} steps on {metrics['tokens']:,} tokens in {metrics['seconds']:.0f} s; loss of the first step "
        f"{first['loss']:.4f} ({first['stage']}), of the last {last['loss']:.4f} ({last['stage']})",
        soft_wrap=True,
    )
    _wrote(console, folder, "trained adapter and finetune.json")


@app.command()
def divide(
    folder: Folder,
    text: Annotated[list[Path], typer.Option(metavar="FILE", help="Training text, UTF-8; repeat for several.")],
    length: Length = None,
    chunks: Chunks = None,
    batch_size: Annotated[int, typer.Option(help="Chunks at a time.")] = 1,
    bos: Bos = None,
    device: OnDevice = "auto",
    dtype: OfDtype = "auto",
) -> None:
    """Divide the slots of the trained adapter in DIR among its layers, by what each loses; then finetune it again."""
    _workflow()
    from hf_sparse.methods.sparsek.divide import divide_adapter
    from hf_sparse.texts import read_texts

    words, _ = read_texts(text)
    shares = divide_adapter(
        folder, words, length=length, chunks=chunks, batch_size=batch_size, bos=bos, device=device, dtype=dtype
    )
    console = Console()
    listed = ", ".join(f"{layer}: {share:.2f}" for layer, share in enumerate(shares))
    console.print(f"share of the slots by layer: {listed}", soft_wrap=True)
    _wrote(console, folder, "adapter with layer_shares")


@app.command("eval")
def evaluate(
    context: typer.Context,
    folder: Folder,
    text: Texts = None,
    length: Length = None,
    chunks: Annotated[
        str | None,
        typer.Option(
            metavar="START:STOP",
            help="Only these chunks; by default at most 16, of Sparsefinder 4, from all over the text.",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Sliding window: chunks overlap, and the last STRIDE tokens of each count. All by default."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Chunks at a time; by default 1, of SparseK up to 8 if the vocabulary is small.")
    ] = None,
    slots: Annotated[Any, _k("Measure the text at these budgets too.", metavar="N,N,...", parser=_numbers)] = None,
    sparsity: Annotated[
        Any,
        _graph(
            "Measure at these shares of the pairs of tiles left out; 0.5,0.7,0.8,0.9 by default.",
            metavar="S,S,...",
            parser=_shares,
        ),
    ] = None,
    seed: Annotated[int | None, _graph("Of random patterns, and of the rows that are compared; 0 by default.")] = None,
    selection: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only compare this; may be repeated. All by default.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Score a generated task, such as passkey, too; may be repeated."),
    ] = None,
    longbench: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Questions in LongBench's JSON lines; may be repeated."),
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text that hides the needles; generated by default.")
    ] = None,
    task_lengths: Annotated[
        Any,
        typer.Option(
            metavar="N,N,...", parser=_numbers, help="Tokens of the prompts; by default half a chunk and a chunk."
        ),
    ] = None,
    task_samples: Annotated[int, typer.Option(help="Prompts per length and depth.")] = 2,
    task_slots: Annotated[int | None, typer.Option(help="Answer at this budget instead of the adapter's own.")] = None,
    note: Annotated[
        str | None, typer.Option(help="A sentence for the card: what the name of the base model does not tell.")
    ] = None,
    bos: Bos = None,
    device: OnDevice = "auto",
    dtype: OfDtype = "auto",
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the result here too.")] = None,
) -> None:
    """Measure the adapter in DIR against dense attention and baselines of equal size, and write eval.json there.

    Without --text, tasks are added to the eval.json that is there.
    """
    if not (text or task or longbench):
        raise typer.BadParameter("expected --text FILE, --task NAME or --longbench FILE")
    if not text:
        _only_with(context, "--text", "chunks", "stride", "batch_size", "slots", "sparsity", "seed", "bos")
    if not (task or longbench):
        _only_with(context, "--task or --longbench", "haystack", "task_lengths", "task_samples", "task_slots")
    if json and not json.parent.is_dir():
        raise typer.BadParameter(f"--json {json}: {json.parent} is no folder")
    workflow = _workflow()
    from hf_sparse.atomic_files import write_json
    from hf_sparse.data import read_text
    from hf_sparse.evaluation import tables, task_table
    from hf_sparse.evaluation.tasks import Haystack, Suite, read_longbench
    from hf_sparse.texts import read_texts

    words, name = read_texts(text) if text else (None, "")
    suite = None
    if task or longbench:
        suite = Suite(
            tasks=task or (),
            documents={path.stem: read_longbench(path) for path in longbench or ()},
            lengths=task_lengths or (),
            samples=task_samples,
            haystack=Haystack(read_text(haystack), haystack.name) if haystack else None,
            slots=task_slots,
        )
    result = workflow.evaluate_adapter(
        folder,
        words,
        name,
        length=length,
        chunks=chunks,
        batch_size=batch_size,
        selections=selection,
        slots=slots,
        sparsities=sparsity,
        seed=seed,
        stride=stride,
        suite=suite,
        note=note,
        bos=bos,
        device=device,
        dtype=dtype,
    )
    console = Console()
    for view in tables(result) if text else ():
        console.print(view)
    for asked, found in result.get("tasks", {}).items():
        console.print(task_table(asked, found))
    _wrote(console, folder, "eval.json, its figure and README.md")
    if json:
        write_json(json, result)


@app.command()
def report(
    context: typer.Context,
    folder: Folder,
    text: Texts = None,
    length: Length = None,
    chunks: Annotated[
        str | None, typer.Option(metavar="START:STOP", help="Only these chunks of the text; the first 8 by default.")
    ] = None,
    bos: Bos = None,
    device: OnDevice = "auto",
    dtype: OfDtype = "auto",
) -> None:
    """Write report.html and figures/ in DIR from eval.json and finetune.json; of a --text also what is attended to."""
    if not text:
        _only_with(context, "--text", "length", "chunks", "bos")
    _workflow()
    from hf_sparse.adapters.report import write_report
    from hf_sparse.texts import read_texts

    words, name = read_texts(text) if text else (None, "")
    path = write_report(folder, words, name, length=length, chunks=chunks, bos=bos, device=device, dtype=dtype)
    _wrote(Console(), folder, f"{path.name} and figures/")


@app.command()
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, where the adapter was made on a local folder.")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="For the card, such as apache-2.0; by default what the base model's page on the Hub says."),
    ] = None,
) -> None:
    """Publish the adapter in DIR with its card, in one commit. Log in with `hf auth login`, or set HF_TOKEN."""
    _workflow()
    from hf_sparse.hub import push_to_hub

    url = push_to_hub(folder, repo_id, private=private, base_model=base_model, license=license)
    Console().print(f"pushed {escape(str(folder))} to {url}", soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the adapter goes.")] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(help="Training steps; fewer are faster and worse.")] = None,
    seed: Annotated[int, typer.Option(help="Of the scorers' first weights and the order of the text.")] = 0,
) -> None:
    """All of it, offline: patch the bundled checkpoint, train, measure, and write what could be pushed."""
    _workflow()
    from hf_sparse.demo.run import STEPS, run

    run(output, STEPS if steps is None else steps, seed, Console())


def _workflow() -> Any:
    """The functions behind the verbs, with transformers' own bars and notes off the screen."""
    from transformers.utils import logging

    from hf_sparse import workflow

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return workflow


def _is_expected(error: Exception) -> bool:
    """Whether the message alone helps: wrong input, or files, networks and memory that fail."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return False  # typer's business: whoever reads the output has stopped
    if isinstance(error, ValueError | OSError):
        return True
    if "hf_sparse.workflow" not in sys.modules:
        return False  # nothing of ours has run: typer's own exits and usage errors
    from huggingface_hub.errors import EntryNotFoundError, HTTPError
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    from hf_sparse.errors import HfSparseError

    if "DefaultCPUAllocator" in str(error):  # torch has no class for memory of the CPU
        return True
    # safetensors raises its own kind where the disk is full.
    kinds = HfSparseError | HTTPError | EntryNotFoundError | OutOfMemoryError | MemoryError | SafetensorError
    return isinstance(error, kinds)


def _line(error: Exception) -> str:
    from hf_sparse.access_tokens import redact

    return redact(" ".join(str(error).split())) or type(error).__name__


def _scrub(error: Exception) -> None:
    """Take tokens out of an exception that is printed whole; where nothing of ours has run there are none."""
    if "hf_sparse.access_tokens" in sys.modules:
        from hf_sparse.access_tokens import scrub

        scrub(error)


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Take tokens out of an exception on its way to a printed traceback."""
    try:
        yield
    except Exception as error:
        _scrub(error)
        raise


def _complain(message: str) -> None:
    Console(stderr=True).print(message, soft_wrap=True, highlight=False)


def _wrote(console: Console, folder: Path, what: str) -> None:
    console.print(f"{what} in {escape(str(folder))}", soft_wrap=True)
