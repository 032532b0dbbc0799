"""Drawing tokens, against numpy that sorts and counts one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.inference.sampling import sample, truncate

VOCABULARY = 12


def allowed(logits_V, *, top_k, top_p):
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
    return {token for token in kept if logits_V[token] >= lowest}, certain


logits = st.lists(st.integers(-40, 40).map(lambda tenths: tenths / 10), min_size=VOCABULARY, max_size=VOCABULARY)


@settings(deadline=None, max_examples=200)
@given(logits_V=logits, forbidden=st.sets(st.integers(0, VOCABULARY - 1), max_size=VOCABULARY - 1),
       top_k=st.none() | st.integers(1, VOCABULARY + 3), top_p=st.floats(0.01, 1))
def test_what_is_left_is_what_numpy_leaves(logits_V, forbidden, top_k, top_p):
    """Ties, tokens that are forbidden already (padded rows of the vocabulary) and a k above the vocabulary included."""
    logits_V = np.array(logits_V, np.float32)
    logits_V[list(forbidden)] = -np.inf
    wanted, certain = allowed(logits_V, top_k=top_k, top_p=top_p)
    left_V = np.asarray(truncate(jnp.asarray(logits_V)[None], top_k=top_k, top_p=top_p))[0]
    left = set(np.flatnonzero(np.isfinite(left_V)))
    assert not left & forbidden and np.argmax(logits_V) in left
    if certain:
        assert left == wanted
    np.testing.assert_array_equal(left_V[list(left)], logits_V[list(left)])


@pytest.mark.parametrize(("top_k", "top_p", "left"), [
    (None, 1.0, 4), (2, 1.0, 2), (1, 1.0, 1), (None, 0.49, 1), (None, 0.51, 2), (None, 0.9, 3), (3, 0.6, 2),
    (2, 0.62, 1)])
def test_by_hand(top_k, top_p, left):
    """Probabilities 0.5, 0.3, 0.15, 0.05. Top-p counts what top-k left: of the first two, 0.5 is 0.625."""
    logits_BV = jnp.log(jnp.array([[0.3, 0.5, 0.05, 0.15]]))
    kept = np.isfinite(np.asarray(truncate(logits_BV, top_k=top_k, top_p=top_p)))[0]
    assert kept[[1, 0, 3, 2]].tolist() == [True] * left + [False] * (4 - left)


def test_temperature_zero_takes_the_likeliest():
    logits_BV = jax.random.normal(jax.random.key(0), (64, VOCABULARY))
    drawn = sample(logits_BV, jax.random.key(1), temperature=0)
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(drawn, np.argmax(np.asarray(logits_BV), axis=-1))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, None, 1.0), (0.5, None, 1.0), (2.0, 3, 1.0), (1.0, None, 0.8)])
def test_draws_come_as_often_as_they_should(temperature, top_k, top_p):
    """40,000 draws: each token's share within five standard deviations, and none that is forbidden."""
    probabilities_V, count = np.array([0.5, 0.25, 0.15, 0.1]), 40_000
    logits_BV = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities_V, jnp.float32)), (count, 4))
    drawn_B = np.asarray(sample(logits_BV, jax.random.key(3), temperature=temperature, top_k=top_k, top_p=top_p))
    wanted_V = probabilities_V ** (1 / temperature)
    wanted_V[{(None, 1.0): 4, (3, 1.0): 3, (None, 0.8): 3}[top_k, top_p]:] = 0
    wanted_V /= wanted_V.sum()
    shares_V = np.bincount(drawn_B, minlength=4) / count
    deviation_V = np.sqrt(wanted_V * (1 - wanted_V) / count)
    assert np.all(np.abs(shares_V - wanted_V) <= 5 * deviation_V), (shares_V, wanted_V)


def test_a_row_is_drawn_by_its_own_key():
    logits_BV = jax.random.normal(jax.random.key(0), (6, VOCABULARY))
    keys_B = jax.random.split(jax.random.key(1), 6)
    together = sample(logits_BV, keys_B, temperature=1.0)
    for row in range(6):
        alone = sample(logits_BV[row:row + 1], keys_B[row:row + 1], temperature=1.0)
        assert int(alone[0]) == int(together[row])
    assert not np.array_equal(together, sample(logits_BV, jax.random.split(jax.random.key(2), 6), temperature=1.0))
