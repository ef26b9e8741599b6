"""Copy an adapter with equal heads, for benchmarks that need as many KV slots in every head."""

import json
import shutil
from pathlib import Path
from typing import Any


def with_equal_heads(adapter: Path, folder: Path, **settings: Any) -> Path:
    """Copy an adapter into a new folder, without its measurements, and change its settings.

    Args:
        adapter: folder of a SparseK adapter.
        folder: where the copy is made; must not be there yet.
        settings: fields of adapter_config.json beside `head_shares`, which becomes null.

    Returns:
        The folder.
    """
    shutil.copytree(
        adapter, folder, ignore=lambda _, names: [name for name in names if not name.startswith("adapter_")]
    )
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | settings | {"head_shares": None}), "utf-8")
    return folder
