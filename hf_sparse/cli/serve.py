"""Run vLLM's server for an adapter: `hf-sparse serve`."""

import typer

from hf_sparse.cli.common import Adapter, load_workflow


def serve(context: typer.Context, adapter: Adapter) -> None:
    """Serve an adapter, or a folder of `export`, with vLLM. Further options are those of `vllm serve`."""
    load_workflow()
    from hf_sparse.serving.export import server_command, start

    start(server_command(adapter, context.args))
