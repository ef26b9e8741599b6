"""vLLM's engine on the bundled Llama and its adapter: the tokens are those of `generate`."""

import pytest


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 32, "max_num_batched_tokens": 2048},
        {"max_num_seqs": 7, "max_num_batched_tokens": 97, "num_gpu_blocks_override": 6},  # more requests than rows
        {"max_num_seqs": 7, "max_num_batched_tokens": 160, "enable_prefix_caching": True},
    ],
    ids=["large batches", "few rows, small batches", "prefix caching"],
)
def test_200_requests_equal_generate(run_engine, requests, settings):
    result = run_engine("everything", **settings)
    expected = [request["tokens"] for request in requests]
    wrong = [
        f"{len(request['prompt'])} tokens: expected {request['tokens']}, got {tokens}"
        for request, tokens in zip(requests, result["tokens"], strict=True)
        if tokens != request["tokens"]
    ]
    assert not wrong, f"{len(wrong)} of {len(requests)} differ\n" + "\n".join(wrong[:5])
    assert result["again"] == expected[:40]
    assert result["poisoned"] > 0
    if settings["max_num_batched_tokens"] < 512:
        assert 0 < result["read"][0] < len(requests[1]["prompt"]), "nothing was given up in the middle of a prompt"
    assert not result["left"], "requests that were given up are still there"
    if settings.get("enable_prefix_caching"):
        assert any(result["cached"]), "no prefix was found again"
    else:
        assert not any(result["cached"])
    if rows := settings.get("num_gpu_blocks_override"):
        assert result["rows"] == rows
    assert result["growth"] < 64 << 20


@pytest.mark.parametrize("prompts, tokens", [(100, 2), pytest.param(200, 16, marks=pytest.mark.full)])
def test_memory_stays_over_2000_requests(run_model, exported, requests, prompts, tokens):
    """No page stays taken, and the process has no more memory than after the first 1,000 requests."""
    shortest = sorted(requests, key=lambda request: len(request["prompt"]))[:prompts]
    asked = [{**request, "tokens": request["tokens"][:tokens]} for request in shortest]
    result = run_model("lasting", exported, asked, max_num_seqs=32, max_num_batched_tokens=2048)
    memory = result["memory"]
    assert len(memory) * prompts == 2000 and not result["wrong"] and not result["taken"]
    assert memory[-1] - memory[len(memory) // 2 - 1] < 2 << 20, memory
    assert len(set(result["pool"])) == 1 and result["pool"][0] > 0


def test_sampling(run_engine, requests):
    result = run_engine("sampled", max_num_seqs=8)
    assert result["stop"] and result["stop"] not in result["stopped"]
    assert result["text"].startswith(result["stopped"])
    assert result["best"] == requests[5]["tokens"] and all(value <= 0 for value in result["logprobs"])
    first, second = result["samples"]
    assert first != second


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative decoding is not supported with sparse attention",
        ),
        ({"hf_overrides": {"hf_sparse_adapter": None}}, "names no adapter: make a folder with `hf-sparse export`"),
    ],
)
def test_refusals(run_engine, settings, message):
    assert message in run_engine("refused", **settings)["error"]
