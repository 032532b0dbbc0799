"""Log-likelihoods however they are computed: those of a full pass for each request, without cache or company."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ctllm_jax import sharding
from ctllm_jax.evaluation import score_plan
from ctllm_jax.evaluation.score_plan import Packed, Shared, collect_inputs, find_groups, padded, plan
from ctllm_jax.evaluation.scoring import Scorer, split_places
from ctllm_jax.model.decoder import Decoder
from ctllm_jax.model.parameters import decoder_parameters
from tests.inference.models import full_logps, make_model

WINDOW = 128
IDS = 300
DEBUG = (f"model.context_length={WINDOW}", f"model.vocab_size={IDS}")


def draw_requests(seed=0):
    """What benchmarks ask: examples before many questions, four texts behind one, single documents, too long ones."""
    rng = np.random.default_rng(seed)

    def ids(low, high=None):
        return rng.integers(0, IDS, low if high is None else int(rng.integers(low, high))).tolist()

    requests = []
    for _ in range(2):
        examples = ids(64)
        for _ in range(14):
            question = examples + ids(3, 30)
            requests += [(question, [choice]) for choice in (3, 4, 5, 6)]
        question = examples + ids(20)
        requests += [(question, ids(1, 8)) for _ in range(4)]
    for _ in range(3):
        context = ids(70, 100)
        requests += [(context, ids(2, 12)) for _ in range(4)]
    requests += [(ids(1, 60), ids(1, 60)) for _ in range(6)]
    requests += [(ids(150), ids(3)), (ids(90), ids(90)), (ids(1), ids(WINDOW)), (requests[0][0][:40], ids(2))]
    # As many tokens as the window and one more than it has, and a document scored from its first token.
    requests += [(ids(WINDOW - 3), ids(4)), (ids(WINDOW - 3), ids(3)), (ids(1), ids(30))]
    return requests


def plain_scores(model, requests):
    """(log p, is greedy) of each request, by one pass for each input."""
    passes, found = {}, []
    for context, continuation in requests:
        row = (context + continuation)[-(WINDOW + 1):]
        if tuple(row[:-1]) not in passes:
            passes[tuple(row[:-1])] = full_logps(model, row[:-1])
        logps = passes[tuple(row[:-1])][len(row) - 1 - len(continuation):]
        found.append((sum(logps[place, token] for place, token in enumerate(continuation)),
                      all(logps[place].argmax() == token for place, token in enumerate(continuation))))
    return found


def few(requests):
    """Some that take one batch behind a prefix and one without: places of `requests`."""
    return [*range(60), 142, 143]


@pytest.fixture(scope="module")
def model():
    return make_model(*DEBUG)


@pytest.fixture(scope="module")
def requests(model):
    requests = draw_requests()
    # What greedy decoding writes is there too, or `is_greedy` would be false throughout.
    for context, _ in requests[::17]:
        row = context[-60:]
        for _ in range(3):
            row = [*row, int(full_logps(model, row)[-1].argmax())]
        requests.append((row[:-3], row[-3:]))
    return requests


@pytest.fixture(scope="module")
def expected(model, requests):
    found = plain_scores(model, requests)
    assert {greedy for _, greedy in found} == {True, False}
    return found


def as_model(decoder, params, mesh=None):
    return SimpleNamespace(decoder=decoder, params=params, mesh=mesh)


def assert_scores(scores, expected):
    np.testing.assert_allclose([score.logp for score in scores], [logp for logp, _ in expected], atol=1e-4, rtol=1e-6)
    assert [score.is_greedy for score in scores] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("options", [{"batch_tokens": 2048}, {"share": False, "batch_tokens": 2048}],
                         ids=["shared", "each by itself"])
def test_scores_are_those_of_plain_passes(model, requests, expected, options):
    scorer = Scorer(as_model(*model), **options)
    told = {}
    scores = scorer.score(requests, report=lambda new: told.update(new))
    assert_scores(scores, expected)
    assert told == dict(enumerate(scores))
    plain = sum(len(context) + len(continuation) for context, continuation in requests)
    assert scorer.counts["inputs"] < scorer.counts["requests"] == len(requests)
    assert scorer.counts["tokens"] < plain / (4.5 if options.get("share", True) else 2)


def test_a_sliding_window_holds_behind_prefixes_too(requests):
    model = make_model(*DEBUG, "model.sliding_window=19")
    some = [requests[place] for place in few(requests)]
    batches = list(plan(collect_inputs(some, max_length=WINDOW), batch_tokens=2048))
    assert [type(batch) for batch in batches] == [Shared, Packed]
    assert_scores(Scorer(as_model(*model), batch_tokens=2048).score(some), plain_scores(model, some))


@pytest.mark.parametrize("sizes", [pytest.param({"data": 8}, marks=pytest.mark.slow),
                                   {"fsdp": 2, "tensor": 2, "data": 2}], ids=str)
def test_eight_devices_say_what_one_says(model, requests, expected, sizes):
    decoder, params = model
    mesh = sharding.make_mesh(sizes)
    placed = jax.device_put(params, sharding.param_shardings(decoder_parameters(decoder.config), mesh))
    swiglu = sharding.swiglu_on(None, implementation="auto", recompute=False)
    scorer = Scorer(as_model(decoder.clone(swiglu=swiglu), placed, mesh), batch_tokens=2048)
    some = few(requests)
    assert_scores(scorer.score([requests[place] for place in some]), [expected[place] for place in some])


def test_bfloat16_is_near(model, requests, expected):
    decoder, params = model
    scores = Scorer(as_model(Decoder(decoder.config, dtype=jax.numpy.bfloat16), params), batch_tokens=2048).score(
        requests[:60])
    assert len(scores) == 60
    differences = np.asarray([score.logp - logp for score, (logp, _) in zip(scores, expected, strict=False)])
    assert 1e-5 < np.abs(differences).max() < 0.5, "in float32 after all, or wrong"


def test_an_empty_continuation_is_certain(model):
    assert Scorer(as_model(*model)).score([([1, 2], [])]) == [(0.0, True)]
    assert Scorer(as_model(*model)).score([]) == []


@pytest.mark.parametrize(("request_", "message"), [
    (([], [1]), "request 0: the context is empty"),
    (([1], [2] * (WINDOW + 1)), f"continuation of {WINDOW + 1} tokens is longer than the {WINDOW}")])
def test_what_cannot_be_scored_is_refused(model, request_, message):
    with pytest.raises(ValueError, match=message):
        Scorer(as_model(*model)).score([request_])


def test_choices_of_a_question_are_one_input_and_examples_one_prefix():
    examples = list(range(60))
    requests = [(examples + [100 + question, 7], [choice]) for question in range(40) for choice in range(4)]
    inputs = collect_inputs(requests, max_length=WINDOW)
    assert len(inputs) == 40 and all(len(each.continuations) == 4 for each in inputs)
    groups, single = find_groups(inputs)
    assert [group.length for group in groups] == [60] and not single
    batch, = plan(inputs, batch_tokens=1024)
    assert batch.prefix.shape == (1, 64) and int((batch.ends > 0).sum()) == 80


def test_an_accidental_word_makes_no_group_of_its_own():
    examples = list(range(60))
    # All questions of the first kind begin with two equal tokens: a prefix for them would cost 62 to save 40.
    requests = [(examples + [200, 201, 10 + place], [1]) for place in range(20)]
    requests += [(examples + [100 + place, 7, 8], [1]) for place in range(20)]
    groups, single = find_groups(collect_inputs(requests, max_length=WINDOW))
    assert [(group.length, len(group.inputs)) for group in groups] == [(60, 40)] and not single


def test_two_questions_do_not_pay_for_a_prefix():
    requests = [([1] * 50 + [2], [3]), ([1] * 50 + [4], [3])]
    assert find_groups(collect_inputs(requests, max_length=WINDOW))[0] == []


def test_a_prefix_ends_before_what_is_scored():
    context = list(range(100))
    requests = [(context[:40], context[40:90] + [last]) for last in range(110, 130)]
    groups, _ = find_groups(collect_inputs(requests, max_length=WINDOW))
    # All inputs are one; what is scored begins at the last token of the context.
    assert not groups
    requests = [(context[:60], [last, last + 1, 5]) for last in range(110, 130)]
    group, = find_groups(collect_inputs(requests, max_length=WINDOW))[0]
    assert group.length == 59


@pytest.mark.parametrize("lengths", [[5, 40, 33, 31, 1, 1, 64, 20], [32] * 7, [1], list(range(1, 90))])
def test_rows_hold_every_item_once_and_are_full_before_there_is_another(lengths):
    rows = score_plan.fill_rows(lengths, size=90)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in row) for row in rows]
    assert max(sums) <= 90 and len(rows) <= -(-sum(lengths) // 90) + 1


def test_lengths_are_few_and_close():
    sizes = {padded(length) for length in range(1, 8193)}
    assert len(sizes) <= 16
    assert all(length <= padded(length) <= max(32, 2 * length) for length in range(1, 8193))
    assert all(padded(length) <= 1.5 * length for length in range(257, 8193))


def test_every_place_and_target_stands_once():
    rng = np.random.default_rng(1)
    places, targets = rng.integers(0, 40, 500).astype(np.int32), rng.integers(0, 9, 500).astype(np.int32)
    found = np.full((500, 2), -1)
    for order, places_U, targets_UC in split_places(places, targets, vocabulary=2**20):
        is_there = targets_UC >= 0
        rows = np.broadcast_to(places_U[:, None], targets_UC.shape)
        found[order] = np.stack([rows[is_there], targets_UC[is_there]], axis=1)
    assert np.array_equal(found, np.stack([places, targets], axis=1))
