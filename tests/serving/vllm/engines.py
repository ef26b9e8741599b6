"""Engines that the tests start in processes of their own: each function serves requests and returns what came out."""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any


def make(data: dict[str, Any]) -> Any:
    """An engine on the exported model; what the settings leave open is as a test on a CPU wants it."""
    from vllm import LLM

    settings = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "enable_prefix_caching": False}
    return LLM(data["model"], **{**settings, **data["settings"]})


def sampling(data: dict[str, Any], **options: Any) -> Any:
    """Greedy sampling."""
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": data["tokens"], "ignore_eos": True, **options})


def resident_bytes() -> int:
    """Memory of this process, without what was freed and the allocator still holds: 11 MiB more or less at a time."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def outputs(engine: Any, prompts: list[list[int]], parameters: Any) -> list[Any]:
    """Return what an engine makes of prompts, all handed over at once."""
    return engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)


def poison(core: Any) -> int:
    """Fill the memory of all states with NaN and numbers below 0, and count its bytes."""
    pages = memory_of_states(core)
    for page in pages:
        page.fill_(-1)
    return sum(page.nbytes for page in pages)


def memory_of_states(core: Any) -> list[Any]:
    """Return the tensors that hold the states of all requests, each once."""
    layers = core.vllm_config.compilation_config.static_forward_context.values()
    return list({page.data_ptr(): page for layer in layers for page in layer.pages}.values())


def everything(data: dict[str, Any]) -> dict[str, Any]:
    """All requests at once, some that are given up in the middle, and the first ones again."""
    engine = make(data)
    prompts = [request["prompt"] for request in data["requests"]]
    core = engine.llm_engine
    poisoned = poison(core)
    rows = core.vllm_config.cache_config.num_gpu_blocks
    first = [list(o.outputs[0].token_ids) for o in outputs(engine, prompts, sampling(data))]
    memory = resident_bytes()
    # Given up while their prompts are read, and while they decode; no text before began as these do.
    for number, prompt in enumerate(prompts[1:3]):
        core.add_request(f"abandoned-{number}", {"prompt_token_ids": prompt[::-1]}, sampling(data))
    for _ in range(2):
        core.step()
    read = [request.num_computed_tokens for request in core.engine_core.engine_core.scheduler.requests.values()]
    core.abort_request([f"abandoned-{number}" for number in range(2)])
    left = core.has_unfinished_requests()
    again = outputs(engine, prompts[:40], sampling(data))
    return {
        "tokens": first,
        "again": [list(output.outputs[0].token_ids) for output in again],
        "cached": [output.num_cached_tokens for output in again],
        "rows": rows,
        "poisoned": poisoned,
        "read": read,
        "left": left,
        "growth": resident_bytes() - memory,
    }


def lasting(data: dict[str, Any]) -> dict[str, Any]:
    """All requests again and again: memory of the process and the pool after each time, and whether tokens stay."""
    engine = make(data)
    prompts = [request["prompt"] for request in data["requests"]]
    memory, of_states, wrong = [], [], 0
    for _ in range(2000 // len(prompts)):
        tokens = [list(output.outputs[0].token_ids) for output in outputs(engine, prompts, sampling(data))]
        wrong += sum(ours != request["tokens"] for ours, request in zip(tokens, data["requests"], strict=True))
        memory.append(resident_bytes())
        of_states.append(sum(page.nbytes for page in memory_of_states(engine.llm_engine)))
    pool = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    taken = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    return {"memory": memory, "pool": of_states, "wrong": wrong, "taken": taken}


def greedy(data: dict[str, Any]) -> dict[str, Any]:
    """All requests at once."""
    engine = make(data)
    prompts = [request["prompt"] for request in data["requests"]]
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs(engine, prompts, sampling(data))]}


def sampled(data: dict[str, Any]) -> dict[str, Any]:
    """Stop strings, logprobs, and two samples of one prompt, as users ask for them."""
    engine = make(data)
    prompt = [data["requests"][5]["prompt"]]
    text = outputs(engine, prompt, sampling(data))[0].outputs[0].text
    stopped = outputs(engine, prompt, sampling(data, stop=[text[6:9]]))[0].outputs[0]
    logprobs = outputs(engine, prompt, sampling(data, logprobs=2))[0].outputs[0].logprobs
    both = outputs(engine, prompt, sampling(data, n=2, temperature=1.0, seed=3))[0].outputs
    return {
        "text": text,
        "stop": text[6:9],
        "stopped": stopped.text,
        "logprobs": [max(step.values(), key=lambda x: x.logprob).logprob for step in logprobs],
        "best": [max(step, key=lambda token: step[token].logprob) for step in logprobs],
        "samples": [list(output.token_ids) for output in both],
    }


def refused(data: dict[str, Any]) -> dict[str, Any]:
    """The error of an engine that cannot be made."""
    try:
        make(data)
    except Exception as error:
        return {"error": str(error)}
    return {"error": None}


if __name__ == "__main__":
    name, source, target = sys.argv[1:]
    functions = {function.__name__: function for function in (everything, lasting, greedy, sampled, refused)}
    result = functions[name](json.loads(Path(source).read_text()))
    Path(target).write_text(json.dumps(result))
