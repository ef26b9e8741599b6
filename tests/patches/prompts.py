"""Let prompts of tiny models be recorded, and compare what they leave with what prompts leave that run.

Tests of recorded prompts take what they need of this file with `runpy`. Prompts are played by the fixture
`played_prompts` (tests/conftest.py); with `disable_compile` they run.
"""

from threading import Thread

import torch
from peft import LoraConfig, get_peft_model

from hf_sparse import SparseKConfig, patch
from hf_sparse._compat import cache_of
from hf_sparse.methods.sparsek import SparseKAttention
from hf_sparse.methods.sparsek.cache import SparseKCacheLayer
from hf_sparse.patches import sparse_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = ("keys", "values", "scores", "positions", "seen", "padded_late", "cumulative_length")
ROOMS = {"rooms", "_grown", "plan"}  # for more tokens, which are there before the first step


def choosing(base, **changes):
    """Patch a model with SparseK, with scorers that choose by what the tokens are."""
    model = patch(base.to(DEVICE), SparseKConfig(**{"k": 6, "window": 8, "sinks": 2} | changes))
    with torch.no_grad():
        for layer in sparse_layers(model, SparseKAttention):
            for parameter in layer.sparsek_scorer.parameters():
                parameter.normal_(generator=torch.Generator(DEVICE).manual_seed(layer.layer))
    return model


def over_lora(base):
    """Patch a model over two adapters of PEFT's LoRA, and return it with the layers that have them."""
    lora = {"target_modules": ["up_proj"], "init_lora_weights": False, "r": 4}
    wrapped = get_peft_model(base.to(DEVICE), LoraConfig(**lora))
    wrapped.add_adapter("other", LoraConfig(**lora))
    for parameter in wrapped.parameters():
        parameter.requires_grad_(False)
    model = choosing(wrapped.get_base_model().eval())
    return model, [block.mlp.up_proj for block in model.model.layers]


def use(model, name, inference_mode=True):
    """Switch to an adapter."""
    for layer in sparse_layers(model):
        layer.set_adapter(name, inference_mode=inference_mode)


def prompt(length=40, rows=1, seed=0):
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def generate(model, ids, **options):
    settings = {"do_sample": False, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, **settings | options)


def both(model, ids=None, **options):
    """Generate twice: in the ordinary way, in which the prompt may be played, and with all that runs."""
    ids = prompt() if ids is None else ids
    return tuple(generate(model, ids, **options, disable_compile=plain) for plain in (False, True))


def check(model, ids=None, **options):
    """Compare the tokens, logits and caches of the two ways, and return the output of the first."""
    found, expected = both(model, ids, **options)
    assert_same(found, expected)
    return found


def warm_up(model, length=40, rows=1, times=3, **options):
    """Let the prompts of a bucket run that run before one is recorded."""
    for seed in range(1, times + 1):
        generate(model, prompt(length, rows, seed), **options)


def runs_as_ever(model, played, length=40, **options):
    """Generate often enough for a recording, and compare with what is generated without any."""
    ids, options = prompt(length), {"max_new_tokens": 4} | options
    for _ in range(4):
        found = generate(model, ids, **options)
    assert not played
    expected = generate(model, ids, **options | {"disable_compile": True})
    assert torch.equal(found.sequences, expected.sequences)


def in_threads(model, length=40, count=4, **options):
    """Generate in several threads, and return what they got, and what the same prompts leave that run."""
    expected = [generate(model, prompt(length, seed=seed), **options, disable_compile=True) for seed in range(count)]
    found = {}

    def work(seed):
        found[seed] = generate(model, prompt(length, seed=seed), **options)

    threads = [Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[seed] for seed in range(count)], expected


def prompts_of(model):
    return sparse_layers(model)[0].model_switch.prompts


def recordings_of(model):
    """Return the recordings of prompts that a model has, by key and length."""
    return prompts_of(model)._memory.recordings


def assert_same(found, expected):
    """Compare tokens, logits, and all that the caches hold."""
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)
    assert_same_layers(cache_of(found).layers, cache_of(expected).layers)


def assert_same_layers(found, expected):
    """Compare slots, or all attributes of other cache layers but the room for more tokens."""
    for mine, theirs in zip(found, expected, strict=True):
        assert type(mine) is type(theirs) and mine.get_seq_length() == theirs.get_seq_length()
        names = SLOTS if isinstance(theirs, SparseKCacheLayer) else vars(theirs).keys() - ROOMS
        for name in names:
            one, other = getattr(mine, name), getattr(theirs, name)
            if isinstance(other, torch.Tensor):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            else:
                assert one == other, name


def refuse_to_record(monkeypatch, module, layer):
    """Let every recording end with the error of a call that a stream refuses; list the attempts."""
    attempts = []

    def fail(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    def refuse(call, *args):
        attempts.append(1)
        with monkeypatch.context() as broken:
            broken.setattr(type(layer), "attend", fail)
            call()

    monkeypatch.setattr(module, "record", refuse)
    return attempts


def new_memory(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data * 1.5


def new_buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def new_dtype(model):
    model.to(torch.float64 if DEVICE == "cpu" else torch.float16)


NEW_TENSORS = [new_memory, new_buffer, new_dtype]


def new_budget(model):
    for layer in sparse_layers(model):
        layer.configs["default"] = SparseKConfig(k=9, window=5, sinks=1)


def new_number(model):
    model.model.norm.variance_epsilon = 0.5


NEW_NUMBERS = [new_budget, new_number]
