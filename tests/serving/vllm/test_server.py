"""`hf-sparse serve` over loopback: 20 clients read their answers token by token at the same time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ADAPTER = Path(__file__).parents[3] / "model_cards" / "demo-llama-sparsek-64"


@pytest.fixture
def server(tmp_path):
    """The address of a server that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", port, "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", 2048]
    options += ["--max-num-seqs", 8, "--max-num-batched-tokens", 256, "--enforce-eager"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "hf_sparse", "serve", ADAPTER, *options]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-6000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        log.close()


def read(address, request):
    """The tokens of one answer, and how many pieces it came in."""
    body = {
        "model": ADAPTER.name,
        "prompt": request["prompt"],
        "max_tokens": len(request["tokens"]),
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    call = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    tokens, pieces = [], 0
    with urllib.request.urlopen(call, timeout=300) as answer:
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                (choice,) = json.loads(data)["choices"]
                tokens += choice.get("token_ids") or []
                pieces += 1
    return tokens, pieces


def test_20_streaming_clients(server, requests):
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(lambda request: read(server, request), requests))
    assert len(answers) == 200
    for request, (tokens, _) in zip(requests, answers, strict=True):
        assert tokens == request["tokens"]
    # As tokens come; where a machine is slow, vLLM sends those together that came meanwhile.
    assert sum(pieces for _, pieces in answers) > 2 * len(answers)
