"""The engine against a full forward pass at every position, whatever else runs beside it; and its slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax import sharding
from ctllm_jax.inference import cache, schedule
from ctllm_jax.inference.engine import Engine
from ctllm_jax.inference.request import MOST_STOP_IDS, Request
from ctllm_jax.model.parameters import decoder_parameters
from tests.inference.models import full_logps, make_model

LENGTH = 256
SLOTS = 3


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def engine(model):
    return Engine(*model, slots=SLOTS, max_length=LENGTH, steps=4)


def ids(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(0, 250, length).tolist())


def ask(prompt, max_tokens=10, **options):
    return Request(prompt=prompt, max_tokens=max_tokens, **options)


def drain(engine):
    """{request: (tokens, finish, prompt tokens)} of all that is in it."""
    said = {}
    while engine.busy:
        for event in engine.step():
            tokens, _, prompt = said.get(event.request, ((), None, None))
            said[event.request] = (tokens + event.tokens, event.finish, event.prompt or prompt)
    return said


def tokens_of(engine, *requests):
    return [[token.id for token in tokens] for tokens, _, _ in engine.run(requests)]


def assert_as_full_forward(model, request, tokens, prompt=None):
    """Drawn tokens', likeliest tokens' and the prompt's log-probabilities at every position, to 1e-4."""
    whole = [*request.prompt, *(token.id for token in tokens)]
    logps_SV = full_logps(model, whole)
    places = [(len(request.prompt) + n, token) for n, token in enumerate(tokens)]
    if prompt is not None:
        assert [token.id for token in prompt] == list(request.prompt) and prompt[0].logp is None
        places += list(enumerate(prompt))[1:]
    for place, token in places:
        wanted_V = logps_SV[place - 1]
        assert token.logp == pytest.approx(wanted_V[token.id], abs=1e-4)
        assert len(token.told) == request.told
        likeliest = np.sort(wanted_V)[::-1][:request.told]
        np.testing.assert_allclose([logp for _, logp in token.told], likeliest, atol=1e-4)
        np.testing.assert_allclose([wanted_V[each] for each, _ in token.told], likeliest, atol=1e-4)


MIXED = [  # more than slots: each is used again; prompts in one part and in several, with and without a common prefix
    ask(ids(5), 30, told=3), ask(ids(150, 1), 40, temperature=1.0, seed=3, told=20), ask(ids(1, 2), 60, told=1),
    ask(ids(33, 3), 5, temperature=0.7, top_p=0.8, top_k=20, told=2), ask(ids(200, 1), 20, told=2),
    ask(ids(150, 1), 9, told=2, score_prompt=True), ask(ids(32, 4), 100, temperature=1.3, min_p=0.1, seed=9, told=1),
    ask(ids(256, 5), 0, told=5, score_prompt=True), ask(ids(250, 5), 6, told=2), ask(ids(129, 6), 127, told=1)]


@pytest.mark.parametrize("overrides", [
    pytest.param([], id="plain"),
    pytest.param(["model.sliding_window=24", "model.num_kv_heads=1", "model.qkv_bias=true",
                  "model.tie_embeddings=true"], id="window", marks=pytest.mark.slow)])
def test_every_position_is_that_of_a_full_forward_pass(overrides):
    """In a mixed batch, after slots were used again, behind prefixes that were taken over."""
    model = make_model(*overrides)
    engine = Engine(*model, slots=SLOTS, max_length=LENGTH, steps=4)
    numbers = [engine.submit(request) for request in MIXED]
    said = drain(engine)
    assert sorted(said) == numbers and engine.counts["reused_tokens"] >= 149
    for request, number in zip(MIXED, numbers, strict=True):
        tokens, finish, prompt = said[number]
        assert finish == "length" and len(tokens) == request.max_tokens
        assert_as_full_forward(model, request, tokens, prompt)
        if request.temperature == 0:
            assert all(token.id == token.told[0][0] for token in tokens)


