"""The order of rows: exact counts, whole epochs, and nothing but arithmetic."""

import time
from collections import Counter

import numpy as np
import pytest

from ctllm_jax.data.batch import padding_row
from ctllm_jax.data.mixture import Interleaving, Mixture

CT_LLM = [56.75, 4.77, 2.82, 2.45, 0.20, 25.10, 7.91]


class Marked:
    """Rows that carry their source and index as tokens."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return padding_row(2)._replace(tokens=np.array([self.source, index], np.int32))


def mixture(sizes, weights, *, rows=8, seed=3):
    """A mixture of marked sources a, b, …"""
    names = "abcdefg"[:len(sizes)]
    return Mixture({name: Marked(index, size) for index, (name, size) in enumerate(zip(names, sizes, strict=True))},
                   dict(zip(names, weights, strict=True)), rows=rows, seed=seed)


def drawn(mixed, steps, *, start=0):
    """(source, index) of every row of these steps."""
    batches = mixed.batches(local_rows=np.arange(mixed._rows), start_step=start)
    return [tuple(row) for step in range(steps) for row in batches[step].tokens.tolist()]


@pytest.mark.parametrize("weights", [CT_LLM, [1.0], [1.0, 1.0], [1e-3, 1.0, 7.0], [0.1, 0.2, 0.3], [1, 1.005]])
def test_counts_in_closed_form_are_the_enumerated_ones(weights):
    interleaving = Interleaving(weights)
    counts = [0] * len(weights)
    for row in range(3000):
        assert interleaving.counts(row) == counts
        source, before = interleaving.place(row)
        assert before == counts[source]
        counts[source] += 1


@pytest.mark.parametrize("rows", [1, 512, 10**6, 598_300 * 512, 10**15])
def test_counts_follow_the_weights(rows):
    total = sum(CT_LLM)
    for count, weight in zip(Interleaving(CT_LLM).counts(rows), CT_LLM, strict=True):
        assert abs(count - rows * weight / total) <= len(CT_LLM) + 1e-9 * rows
    assert sum(Interleaving(CT_LLM).counts(rows)) == rows


def test_close_weights_are_told_apart():
    """Grain's own mix takes weights in hundredths of the smallest: it would give both sources the same."""
    assert Interleaving([1.0, 1.005]).counts(2005 * 1000) == [1000 * 1000, 1005 * 1000]


def test_the_mixture_draws_what_the_counts_say():
    mixed = mixture([5, 9, 4], [3.0, 1.5, 0.5])
    for steps in (1, 7, 40):
        counts = Counter(source for source, _ in drawn(mixed, steps))
        assert mixed.rows_per_source(steps) == {"a": counts[0], "b": counts[1], "c": counts[2]}


def test_every_epoch_has_each_row_once_in_an_order_of_its_own():
    mixed = mixture([24, 6], [3.0, 1.0])
    rows = drawn(mixed, 24)
    for source, size in ((0, 24), (1, 6)):
        indices = [index for origin, index in rows if origin == source]
        epochs = [indices[start:start + size] for start in range(0, len(indices), size)]
        assert len(epochs) > 3
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs if len(epoch) == size)
        assert epochs[0] != epochs[1] != list(range(size))


def test_seed_and_name_decide_the_order():
    first = drawn(mixture([30, 30], [1, 1]), 6)
    assert first == drawn(mixture([30, 30], [1, 1]), 6)
    assert first != drawn(mixture([30, 30], [1, 1], seed=4), 6)
    orders = [[index for origin, index in first if origin == source] for source in (0, 1)]
    assert orders[0] != orders[1]
    assert mixture([30, 30], [1, 1]).order_sha256() == mixture([30, 30], [1, 1]).order_sha256()
    changed = [mixture([30, 30], [1, 1], seed=4), mixture([30, 31], [1, 1]), mixture([30, 30], [1, 1.1])]
    assert len({one.order_sha256() for one in [mixture([30, 30], [1, 1]), *changed]}) == 4


def test_local_rows_are_parts_of_the_global_batch():
    mixed = mixture([50, 20], [3.0, 1.0])
    whole = mixed.batches(local_rows=np.arange(8), start_step=3)[2].tokens
    for part in ([0, 1, 2, 3], [4, 5, 6, 7], [6], [7, 0, 3]):
        np.testing.assert_array_equal(mixed.batches(local_rows=np.asarray(part), start_step=5)[0].tokens, whole[part])


def test_a_late_step_starts_at_once():
    mixed = mixture([1_000_003, 77], CT_LLM[:2], rows=512)
    mixed.batches(local_rows=np.arange(4), start_step=0)[0]
    started = time.perf_counter()
    late = mixed.batches(local_rows=np.arange(4), start_step=10**8)[0]
    assert time.perf_counter() - started < 0.5
    assert late.tokens.shape == (4, 2)
