"""Random batches: pure functions of (seed, step, row), shaped like packed documents."""

import itertools

import numpy as np
import pytest

from ctllm_jax.data.synthetic import EOD_ID, SyntheticData


def _data(**changes):
    return SyntheticData(**{"sequence_length": 64, "rows": 6, "seed": 7, "vocab_size": 50, **changes})


def test_rows_do_not_depend_on_which_others_are_asked_for():
    whole = next(_data().iterate(5, local_rows=range(6)))
    part = next(itertools.islice(_data().iterate(3, local_rows=[4, 1]), 2, None))
    for all_rows, some in zip(whole[:5], part[:5], strict=True):
        np.testing.assert_array_equal(all_rows[[4, 1]], some)


def test_seed_step_and_row_each_change_the_tokens():
    tokens = _data().row(2, 3).tokens
    for other in (_data(seed=8).row(2, 3), _data().row(3, 3), _data().row(2, 4)):
        assert not np.array_equal(tokens, other.tokens)


@pytest.mark.parametrize("isolate", [True, False])
def test_a_row_is_packed_documents(isolate):
    row = _data(isolate_documents=isolate, sequence_length=256).row(0, 0)
    np.testing.assert_array_equal(row.targets[:-1], row.tokens[1:])
    ends = row.tokens == EOD_ID
    np.testing.assert_array_equal(row.loss_weights, 1.0 - ends)
    segment, position = 1, 0
    for place in range(256):
        assert (row.segment_ids[place], row.positions[place]) == (segment, position)
        position += 1
        if ends[place] and isolate:
            segment, position = segment + 1, 0
    assert 0 < ends.sum() < 64
    assert row.tokens.max() < 50


def test_tokens_follow_the_stated_entropy():
    data = _data(sequence_length=4096, vocab_size=30)
    tokens = np.concatenate([data.row(step, 0).tokens for step in range(20)])
    shares = np.bincount(tokens[tokens != EOD_ID], minlength=30)[1:] / (tokens != EOD_ID).sum()
    assert abs(-(shares * np.log(shares)).sum() - data.entropy) < 0.01


def test_a_row_outside_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"rows 0\.\.5"):
        _data().iterate(0, local_rows=[6])