def test_a_request_is_the_same_whatever_runs_beside_it(model, engine):
    """Alone in an engine of one slot; beside others, in another slot, at another time."""
    request = ask(ids(20, 7), 50, temperature=1.0, top_p=0.9, seed=5, told=1)
    single = Engine(*model, slots=1, max_length=LENGTH, steps=1)
    single.submit(request)
    (alone, _, _), = drain(single).values()
    for others in ([], [MIXED[0]], MIXED[:4], [MIXED[9], MIXED[9]]):
        for other in others:
            engine.submit(other)
        number = engine.submit(request)
        among = drain(engine)[number][0]
        assert [token.id for token in among] == [token.id for token in alone]
        np.testing.assert_allclose([token.logp for token in among], [token.logp for token in alone], atol=1e-5)


def test_seeds_and_rows_decide(engine):
    """All 64 bits of a seed count: -1 and 2**63 - 1 have their lower 32 bits in common."""
    asked = [dict(seed=1), dict(seed=1), dict(seed=2), dict(seed=1, row=1), dict(seed=2**32 - 1, row=2**32 - 1),
             dict(seed=-1), dict(seed=2**63 - 1), dict(seed=2**32 - 1), dict(seed=2**32 + 1), dict(seed=-2**63)]
    texts = tokens_of(engine, *(ask(ids(6), temperature=1.0, **each) for each in asked))
    assert texts[0] == texts[1] and len({tuple(text) for text in texts}) == 9


def test_a_prompt_that_is_there_is_not_read_again(model, engine):
    """Its own, a longer one with the same beginning, one while the first still runs; and many at once wait for one."""
    base = ids(100, 8)
    first, = tokens_of(engine, ask(base))
    assert engine.counts["prefill_tokens"] == 100
    again, = tokens_of(engine, ask(base))
    assert again == first and engine.counts["reused_tokens"] == 99 and engine.counts["prefill_tokens"] == 101
    more = (*base, *first, 7, 9)
    engine.submit(ask(more, 60))
    engine.step()
    assert engine.counts["reused_tokens"] == 99 + 109
    beside = engine.submit(ask((*more[:105], 3), told=1))
    tokens, _, _ = drain(engine)[beside]
    assert_as_full_forward(model, ask((*more[:105], 3), told=1), tokens)
    fresh = Engine(*model, slots=SLOTS, max_length=LENGTH)
    assert len(set(map(tuple, tokens_of(fresh, *[ask(ids(80, 9))] * 7)))) == 1
    assert fresh.counts["prefill_tokens"] == 80 + 6


def test_a_free_slot_is_taken_at_once(engine):
    """Three run, two wait; the short one's slot goes to the next in the same step in which it is free."""
    long = [engine.submit(ask(ids(4, n), 100)) for n in range(2)]
    short, waits, last = (engine.submit(ask(ids(4, n), 2)) for n in (3, 4, 5))
    ended = [event.request for event in engine.step() if event.finish]
    assert ended == [short] and engine.waiting == 2 and engine.running == 2
    assert [event.request for event in engine.step() if event.finish] == [waits]
    assert [event.request for event in engine.step() if event.finish] == [last]
    assert sorted(drain(engine)) == long and engine.running == engine.waiting == 0


def test_cancelled_anywhere_it_is_gone_and_the_others_are_not(engine):
    numbers = [engine.submit(ask(ids(40, n), 30)) for n in range(6)]
    engine.step()
    engine.cancel(numbers[0])
    engine.cancel(numbers[5])
    ended = {event.request: event.finish for event in engine.step() if event.finish}
    assert ended == {numbers[0]: "cancelled", numbers[5]: "cancelled"}
    said = drain(engine)
    assert sorted(said) == numbers[1:5] and all(finish == "length" for _, finish, _ in said.values())
    assert [token.id for token in said[numbers[4]][0]] == tokens_of(engine, ask(ids(40, 4), 30))[0]
    engine.cancel(numbers[1])
    assert not engine.busy and engine.step() == [] and engine.counts["cancelled"] == 2


def test_stop_ids_end_a_row_in_the_middle_of_a_step(engine):
    free, = tokens_of(engine, ask(ids(9), 20))
    for place in (0, 2, 4, 7):
        stop = free[place]
        tokens, _, finish = next(engine.run([ask(ids(9), 20, stop_ids=(251, stop))]))
        assert [token.id for token in tokens] == free[:free.index(stop)] and finish == "stop"


