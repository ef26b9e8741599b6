"""Let vLLM decode after prompts that it never read: its own connector for such benchmarks, for some of the requests."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

WHOLE = "whole"  # what the names of requests begin with whose prompts are read


class ReadElsewhere(DecodeBenchConnector):
    """Claim all of a prompt but its last token as read by another engine.

    Nothing is loaded: `serving_vllm.py` has filled the memory.
    """

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if request.request_id.startswith(WHOLE):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def start_load_kv(self, forward_context: Any, **options: Any) -> None:
        pass
