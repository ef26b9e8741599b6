"""An engine in few lines: a patched Llama of transformers, run on packed tokens with the states in a pool."""

from dataclasses import dataclass, field

import pytest
import torch

from hf_sparse.core.prompt_chunks import Chunk
from hf_sparse.serving.pool import Batch, RowPool


@dataclass
class Request:
    """A prompt, what was computed of it, and what was generated."""

    prompt: list[int]
    tokens: int
    computed: int = 0
    row: int | None = None
    output: list[int] = field(default_factory=list)


class Engine:
    """Decodes greedily: every forward takes one token of each request that decodes, and pieces of prompts."""

    def __init__(self, model, rows, most_tokens):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        self.rotate = apply_rotary_pos_emb
        self.model, self.most_tokens = model, most_tokens
        attentions = [layer.self_attn.sparse_attention for layer in model.model.layers]
        head_dim = model.model.layers[0].self_attn.head_dim
        self.pool = RowPool(attentions, head_dim, rows, model.dtype, model.device)
        self.waiting, self.running = [], []
        self.kinds = set()  # (steps, pieces of prompts) of the forwards

    @torch.no_grad()
    def forward(self, tokens, positions, batch):
        hidden = self.model.model.embed_tokens(torch.tensor(tokens, device=self.model.device))
        places = torch.tensor(positions, device=hidden.device)[None]
        cos, sin = (x[0] for x in self.model.model.rotary_emb(hidden, places))
        for number, layer in enumerate(self.model.model.layers):
            module, states = layer.self_attn, layer.input_layernorm(hidden)
            query, key, value = (
                projection(states).view(len(tokens), -1, module.head_dim)
                for projection in (module.q_proj, module.k_proj, module.v_proj)
            )
            query, key = self.rotate(query, key, cos, sin, unsqueeze_dim=1)
            attended = self.pool.attend(number, batch, query, key, value, states, module.scaling)
            hidden = hidden + module.o_proj(attended.flatten(1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.model.model.norm(hidden))

    def step(self):
        while self.waiting and self.pool.free_rows:
            request = self.waiting.pop(0)
            request.row = self.pool.take()
            self.running.append(request)
        decoding = [r for r in self.running if r.output][: self.most_tokens]
        tokens = [r.output[-1] for r in decoding]
        positions = [len(r.prompt) + len(r.output) - 1 for r in decoding]
        last = list(range(len(decoding)))
        reading, chunks = [], []
        for request in self.running:
            count = min(len(request.prompt) - request.computed, self.most_tokens - len(tokens))
            if request.output or count < 1:
                continue
            begin = len(tokens)
            tokens += request.prompt[request.computed : request.computed + count]
            positions += range(request.computed, request.computed + count)
            chunks.append(Chunk(begin, begin + count, before=request.computed))
            request.computed += count
            reading.append(request)
            last.append(len(tokens) - 1)
        rows = torch.tensor([r.row for r in (*decoding, *reading)], device=self.model.device)
        self.kinds.add((len(decoding), len(reading)))
        logits = self.forward(tokens, positions, Batch(rows, len(decoding), tuple(chunks)))
        for request, place in zip((*decoding, *reading), last, strict=True):
            if request.computed == len(request.prompt):
                request.output.append(int(logits[place].argmax()))
            if len(request.output) == request.tokens:
                self.end(request)

    def end(self, request):
        self.running.remove(request)
        self.pool.free(request.row)

    def run(self, requests):
        self.waiting += requests
        while self.waiting or self.running:
            self.step()


@pytest.fixture
def engine():
    return Engine


@pytest.fixture
def request_of():
    return Request
