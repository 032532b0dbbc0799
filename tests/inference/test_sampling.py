"""Drawing tokens, against numpy that sorts and counts one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.inference.request import MOST_TOLD
from ctllm_jax.inference.sampling import Sampling, draw, truncate

VOCABULARY = 12


def sampling(rows, *, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, penalty=1.0, seeds=0, high=0, index=0,
             told=0):
    """The same for all rows, or a value for each."""
    values = (temperature, 0 if top_k is None else top_k, top_p, min_p, penalty, high, seeds, 0, index, told)
    kinds = (np.float32, np.int32, np.float32, np.float32, np.float32, np.uint32, np.uint32, np.uint32, np.int32,
             np.int32)
    return Sampling(*(np.broadcast_to(np.asarray(value, kind), (rows,))
                      for value, kind in zip(values, kinds, strict=True)))


def cut(logits_BV, *, top_k=None, top_p=1.0, min_p=0.0):
    asked = sampling(len(logits_BV), top_k=top_k, top_p=top_p, min_p=min_p)
    return np.asarray(jit_truncate(jnp.asarray(logits_BV), top_k=asked.top_k, top_p=asked.top_p, min_p=asked.min_p))


def take(logits_BV, *, seen=None, **options):
    logits_BV = jnp.asarray(logits_BV, jnp.float32)
    seen_BV = jnp.zeros(logits_BV.shape, bool) if seen is None else jnp.asarray(seen)
    return jax.device_get(jit_draw(logits_BV, sampling(len(logits_BV), **options), seen_BV=seen_BV))


jit_truncate, jit_draw = jax.jit(truncate), jax.jit(draw)


def allowed(logits_V, *, top_k, top_p, min_p=0.0):
    """The set of tokens that may be drawn, and whether that set is beyond doubt in float32."""
    order = np.argsort(-logits_V, kind="stable")
    finite = [token for token in order if np.isfinite(logits_V[token])]
    last = order[min(top_k or VOCABULARY, VOCABULARY) - 1]
    kept = [token for token in finite if logits_V[token] >= logits_V[last]]
    weights = np.exp(logits_V[kept].astype(np.float64) - logits_V[kept].max())
    weights /= weights.sum()
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    inside = [token for token, mass in zip(kept, before, strict=True) if mass < top_p or top_p == 1]
    lowest = logits_V[inside[-1]]
    certain = top_p == 1 or np.abs(before - top_p).min() > 1e-5
    floor = logits_V.max() + (np.log(min_p) if min_p else -np.inf)
    certain &= min_p == 0 or np.abs(logits_V[kept] - floor).min() > 1e-5
    return {token for token in kept if logits_V[token] >= max(lowest, floor)}, certain


logits = st.lists(st.integers(-40, 40).map(lambda tenths: tenths / 10), min_size=VOCABULARY, max_size=VOCABULARY)


@settings(deadline=None, max_examples=200)
@given(logits_V=logits, forbidden=st.sets(st.integers(0, VOCABULARY - 1), max_size=VOCABULARY - 1),
       top_k=st.none() | st.integers(1, VOCABULARY + 3), top_p=st.floats(0.01, 1),
       min_p=st.just(0.0) | st.floats(0.01, 0.99))
def test_what_is_left_is_what_numpy_leaves(logits_V, forbidden, top_k, top_p, min_p):
    """Ties, tokens that are forbidden already (padded rows of the vocabulary) and a k above the vocabulary included."""
    logits_V = np.array(logits_V, np.float32)
    logits_V[list(forbidden)] = -np.inf
    wanted, certain = allowed(logits_V, top_k=top_k, top_p=top_p, min_p=min_p)
    left_V = cut(logits_V[None], top_k=top_k, top_p=top_p, min_p=min_p)[0]
    left = set(np.flatnonzero(np.isfinite(left_V)))
    assert not left & forbidden and np.argmax(logits_V) in left
    if certain:
        assert left == wanted
    np.testing.assert_array_equal(left_V[list(left)], logits_V[list(left)])


@pytest.mark.parametrize(("top_k", "top_p", "min_p", "left"), [
    (None, 1.0, 0, 4), (2, 1.0, 0, 2), (1, 1.0, 0, 1), (None, 0.49, 0, 1), (None, 0.51, 0, 2), (None, 0.9, 0, 3),
    (3, 0.6, 0, 2), (2, 0.62, 0, 1), (None, 1.0, 0.31, 2), (None, 1.0, 0.29, 3), (None, 1.0, 0.61, 1)])
def test_by_hand(top_k, top_p, min_p, left):
    """Probabilities 0.5, 0.3, 0.15, 0.05. Top-p counts what top-k left: of the first two, 0.5 is 0.625."""
    kept = np.isfinite(cut(np.log(np.array([[0.3, 0.5, 0.05, 0.15]], np.float32)), top_k=top_k, top_p=top_p,
                           min_p=min_p))[0]
    assert kept[[1, 0, 3, 2]].tolist() == [True] * left + [False] * (4 - left)


def test_rows_are_cut_each_in_its_own_way():
    logits_BV = np.random.default_rng(0).normal(size=(6, VOCABULARY)).astype(np.float32)
    ways = [{}, {"top_k": 1}, {"top_k": 4}, {"top_p": 0.5}, {"top_p": 0.9, "top_k": 5}, {"min_p": 0.3}]
    together = cut(logits_BV, top_k=[way.get("top_k", 0) for way in ways], top_p=[way.get("top_p", 1) for way in ways],
                   min_p=[way.get("min_p", 0) for way in ways])
    for row, way in enumerate(ways):
        np.testing.assert_array_equal(together[row], cut(logits_BV[row:row + 1], **way)[0])


def test_temperature_zero_takes_the_likeliest():
    """Beside a row that draws, too; and truncation does not matter to it."""
    logits_BV = jax.random.normal(jax.random.key(0), (64, VOCABULARY))
    wanted = np.argmax(np.asarray(logits_BV), axis=-1)
    drawn = take(logits_BV, temperature=0)
    assert drawn.token.dtype == np.int32
    np.testing.assert_array_equal(drawn.token, wanted)
    mixed = take(logits_BV, temperature=[0] * 63 + [1], top_p=0.5)
    np.testing.assert_array_equal(mixed.token[:63], wanted[:63])


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, None, 1.0), (0.5, None, 1.0), (2.0, 3, 1.0), (1.0, None, 0.8)])
@pytest.mark.parametrize("spread", [1, 100])
def test_draws_come_as_often_as_they_should(temperature, top_k, top_p, spread):
    """40,000 draws: each token's share within five standard deviations, and none that is forbidden.

    The four tokens lie in one block of the vocabulary, or in several, with ids that are none between and behind.
    """
    probabilities_V, count = np.array([0.5, 0.25, 0.15, 0.1]), 40_000
    logits_V = np.full(4 * spread + 3, -np.inf, np.float32)
    logits_V[:4 * spread:spread] = np.log(probabilities_V)
    drawn_B = take(np.broadcast_to(logits_V, (count, len(logits_V))), temperature=temperature, top_k=top_k,
                   top_p=top_p, seeds=np.arange(count)).token
    wanted_V = probabilities_V ** (1 / temperature)
    wanted_V[{(None, 1.0): 4, (3, 1.0): 3, (None, 0.8): 3}[top_k, top_p]:] = 0
    wanted_V /= wanted_V.sum()
    assert set(drawn_B % spread) == {0}
    shares_V = np.bincount(drawn_B // spread, minlength=4) / count
    deviation_V = np.sqrt(wanted_V * (1 - wanted_V) / count)
    assert np.all(np.abs(shares_V - wanted_V) <= 5 * deviation_V), (shares_V, wanted_V)


def test_a_row_is_drawn_by_its_own_seed_and_place():
    logits_BV = np.asarray(jax.random.normal(jax.random.key(0), (6, 300)))
    together = take(logits_BV, seeds=np.arange(6), index=3)
    for row in range(6):
        alone = take(logits_BV[row:row + 1], seeds=row, index=3)
        assert alone.token[0] == together.token[row]
    assert not np.array_equal(together.token, take(logits_BV, seeds=np.arange(6), index=4).token)
    assert not np.array_equal(together.token, take(logits_BV, seeds=np.arange(6) + 6, index=3).token)


def test_the_penalty_is_that_of_the_paper():
    """Positive logits are divided, negative ones multiplied; log-probabilities stay the model's own."""
    logits_V = np.array([2.0, 1.9, -1.0, -1.05], np.float32)
    assert take([logits_V], temperature=0, penalty=1.1, seen=[[1, 0, 0, 0]]).token[0] == 1
    assert take([logits_V], temperature=0, penalty=1.04, seen=[[1, 0, 0, 0]]).token[0] == 0
    assert take([logits_V[2:]], temperature=0, penalty=1.1, seen=[[1, 0]]).token[0] == 1
    drawn = take([logits_V], temperature=0, penalty=1.5, seen=[[1, 0, 0, 0]])
    np.testing.assert_allclose(drawn.logp, 1.9 - np.log(np.exp(logits_V).sum()), rtol=1e-6)


def test_log_probabilities_are_those_of_the_whole_vocabulary():
    logits_BV = np.random.default_rng(1).normal(size=(3, 60)).astype(np.float32)
    drawn = take(logits_BV, temperature=[0, 0.5, 2], top_k=2, told=[0, 3, 0])
    logps_BV = logits_BV - np.log(np.exp(logits_BV).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(drawn.logp, logps_BV[np.arange(3), drawn.token], atol=1e-5)
    np.testing.assert_array_equal(drawn.told_ids, np.argsort(-logits_BV, axis=1)[:, :MOST_TOLD])
    np.testing.assert_allclose(drawn.told_logps, -np.sort(-logps_BV, axis=1)[:, :MOST_TOLD], atol=1e-5)
