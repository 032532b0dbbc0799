"""Preference losses: known values, sums that add up, every mesh, padding and extremes; TRL's are in the parity file."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ctllm_jax.losses.cross_entropy import token_logps
from ctllm_jax.losses.preference import KINDS, Answers, Kind, pair_logps, preference_loss, sequence_logps

B, S, D, V, VOCAB, M = 8, 12, 16, 64, 59, 5
BETA = 0.1

# Four pairs, and losses that were computed by hand from the formulas and equal TRL 1.16's where it has them, to 1e-6;
# benchmarks/preference_table.py prints both anew.
CHOSEN = Answers(np.float32([-10, -20, -5, -30]), np.float32([4, 8, 2, 10]), np.float32([-11, -19, -6, -28]))
REJECTED = Answers(np.float32([-12, -18, -9, -25]), np.float32([5, 6, 3, 9]), np.float32([-11.5, -19.5, -7, -27]))
KNOWN = {
    "sigmoid": ({"kind": "sigmoid"}, [0.620957, 0.825939, 0.554355, 0.913015], 0.728567),
    "label smoothing": ({"kind": "sigmoid", "label_smoothing": 0.1}, [0.635957, 0.800939, 0.584355, 0.873015],
                        0.723567),
    "robust": ({"kind": "robust", "label_smoothing": 0.1}, [0.602207, 0.857189, 0.516855, 0.963015], 0.734817),
    "hinge": ({"kind": "hinge"}, [0.85, 1.25, 0.7, 1.4], 1.05),
    "ipo_sum": ({"kind": "ipo_sum"}, [12.25, 56.25, 4, 81], 38.375),
    "ipo_token_mean": ({"kind": "ipo_token_mean"}, [21.6225, 28.890625, 14.694444, 29.400494], 23.652016),
    "sigmoid_norm": ({"kind": "sigmoid_norm"}, [0.6758, 0.712073, 0.636514, 0.714481], 0.684717),
    "simpo": ({"kind": "simpo", "beta": 2.0, "gamma": 0.5}, [1.103186, 0.474077, 0.474077, 1.272953], 0.831073),
    "orpo": ({"kind": "orpo"}, [2.574937, 2.546116, 2.546116, 3.081773], 2.687235),
    "reference_free": ({"kind": "reference_free"}, [0.598139, 0.798139, 0.513015, 0.974077], 0.720842),
    "sft": ({"kind": "sigmoid", "sft_weight": 1.0}, [3.120957, 3.325939, 3.054355, 3.913015], 3.353567),
}


def answers(kind, *, chosen=CHOSEN, rejected=REJECTED):
    """The pairs as a kind wants them: with a reference or without."""
    if KINDS[kind].reference:
        return chosen, rejected
    return chosen._replace(reference_logps=None), rejected._replace(reference_logps=None)


def options_of(kind):
    return {"beta": BETA, "kind": kind, **({"label_smoothing": 0.1} if kind == "robust" else {})}


@pytest.mark.parametrize("name", KNOWN)
def test_known_values(name):
    options, per_pair, mean = KNOWN[name]
    options = {"beta": BETA} | options
    pairs = answers(options["kind"])
    each = jax.vmap(lambda *pair: preference_loss(*pair, **options)[0])(*pairs)
    np.testing.assert_allclose(each, per_pair, atol=1e-5)
    loss, weight, _ = preference_loss(*pairs, **options)
    assert weight == 4 and loss / weight == pytest.approx(mean, abs=1e-5)


def test_every_kind_has_known_values():
    assert {options["kind"] for options, *_ in KNOWN.values()} == KINDS.keys() == set(get_args(Kind))


def test_known_metrics():
    """The first and the third pair are right; rewards are not divided by length, whatever the loss does."""
    expected = {"pairs": 4, "rewards/chosen": -0.1, "rewards/rejected": 0.1, "rewards/margins": -0.2,
                "rewards/accuracies": 2, "logps/chosen": -65, "logps/rejected": -64}
    for kind in ("sigmoid", "ipo_token_mean", "sigmoid_norm"):
        metrics = preference_loss(CHOSEN, REJECTED, kind=kind, beta=BETA)[2]
        assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, abs=1e-6)
    metrics = preference_loss(*answers("simpo"), kind="simpo", beta=2.0)[2]
    assert metrics["rewards/chosen"] == pytest.approx(2 * (-10 / 4 - 20 / 8 - 5 / 2 - 30 / 10))
    assert metrics["logps/rejected"] == pytest.approx(-12 / 5 - 18 / 6 - 9 / 3 - 25 / 9)


def test_groups_add_up_to_the_whole():
    weights, group = jnp.array([1.0, 2, 0, 0.5]), jnp.array([1, 0, 1, 1])
    loss, weight, metrics = preference_loss(CHOSEN, REJECTED, kind="sigmoid", beta=BETA, weights=weights, group=group,
                                            groups=("short", "long"))
    assert weight == 3.5
    assert loss == pytest.approx(np.dot(weights, KNOWN["sigmoid"][1]), abs=1e-5)
    assert (metrics["pairs/short"], metrics["pairs/long"]) == (2, 1.5)
    assert metrics["logps/chosen/long"] == pytest.approx(-10 - 15)
    assert metrics["rewards/accuracies/short"] == 0 and metrics["rewards/accuracies/long"] == 1
    for name in [name for name in metrics if not name.endswith(("/short", "/long"))]:
        assert metrics[name] == pytest.approx(float(metrics[f"{name}/short"] + metrics[f"{name}/long"]), abs=1e-6)


def test_equal_to_the_reference_is_ln_2_and_not_accurate():
    pairs = [side._replace(reference_logps=side.logps) for side in (CHOSEN, REJECTED)]
    for options in ({"kind": "sigmoid"}, {"kind": "sigmoid", "label_smoothing": 0.2}, {"kind": "sigmoid_norm"}):
        loss, weight, metrics = preference_loss(*pairs, beta=BETA, **options)
        assert loss / weight == pytest.approx(np.log(2), rel=1e-6)
        assert metrics["rewards/accuracies"] == 0


def slopes(chosen, rejected, **options):
    """The loss, and its gradients in both answers' log-probabilities."""
    def loss(chosen_logps, rejected_logps):
        return preference_loss(chosen._replace(logps=chosen_logps), rejected._replace(logps=rejected_logps),
                               **options)[0]
    return jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(chosen.logps), jnp.asarray(rejected.logps))


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_are_finite(kind):
    """Margins of ±1e5 nats, where exp overflows; answers that are certain, where odds are infinite; and no tokens."""
    logps = np.float32([-1e5, 0, -1e5, 0, -1e-30])
    others = np.float32([0, -1e5, -1e5, 0, -1e5])
    lengths, reference = np.float32([1, 3, 0, 0, 2]), np.float32([0, 0, -3, 0, -1])
    loss, grads = slopes(*answers(kind, chosen=Answers(logps, lengths, reference),
                                  rejected=Answers(others, lengths, reference)), **options_of(kind))
    assert np.isfinite(loss) and np.all(np.isfinite(grads))
    # The worst pair is still pushed, with the full slope: not lost in a sigmoid that is 0 or 1.
    assert grads[0][0] < 0 and grads[1][0] >= 0
    if kind == "sigmoid":
        np.testing.assert_allclose([grads[0][0], grads[1][0]], [-BETA, BETA], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_beta_may_be_traced(kind):
    pairs, options = answers(kind), options_of(kind)
    beta = options.pop("beta")
    loss = jax.jit(lambda beta: preference_loss(*pairs, beta=beta, **options)[0])(beta)
    assert loss == pytest.approx(float(preference_loss(*pairs, beta=beta, **options)[0]), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_pairs_count_for_nothing_whatever_is_in_them(kind):
    pairs, options = answers(kind), options_of(kind)
    loss, grads = slopes(*pairs, **options)
    rubbish = np.float32([np.nan, np.inf, -np.inf])
    padded = jax.tree.map(lambda x: np.concatenate([x, rubbish]), pairs)
    weights = jnp.array([1.0] * 4 + [0.0] * 3)
    padded_loss, padded_grads = slopes(*padded, **options, weights=weights)
    assert loss == pytest.approx(float(padded_loss), rel=1e-6)
    np.testing.assert_allclose(np.array(padded_grads)[:, :4], np.array(grads), rtol=1e-6)
    assert np.all(np.array(padded_grads)[:, 4:] == 0)
    metrics = preference_loss(*padded, **options, weights=weights)[2]
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["pairs"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_equal_finite_differences(kind):
    pairs, options = answers(kind), options_of(kind)
    _, grads = slopes(*pairs, **options)
    for side in (0, 1):
        moved = [list(pairs), list(pairs)]
        for ends, sign in zip(moved, (1, -1), strict=True):
            ends[side] = ends[side]._replace(logps=ends[side].logps + np.float32(sign * 0.05))
        each = jax.vmap(lambda *pair: preference_loss(*pair, **options)[0])
        difference = (each(*moved[0]) - each(*moved[1])) / 0.1
        np.testing.assert_allclose(grads[side], difference, rtol=2e-3, atol=2e-5)


def test_the_reference_is_not_differentiated():
    def loss(reference):
        return preference_loss(CHOSEN._replace(reference_logps=reference), REJECTED, kind="sigmoid", beta=BETA)[0]
    assert np.all(jax.grad(loss)(jnp.asarray(CHOSEN.reference_logps)) == 0)


NO_REFERENCE = dict(zip(("chosen", "rejected"), answers("orpo"), strict=True))


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "dpo"}, "kind='dpo' must be one of sigmoid, sigmoid_norm"),
    ({"kind": "hinge", "label_smoothing": 0.1}, "'hinge' has no label_smoothing; it is part of sigmoid, "),
    ({"kind": "ipo_sum", "label_smoothing": 0.1}, "'ipo_sum' has no label_smoothing"),
    ({"kind": "orpo", "label_smoothing": 0.1, **NO_REFERENCE}, "'orpo' has no label_smoothing"),
    ({"kind": "robust"}, "'robust' needs label_smoothing above 0"),
    ({"kind": "sigmoid", "label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
    ({"kind": "sigmoid", "label_smoothing": float("nan")}, "label_smoothing=nan must be"),
    ({"kind": "sigmoid", "gamma": 0.5}, "'sigmoid' has no gamma"),
    ({"kind": "orpo", "gamma": 0.5, **NO_REFERENCE}, "'orpo' has no gamma"),
    ({"kind": "simpo", "gamma": -1.0, **NO_REFERENCE}, "gamma=-1.0 must be at least 0"),
    ({"kind": "simpo"}, "'simpo' has no reference model, and reference_logps of chosen would be ignored"),
    ({"kind": "orpo"}, "'orpo' has no reference model"),
    ({"kind": "reference_free"}, "'reference_free' has no reference model"),
    ({"kind": "simpo", "chosen": NO_REFERENCE["chosen"]}, "reference_logps of rejected would be ignored"),
    ({"kind": "sigmoid", **NO_REFERENCE}, "'sigmoid' needs reference_logps for chosen; without a reference there are"),
    ({"kind": "hinge", "rejected": NO_REFERENCE["rejected"]}, "'hinge' needs reference_logps for rejected"),
    ({"kind": "orpo", "sft_weight": 1.0, **NO_REFERENCE}, "not sft_weight"),
    ({"kind": "sigmoid", "sft_weight": -1.0}, "sft_weight=-1.0 must be at least 0"),
    ({"kind": "sigmoid", "beta": 0.0}, "beta=0.0 must be above 0"),
    ({"kind": "sigmoid", "groups": ("a",)}, r"groups=\['a'\], and group is missing"),
    ({"kind": "sigmoid", "group": np.zeros(4, int)}, r"groups=\[\], and group is given"),
    ({"kind": "sigmoid", "weights": np.ones(3)}, r"weights \(3,\) must have the shape of chosen.logps \(4,\)"),
    ({"kind": "sigmoid", "rejected": jax.tree.map(lambda x: x[:1], REJECTED)}, r"rejected.logps \(1,\)"),
])
def test_what_would_be_ignored_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(**({"chosen": CHOSEN, "rejected": REJECTED, "beta": BETA} | options))


def test_pairs_are_found_in_their_row():
    """In any order, under any ids, the same ids in another row; a lone answer and an id with two partners are none."""
    pair_ids = jnp.array([[7, 2, 7, 2, 0], [2, 2, 3, 0, 0], [4, 4, 4, 0, 0]])
    is_chosen = jnp.array([[0, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0]], bool)
    values = jnp.arange(15.0).reshape(3, 5).at[1, 2].set(jnp.nan).at[2, 4].set(jnp.inf)
    (chosen, counts), (rejected, _), weights = pair_logps((values, values.astype(jnp.int32)), pair_ids, is_chosen)
    np.testing.assert_array_equal(weights, [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(chosen, [[0, 1, 2, 0, 0], [5, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rejected, [[0, 3, 0, 0, 0], [6, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    assert counts.dtype == jnp.int32


def draw(seed=0):
    """hidden, head, targets, weights, segments of 0 to M answers a row, and their pairs, in another order each row."""
    draws = np.random.default_rng(seed)
    hidden = draws.standard_normal((B, S, D), np.float32)
    head = draws.standard_normal((D, V), np.float32)
    head[:, VOCAB:] = 1e3
    targets = draws.integers(0, VOCAB, (B, S)).astype(np.int32)
    weights = (draws.random((B, S)) > 0.3).astype(np.float32)
    segment_ids = np.zeros((B, S), np.int32)
    pair_ids, is_chosen = np.zeros((B, M), np.int32), np.zeros((B, M), bool)
    for row in range(B):
        pairs = row % 3  # 0, 2 or 4 segments
        ends = np.sort(draws.choice(np.arange(1, S), 2 * pairs, replace=False))
        for segment, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
            segment_ids[row, start:end] = segment
        order = draws.permutation(2 * pairs)
        pair_ids[row, :2 * pairs], is_chosen[row, :2 * pairs] = order // 2 + 1, order % 2
    reference = draws.normal(-9, 3, (B, M)).astype(np.float32)
    return hidden, head, targets, weights * (segment_ids > 0), segment_ids, pair_ids, is_chosen, reference


def logps_float64(hidden, head, targets, weights, segment_ids):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)[:, :VOCAB]
    highest = logits.max(axis=-1, keepdims=True)
    logps = np.take_along_axis(logits - highest, targets[..., None], axis=-1)[..., 0]
    logps -= np.log(np.exp(logits - highest).sum(axis=-1))
    return tuple(np.stack([(x * (segment_ids == i)).sum(axis=1) for i in range(1, M + 1)], axis=1)
                 for x in (weights * logps, weights))


@pytest.mark.parametrize("chunk_size", [7, 48, 4096])
def test_logps_equal_float64(chunk_size):
    inputs = draw()[:5]
    got = jax.jit(partial(sequence_logps, num_segments=M, chunk_size=chunk_size, vocab_size=VOCAB))(*inputs)
    expected = logps_float64(*inputs)
    assert np.any(expected[1] == 0) and np.any(expected[1] > 1)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[1], expected[1])


def objective(hidden, head, targets, weights, segment_ids, pair_ids, is_chosen, reference, *, kind="sigmoid", **how):
    """As a stage computes it: (loss, (weight, metrics))."""
    logps, lengths = sequence_logps(hidden, head, targets, weights, segment_ids, num_segments=M, vocab_size=VOCAB,
                                    **how)
    *pairs, pair_weights = pair_logps(Answers(logps, lengths, reference), pair_ids, is_chosen)
    loss, weight, metrics = preference_loss(*answers(kind, chosen=pairs[0], rejected=pairs[1]), kind=kind, beta=BETA,
                                            sft_weight=0.5, weights=pair_weights)
    return loss, (weight, metrics)


def evaluate(inputs, **options):
    return jax.jit(jax.value_and_grad(partial(objective, **options), argnums=(0, 1), has_aux=True))(*inputs)


def assert_same(ours, expected):
    (loss, sums), grads = ours
    (expected_loss, expected_sums), expected_grads = expected
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), sums, expected_sums)
    for mine, other in zip(grads, expected_grads, strict=True):
        assert np.abs(other).max() > 1e-3
        np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max(), rtol=0)


def test_gradients_equal_those_of_all_logits_at_once():
    hidden, head, *rest = inputs = draw(1)
    targets, weights, segment_ids, pair_ids, is_chosen, reference = rest

    def naive(hidden, head):
        logps = jax.nn.log_softmax((hidden @ head)[..., :VOCAB])
        logps = jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
        segments = jax.nn.one_hot(segment_ids - 1, M)
        sums, lengths = (jnp.einsum("bs,bsm->bm", x, segments, precision="highest") for x in (weights * logps, weights))
        chosen, rejected, pair_weights = pair_logps(Answers(sums, lengths, reference), pair_ids, is_chosen)
        loss, weight, metrics = preference_loss(chosen, rejected, kind="sigmoid", beta=BETA, sft_weight=0.5,
                                                weights=pair_weights)
        return loss, (weight, metrics)

    expected = jax.jit(jax.value_and_grad(naive, argnums=(0, 1), has_aux=True))(hidden, head)
    assert expected[0][1][0] == 7  # the pairs of eight rows: 0, 1, 2, 0, 1, 2, 0, 1
    assert_same(evaluate(inputs, chunk_size=7), expected)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_every_mesh_equals_one_device(sizes):
    inputs = draw(2)
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    head = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    placed = [jax.device_put(x, head if place == 1 else batch) for place, x in enumerate(inputs)]
    got = evaluate(placed, mesh=mesh, chunk_size=5)
    assert_same(got, evaluate(inputs))
    for grad, x in zip(got[1], placed[:2], strict=True):
        assert grad.sharding.is_equivalent_to(x.sharding, grad.ndim)


def test_micro_batches_add_up():
    inputs = draw(3)
    hidden, head, *rest = inputs
    first, second = (evaluate((hidden[rows], head, *(x[rows] for x in rest))) for rows in (slice(0, 3), slice(3, 8)))
    (loss, sums), grads = jax.tree.map(lambda x, y: x + y, (first[0], first[1][1]), (second[0], second[1][1]))
    whole = evaluate(inputs)
    assert_same(((loss, sums), (np.concatenate([first[1][0], second[1][0]]), grads)), whole)


def test_bfloat16_hidden_gives_float32_sums():
    hidden, head, *rest = draw(4)[:5]
    hidden, head = jnp.asarray(hidden, jnp.bfloat16), head.astype(jnp.bfloat16).astype(np.float32)
    logps, _ = sequence_logps(hidden, head, *rest, num_segments=M, vocab_size=VOCAB, chunk_size=5)
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, logps_float64(hidden.astype(np.float32), head, *rest)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("differentiated", [False, True], ids=["forward", "gradients"])
def test_logits_of_all_tokens_are_never_held(differentiated):
    """By compiled memory: with chunks of an eighth of the tokens less than a third of the logits is needed."""
    rows, length, hidden, vocab = 4, 1024, 16, 4096
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in (
        ((rows, length, hidden), jnp.float32), ((hidden, vocab), jnp.float32), ((rows, length), jnp.int32),
        ((rows, length), jnp.float32), ((rows, length), jnp.int32))]

    def held(chunk_size):
        def total(*inputs):
            return jnp.sum(jnp.square(sequence_logps(*inputs, num_segments=M, chunk_size=chunk_size)[0]))
        function = jax.grad(total, argnums=(0, 1)) if differentiated else total
        return jax.jit(function).lower(*abstract).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * rows * length * vocab
    assert held(rows * length // 8) < logits / 3
    assert held(rows * length) > 0.9 * logits  # so the measure does see what is held


def test_one_matmul_forward_and_three_back():
    hidden, head, targets = draw()[:3]
    def count(function):
        return str(jax.make_jaxpr(function)(hidden, head)).count("dot_general")
    def total(hidden, head):
        return jnp.sum(token_logps(hidden, head, targets, vocab_size=VOCAB, chunk_size=7) ** 2)
    assert count(total) == 1 and count(jax.grad(total, argnums=(0, 1))) == 4


def test_shapes_that_do_not_fit_are_named():
    hidden, head, targets, weights, segment_ids = draw()[:5]
    with pytest.raises(ValueError, match=r"segment_ids \(8, 11\) must have the shape of targets \(8, 12\)"):
        sequence_logps(hidden, head, targets, weights, segment_ids[:, :11], num_segments=M)
    with pytest.raises(ValueError, match=r"head \(15, 64\) be \[16, V\]"):
        sequence_logps(hidden, head[:15], targets, weights, segment_ids, num_segments=M)
    with pytest.raises(ValueError, match=r"targets \(12,\) must be \[B, S\]"):
        sequence_logps(hidden[0], head, targets[0], weights[0], segment_ids[0], num_segments=M)
    with pytest.raises(ValueError, match=r"segment_ids \(float32\) integers"):
        sequence_logps(hidden, head, targets, weights, segment_ids.astype(np.float32), num_segments=M)
    ids, chosen = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    for arrays in ((jnp.ones((2, 1)), ids, chosen), (jnp.ones((2, 3)), ids, chosen[:, :1]),
                   (jnp.ones(3), ids[0], chosen[0])):
        with pytest.raises(ValueError, match=r"must both be \[B, M\]"):
            pair_logps(*arrays)


def test_no_rows_and_no_pairs_have_no_loss():
    hidden, head, targets, weights, segment_ids, pair_ids, is_chosen, _ = draw()
    for rows, length in ((0, S), (B, 0)):
        sums, counts = sequence_logps(hidden[:rows, :length], head, targets[:rows, :length], weights[:rows, :length],
                                      segment_ids[:rows, :length], num_segments=M)
        assert sums.shape == counts.shape == (rows, M) and not np.any(sums) and not np.any(counts)
    *_, valid = pair_logps(jnp.zeros((0, M)), pair_ids[:0], is_chosen[:0])
    assert valid.shape == (0, M)
    empty = answers("sigmoid")[0]._replace(logps=jnp.zeros(0), lengths=jnp.zeros(0), reference_logps=jnp.zeros(0))
    loss, weight, metrics = preference_loss(empty, empty, kind="sigmoid", beta=0.1)
    assert loss == weight == metrics["pairs"] == 0


def test_whole_numbers_are_as_good_as_floats():
    chosen, rejected = answers("sigmoid")
    rounded = [jax.tree.map(jnp.round, each) for each in (chosen, rejected)]
    whole = [jax.tree.map(lambda x: x.astype(jnp.int32), each) for each in rounded]
    found, expected = (preference_loss(*pair, kind="sigmoid", beta=0.1)[0] for pair in (whole, rounded))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
