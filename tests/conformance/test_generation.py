"""Causal models: what generation asks of a cache works, or ends in one clear error."""

import pytest
import torch

from hf_sparse._compat import cache_of, with_cache

pytestmark = [pytest.mark.versions, pytest.mark.cross("values")]

KIND = "causal"
STEPS = 16  # two tiles, and more than the slots of a budget


def _generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=STEPS, do_sample=False, **options)


def _sample(model, ids, mask, **options):
    """Sampled text, because greedy text of a random model repeats one token: in a layer after local ones the scores of
    a long run are equal but for rounding, and which of two equals is kept is then a matter of the last bit."""
    torch.manual_seed(0)
    options |= {"max_new_tokens": STEPS, "do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, **options)


def test_turns(subject, measure):
    """Text, answer, more text and another answer in one cache: the logits of one forward over all of it."""
    ids, mask = subject.padded("left")
    first = _sample(subject.sparse, ids[:, :40], mask[:, :40])
    longer = torch.cat([first.sequences, ids[:, 40:]], 1)
    mask = torch.cat([mask[:, :40], torch.ones_like(longer[:, 40:])], 1)
    second = _sample(subject.sparse, longer, mask, **with_cache(cache_of(first)))
    mask = torch.cat([mask, torch.ones_like(second.sequences[:, longer.shape[1] :])], 1)
    whole = subject.logits(subject.sparse, second.sequences, mask)
    for turn in (first, second):
        end = turn.sequences.shape[1]
        measure.close(torch.stack(turn.logits, 1), whole[:, end - STEPS - 1 : end - 1])


def _steps(subject, cache, begin, end):
    """Return the logits of single tokens `begin` to `end` of the text after a cache."""
    logits = []
    for i in range(begin, end):
        new, position = subject.ids[:, i : i + 1], torch.full((len(subject.ids), 1), i)
        with torch.no_grad():
            output = subject.sparse(new, position_ids=position, **with_cache(cache), use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, 1)


def test_crop(subject, measure):
    """The last tokens can be taken back until a key is evicted: after that it is refused, or there is no such time."""
    ids = subject.ids  # 11 tokens fit into every budget, and into the local windows of a hybrid model
    expected = subject.logits(subject.sparse, ids)
    _, cache = subject.in_chunks(subject.sparse, torch.cat([ids[:, :7], ids[:, -4:]], 1), [11])
    cache.crop(-4)
    measure.close(_steps(subject, cache, 7, 30), expected[:, 7:30])
    _, cache = subject.in_chunks(subject.sparse, ids, [ids.shape[1]])
    kind = subject.method.registered.layer.cache_layer_type
    if "crop" in subject.method.refusals:
        layer = next(layer for layer in cache.layers if isinstance(layer, kind))
        with measure.refused(*subject.method.refusals["crop"]):
            layer.crop(-1)
    elif not subject.local_layers:
        # transformers refuses for its own sliding windows unless it was told before that a crop will come; with
        # drafts it is told so, see below
        cache.crop(-9)
        begin = ids.shape[1] - 9
        measure.close(_steps(subject, cache, begin, ids.shape[1]), expected[:, begin:])


def test_assisted(subject, measure):
    """A draft model's guesses are taken back while nothing is evicted, after that it is refused."""
    # Often right, often wrong; where the method is refused, the assistant's own cache must be croppable.
    assistant = subject.base if "assisted" in subject.method.refusals else subject.fresh(seed=1)
    _speculate(subject, measure, "assisted", subject.ids[:1], assistant_model=assistant)


def test_lookup(subject, measure):
    """Guesses copied from the prompt, likewise."""
    _speculate(subject, measure, "lookup", subject.ids[:1, :8].repeat(1, 3), prompt_lookup_num_tokens=3)


def _speculate(subject, measure, name, ids, **options):
    """Compare with generation token by token: the model, or one that keeps all keys where the model is refused."""
    model = subject.sparse
    if name in subject.method.refusals:
        with measure.refused(*subject.method.refusals[name]):
            _generate(model, ids, **options)
        model = subject.fresh(**subject.method.whole[0])
    measure.equal(_generate(model, ids, **options), _generate(model, ids))


def test_without_cache(subject, measure):
    """Generation that computes everything anew each step has the same logits, and so has a prefill in chunks."""
    ids, mask = subject.padded("left")
    expected = _sample(subject.sparse, ids, mask)
    for change in ({"use_cache": False}, {"prefill_chunk_size": 16}):
        other = _sample(subject.sparse, ids, mask, **change)
        assert torch.equal(other.sequences, expected.sequences)
        measure.close(torch.stack(other.logits), torch.stack(expected.logits))


def test_static_cache(subject, measure):
    """`cache_implementation="static"`, with buffers of fixed shapes, has the logits of the default cache."""
    ids, mask = subject.padded("left")
    refusals = subject.method.refusals
    if "static cache" in refusals:
        with measure.refused(*refusals["static cache"]):
            _sample(subject.sparse, ids, mask, cache_implementation="static")
        return
    for model in (subject.sparse, subject.fresh(**subject.method.whole[0])):
        expected = _sample(model, ids, mask)
        static = _sample(model, ids, mask, cache_implementation="static")
        assert type(cache_of(static)).__name__ == "StaticCache"
        assert torch.equal(static.sequences, expected.sequences)
        measure.close(torch.stack(static.logits), torch.stack(expected.logits))
    with measure.refused(*refusals["static cache of some layers"]):
        _sample(subject.fresh(layers=[subject.last_layer]), ids, mask, cache_implementation="static")


def test_attention_matrices(subject, measure):
    """There are none."""
    with measure.refused(ValueError, "output_attentions=True is not supported"):
        subject.sparse(subject.ids, output_attentions=True)


@pytest.mark.every_family
def test_packed_sequences(subject, measure):
    """Texts in one row equal each alone; a family that takes them for one text, dense, does so sparse as well."""
    ids, restarts = subject.ids, torch.cat([torch.arange(31), torch.arange(40)]).expand(len(subject.ids), -1)
    texts = slice(31), slice(31, None)
    other = torch.cat([ids[:, :31].flip(1), ids[:, 31:]], 1)
    with torch.no_grad():
        first, second = (subject.base(text, position_ids=restarts, use_cache=False).logits for text in (ids, other))
        if torch.equal(first[:, 31:], second[:, 31:]):
            packed = subject.sparse(ids, position_ids=restarts, use_cache=False).logits
            measure.close(packed, torch.cat([subject.logits(subject.sparse, ids[:, part]) for part in texts], 1))
        else:
            expected = subject.dense(ids, position_ids=restarts, use_cache=False).logits
            whole = subject.fresh(**subject.method.whole[0])
            measure.close(whole(ids, position_ids=restarts, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    "mode",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"dola_layers": "low"},
        {"num_beams": 2, "force_words_ids": [[5]]},
    ],
    ids=["contrastive", "group_beam", "dola", "constrained"],
)
def test_remote_code_modes(subject, measure, mode):
    """Contrastive search and other modes that transformers has moved to code on the Hub: it refuses them itself."""
    with measure.refused(ValueError, "requires `trust_remote_code=True`"):
        _generate(subject.sparse, subject.ids, **mode)


def test_continuous_batching(subject, measure):
    """`generate_batch` pages the keys of a dense model: transformers refuses other implementations."""
    with measure.refused(ValueError, r"hf_sparse\S* is not supported"):
        subject.sparse.generate_batch([row.tolist() for row in subject.ids], max_new_tokens=2)
