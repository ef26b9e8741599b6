"""Share prompts of many lengths among the tests with vLLM, and what `generate` makes of them, computed once.

They run in an environment of their own (`make serving`), and nowhere else: the folder is left out without vLLM. Several
engines are started one after another, each in a process of its own, since an engine keeps its memory.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

ROOT = Path(__file__).parents[3]
ADAPTER = ROOT / "model_cards" / "demo-llama-sparsek-64"
TOKENS = 16
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or all engines take the same core
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def requests(tmp_path_factory) -> list[dict]:
    """200 prompts of 10 to 1,500 tokens, most of them short, and the greedy tokens that `generate` adds to each."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all processes: the first one that needs the answers computes them
    path = folder / "requests.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_text(json.dumps(answered()))
    return json.loads(path.read_text())


def answered() -> list[dict]:
    """Return the prompts, and what `generate` adds to them."""
    import torch

    import hf_sparse

    model = hf_sparse.from_pretrained(ADAPTER, dtype=torch.float32)
    generator = random.Random(5)
    drawn = [int(10 * 150 ** generator.random()) for _ in range(196)]
    result = []
    for length in [10, 1500, *drawn, 64, 65]:
        prompt = [generator.randrange(4, 4096) for _ in range(length)]
        with torch.no_grad():
            ids = model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
            )
        result.append({"prompt": prompt, "tokens": ids[0, length:].tolist()})
    return result


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """The folder that vLLM opens."""
    from hf_sparse.serving.export import export

    folder = tmp_path_factory.mktemp("vllm") / "model"
    export(ADAPTER, folder)
    return folder


@pytest.fixture
def run_model(tmp_path):
    """Runs one of the functions of `engines.py` in a process of its own, and returns what it found."""

    def run(name: str, model: Path, requests: list[dict], **settings):
        tokens = len(requests[0]["tokens"])
        (tmp_path / "input.json").write_text(
            json.dumps({"model": str(model), "requests": requests, "tokens": tokens, "settings": settings})
        )
        command = [sys.executable, str(Path(__file__).with_name("engines.py")), name]
        completed = subprocess.run(
            [*command, str(tmp_path / "input.json"), str(tmp_path / "output.json")],
            env={**os.environ, **SETTINGS},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert completed.returncode == 0, completed.stdout[-4000:] + completed.stderr[-8000:]
        return json.loads((tmp_path / "output.json").read_text())

    return run


@pytest.fixture
def run_engine(run_model, exported, requests):
    """Does so with the bundled model."""
    return lambda name, **settings: run_model(name, exported, requests, **settings)