def test_a_penalty_counts_prompt_and_text(engine):
    """Strong enough, no token comes twice, nor one of the prompt; in a slot that others left their marks in."""
    tokens_of(engine, *[ask(ids(9, n), 20, repetition_penalty=2.0) for n in range(6)])
    prompt = ids(140, 3)
    text, = tokens_of(engine, ask(prompt, 60, repetition_penalty=100.0))
    assert len({*text}) == 60 and not {*text} & {*prompt}


def test_programs_are_few(model):
    """Prompts of all lengths, alone and together: two programs a size of part and span, one a span to draw."""
    counted = cache.prefill._cache_size, cache.decode._cache_size
    before = [count() for count in counted]
    engine = Engine(*model, slots=5, max_length=LENGTH, steps=3)
    rng = np.random.default_rng(0)
    for _ in range(3):
        for length in rng.integers(1, LENGTH - 30, 25):
            engine.submit(ask(ids(int(length), int(length)), int(rng.integers(1, 30))))
        drain(engine)
    prefills, decodes = (count() - known for count, known in zip(counted, before, strict=True))
    # Parts of 32 and of 128 tokens, spans of 128 and of 256.
    assert 0 < prefills <= 2 * 4 and decodes == len(schedule.spans(LENGTH)) == 2


@pytest.mark.parametrize("split", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_on_a_mesh_it_says_the_same(model, split):
    """Weights and cache split over 8 devices: heads over one axis, slots over the two others."""
    decoder, params = model
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.param_shardings(decoder_parameters(decoder.config), mesh))
    requests = [ask(ids(40, n), 20, temperature=float(n % 2), seed=n, told=1) for n in range(6)]
    alone = list(Engine(*model, slots=4, max_length=128).run(requests))
    engine = Engine(decoder, placed, slots=4, max_length=128, mesh=mesh, split=split)
    part = (1, decoder.config.num_kv_heads // 2, 128, decoder.config.head_dim)
    for ours, other in zip(engine.run(requests), alone, strict=True):
        assert [token.id for token in ours[0]] == [token.id for token in other[0]]
        np.testing.assert_allclose([token.logp for token in ours[0]], [token.logp for token in other[0]], atol=1e-4)
        assert {shard.data.shape for shard in engine._cache.keys[0].addressable_shards} == {part}


def test_bfloat16_is_kept_in_bfloat16(model):
    decoder, params = model
    engine = Engine(decoder.clone(dtype=jnp.bfloat16), params, slots=2, max_length=128)
    request = ask(ids(30), told=1)
    tokens = next(engine.run([request]))[0]
    assert engine._cache.keys[0].dtype == jnp.bfloat16
    logps_SV = full_logps(model, [*request.prompt, *(token.id for token in tokens)])
    assert np.mean([abs(token.logp - logps_SV[29 + n, token.id]) for n, token in enumerate(tokens)]) < 0.2


def test_a_reset_forgets_what_runs_and_serves_what_waits(engine):
    text, = tokens_of(engine, ask(ids(40)))
    numbers = [engine.submit(ask(ids(40, n))) for n in range(5)]
    engine.step()
    assert engine.reset() == numbers[:SLOTS] and engine.waiting == 2
    assert sorted(drain(engine)) == numbers[SLOTS:]
    assert tokens_of(engine, ask(ids(40))) == [text]
    # Where nothing ran, one of those that wait is at fault: all are forgotten.
    numbers = [engine.submit(ask(ids(40, n))) for n in range(2)]
    assert engine.reset() == numbers and not engine.busy


def test_an_error_in_one_slot_ends_one_request(model, engine, monkeypatch, caplog):
    asked = [ask(ids(9, n), 20) for n in range(SLOTS)]
    alone = tokens_of(engine, *asked)
    numbers = [engine.submit(each) for each in asked]
    read = engine._read

    def break_second(slot, drawn, *, fed):
        if slot.job.number == numbers[1] and slot.job.drawn:
            raise OverflowError("too large")
        return read(slot, drawn, fed=fed)

    monkeypatch.setattr(engine, "_read", break_second)
    said = drain(engine)
    assert [said[number][1] for number in numbers] == ["length", "error", "length"] and "too large" in caplog.text
    for number, tokens in zip(numbers, alone, strict=True):
        if number != numbers[1]:
            assert [token.id for token in said[number][0]] == tokens
    monkeypatch.undo()
    assert tokens_of(engine, *asked) == alone and engine.running == 0


NUMBERS = [("max_tokens", 2**31), ("temperature", 101.0), ("temperature", float("nan")), ("temperature", float("inf")),
           ("top_k", 2**31), ("top_p", float("nan")), ("min_p", float("nan")), ("repetition_penalty", 1e-300),
           ("repetition_penalty", 1e300), ("repetition_penalty", float("nan")), ("seed", 2**64), ("row", -1),
           ("row", 2**32), ("told", -1), ("stop_ids", (2**31,))]


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_numbers_that_the_engine_cannot_hold_are_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is out of range"):
        ask((1, 2), **{"max_tokens": 3, name: value})


def test_numbers_at_their_bounds_are_drawn_with(engine):
    """Every extreme that is allowed gives ids of the vocabulary: nothing overflows, or is rounded to a zero."""
    extremes = [dict(temperature=1e-300), dict(temperature=1e-38), dict(temperature=1e-5), dict(temperature=100.0),
                dict(temperature=1.0, top_k=2**31 - 1), dict(temperature=1.0, top_p=1e-300),
                dict(temperature=1.0, min_p=1e-300), dict(temperature=1.0, min_p=1 - 1e-16),
                dict(temperature=1.0, repetition_penalty=0.01), dict(temperature=1.0, repetition_penalty=100.0)]
    texts = tokens_of(engine, *(ask(ids(6), 5, **each) for each in extremes))
    assert all(0 <= token < 250 for text in texts for token in text)
    greedy, = tokens_of(engine, ask(ids(6), 5))
    assert texts[0] == texts[1] == texts[5] == greedy


def test_who_stops_listening_leaves_no_one_behind(engine):
    listening = engine.run([ask(ids(4, n), 50) for n in range(5)])
    next(listening)
    listening.close()
    engine.step()
    assert not engine.busy and engine.running == 0


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt": ()}, "prompt: needs at least one token"), ({"prompt": (250,)}, "ids must be from 0 to 249"),
    ({"prompt": (-1,)}, "ids must be from 0 to 249"), ({"max_tokens": 0}, "only makes sense with score_prompt"),
    ({"prompt": (1,) * 100, "max_tokens": 157}, "longer than 256 together"), ({"stop": ("x",)}, "need a tokenizer"),
    ({"temperature": -1.0}, "temperature=-1.0 is out of range"), ({"top_p": 0.0}, "top_p=0.0 is out of range"),
    ({"top_k": 0}, "top_k=0 is out"), ({"min_p": 1.0}, "min_p=1.0 is out"), ({"told": 21}, "told=21 is out"),
    ({"stop_ids": tuple(range(MOST_STOP_IDS + 1))}, "stop_ids=")])
def test_what_cannot_be_asked(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**{"prompt": (1, 2), "max_tokens": 3, **options}))
    assert not engine.busy


@pytest.mark.parity
def test_greedy_text_is_that_of_transformers(model):
    import torch

    from tests.model.llama import make_llama

    decoder, params = model
    llama = make_llama(decoder.config, params)
    prompts = [ids(length, length) for length in (1, 17, 60, 130)]
    engine = Engine(*model, slots=SLOTS, max_length=LENGTH)
    for prompt, ours in zip(prompts, tokens_of(engine, *(ask(prompt, 50) for prompt in prompts)), strict=True):
        theirs = llama.generate(torch.tensor([prompt]), attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                                max_new_tokens=50, do_sample=False, pad_token_id=0, eos_token_id=None,
                                suppress_tokens=list(range(250, 256)))
        assert ours == theirs[0, len(prompt):].tolist()
