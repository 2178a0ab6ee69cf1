"""Generation: the cache against reading the whole text again, and a graph's view of it against the cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.data.shards import BytesTokenizer
from stages.model.generation import Reader, generate, nucleus, stream
from stages.model.hub import build_student, build_teacher
from stages.model.layers import GraphLayerCache

VOCAB = BytesTokenizer.vocab_size
KINDS = ("teacher", "student")


def decided_model(settings, kind):
    build = build_teacher if kind == "teacher" else build_student
    model = build(getattr(settings, kind), VOCAB, 64, seed=1).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # far from uniform, so that rounding cannot decide
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_with_a_cache_writes_what_generation_without_one_writes(tiny_settings, kind, temperature):
    model, prompt = decided_model(tiny_settings, kind), [5, 9, 250, 31]
    cached, plain = (generate(model, prompt, 12, cache, temperature, seed=4) for cache in (True, False))
    assert cached == plain and len(cached) == 12
    assert generate(model, prompt, 12, temperature=temperature, seed=4) == cached


def test_generation_stops_before_the_end_of_text(tiny_settings):
    model = decided_model(tiny_settings, "student")
    first = generate(model, [5, 9], 1)
    assert generate(model, [5, 9], 8, end_of_text=first[0]) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [], 3)


def test_a_stream_gives_each_token_before_the_next_is_computed(tiny_settings):
    model, computed = decided_model(tiny_settings, "student"), []
    tokens = stream(model, [5, 9], 8, before_each=lambda: computed.append(1))
    first = [next(tokens), next(tokens)]
    assert len(computed) == 2 and first == generate(model, [5, 9], 2)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_nucleus_is_the_fewest_likeliest_tokens_of_that_probability(weights, top_p):
    share_V = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    kept_V = nucleus(share_V, top_p)
    inside = kept_V > 0
    assert torch.equal(kept_V[inside], share_V[inside])
    assert kept_V.sum() >= top_p - 1e-9
    assert kept_V.sum() - kept_V[inside].min() < top_p + 1e-9, "without its last token it is too little"
    assert inside.all() or share_V[~inside].max() <= kept_V[inside].min()


def test_a_nucleus_of_one_token_is_greedy(tiny_settings):
    model = decided_model(tiny_settings, "student")
    assert generate(model, [5, 9], 8, temperature=1.0, top_p=1e-6) == generate(model, [5, 9], 8)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_graphs_cache_of_unchanging_shapes_gives_the_logits_of_one_that_grows(tiny_settings, kind):
    model = decided_model(tiny_settings, kind)
    tokens_BT = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    growing, still = model.new_cache(2, 12), model.new_cache(2, 12)
    for layer in still:
        for buffer in layer.buffers:
            buffer.fill_(1e3)  # what stands behind the text must not be seen
    model(tokens_BT[:, :5], growing), model(tokens_BT[:, :5], still)
    for position in range(5, 9):
        length = torch.tensor(position)
        seen_S = torch.arange(12) <= length
        layers = [GraphLayerCache(layer, length, seen_S) for layer in still]
        token_B1 = tokens_BT[:, position : position + 1]
        torch.testing.assert_close(model(token_B1, layers), model(token_B1, growing), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_reader_goes_on_from_where_it_forgot_and_refuses_more_than_it_has_room_for(tiny_settings):
    reader = Reader(decided_model(tiny_settings, "teacher"), 1, 5)
    prompt_1T, token_11 = torch.tensor([[5, 9, 31]]), torch.tensor([[7]])
    reader.read(prompt_1T)
    first_1V = reader.read(token_11)
    reader.forget(1)
    assert torch.equal(reader.read(token_11), first_1V)
    reader.read(token_11)
    with pytest.raises(ValueError, match="holds 5 tokens; 6 were fed"):
        reader.read(token_11)


@torch.no_grad()
def test_one_of_two_threads_reads_single_tokens_and_both_a_prompt(tiny_settings):
    model, before, seen = decided_model(tiny_settings, "student"), torch.get_num_threads(), []
    model.head.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    reader = Reader(model, 1, 5)
    torch.set_num_threads(2)
    try:
        for tokens in ([[5, 9, 31]], [[7]], [[7]]):
            reader.read(torch.tensor(tokens))
        assert seen == [2, 1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
