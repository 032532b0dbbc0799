"""The baselines against a plain implementation, the xz program, and the laws of probability."""

import lzma
import math
import random
import shutil
import subprocess
from collections import Counter, defaultdict

import numpy as np
import pytest

from ctllm_jax.evaluation.baselines import (
    TRIGRAM,
    XZ,
    TrigramModel,
    measure_baselines,
    trigram_bits_per_byte,
    xz_bits_per_byte,
)

ALPHABET = 0x110000 - 0x800 + 1


def plain_probabilities(train, held_out):
    """Witten-Bell with dictionaries, a symbol at a time; "" is the end of a document."""
    counts, successors = Counter(), defaultdict(set)
    for document in train:
        symbols = ["", "", *document, ""]
        for index in range(2, len(symbols)):
            for length in range(3):
                history = tuple(symbols[index - length:index])
                counts[history, symbols[index]] += 1
                successors[history].add(symbols[index])
    totals = Counter()
    for (history, _), count in counts.items():
        totals[history] += count

    def probability(history, symbol):
        shorter = probability(history[1:], symbol) if history else 1 / ALPHABET
        if not totals[history]:
            return shorter
        distinct = len(successors[history])
        return (counts[history, symbol] + distinct * shorter) / (totals[history] + distinct)

    for document in held_out:
        symbols = ["", "", *document, ""]
        for index in range(2, len(symbols)):
            yield probability(tuple(symbols[index - 2:index]), symbols[index])


def random_documents(seed, *, characters, count=40):
    draw = random.Random(seed)
    return ["".join(draw.choices(characters, k=draw.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_trigram_equals_the_plain_implementation(seed):
    train = random_documents(seed, characters="今天天气很好ab\n")
    held_out = ["", *random_documents(seed + 100, characters="今天气坏😀a\U0010ffff\0\n"), ""]
    expected = list(plain_probabilities(train, held_out))
    found = TrigramModel(train).probabilities(held_out)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    bits = -sum(map(math.log2, expected)) / sum(len(document.encode()) for document in held_out)
    assert trigram_bits_per_byte(train, held_out) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("history", ["", "今", "今天", "天天今", "没有", "a", "今天没"])
def test_probabilities_behind_any_history_sum_to_one(history):
    train = random_documents(7, characters="今天天气很好ab")
    model = TrigramModel(train)
    seen = sorted(set("".join(train)))
    seen_probabilities = model.distribution(history, [*seen, ""])
    unseen = model.distribution(history, ["龘", "z"])
    assert unseen[0] == unseen[1] > 0
    rest = ALPHABET - len(seen) - 1
    assert math.fsum(seen_probabilities) + rest * unseen[0] == pytest.approx(1, rel=1e-9)


def test_distribution_is_what_a_document_pays():
    train = random_documents(3, characters="今天天气很好ab")
    model = TrigramModel(train)
    text = "今天好b天"
    paid = [model.distribution(text[:index], [text[index:index + 1]])[0] for index in range(len(text) + 1)]
    np.testing.assert_allclose(model.probabilities([text]), paid, rtol=1e-12)


def test_documents_do_not_see_each_other():
    model = TrigramModel(random_documents(5, characters="今天天气很好ab"))
    alone = [model.probabilities([text]) for text in ("今天", "", "气ab")]
    np.testing.assert_array_equal(model.probabilities(["今天", "", "气ab"]), np.concatenate(alone))


def test_repetition_is_cheap_and_novelty_dear():
    text = ["".join(random.Random(1).choices("一二三四五六七八九十天地人", k=2000))]
    assert xz_bits_per_byte(text, text) < 0.2
    # A character that neither has seen: 20 bits and more, of its 3 bytes, for the 3-gram.
    assert trigram_bits_per_byte(text, ["龘"]) > 20 / 3


@pytest.mark.skipif(shutil.which("xz") is None, reason="the xz program is not installed")
def test_xz_is_the_program(tmp_path):
    train, held_out = random_documents(1, characters="今天天气很好ab", count=3000), ["好天气今天", "很好"]
    before = "".join(document + "\0" for document in train).encode()
    text = "".join(document + "\0" for document in held_out).encode()
    sizes = [len(subprocess.run(["xz", "-9e", "-c"], input=data, capture_output=True, check=True).stdout)
             for data in (before, before + text)]
    expected = 8 * (sizes[1] - sizes[0]) / (len(text) - len(held_out))
    assert xz_bits_per_byte(train, held_out) == pytest.approx(expected)


def test_measure_gives_every_baseline_of_every_source_its_own_text():
    train = {"zh": random_documents(1, characters="今天天气很好"), "en": random_documents(2, characters="abcdef ")}
    held_out = {"zh": ["今天很好"], "en": ["abba fee"]}
    assert measure_baselines(train, held_out) == {
        XZ: {name: xz_bits_per_byte(train[name], held_out[name]) for name in train},
        TRIGRAM: {name: trigram_bits_per_byte(train[name], held_out[name]) for name in train}}


def test_measure_names_a_source_without_training_text():
    with pytest.raises(ValueError, match="without training text: en"):
        measure_baselines({"zh": ["今天"]}, {"en": ["a"], "zh": ["天"]})


@pytest.mark.parametrize("bits_per_byte", [xz_bits_per_byte, trigram_bits_per_byte])
def test_no_held_out_text_is_refused(bits_per_byte):
    with pytest.raises(ValueError, match="held_out holds no text"):
        bits_per_byte(["今天"], [""])


def test_xz_sees_the_whole_training_text():
    """A repeat from 9 MB before costs next to nothing: the dictionary of -9 is 64 MiB, that of -6 is 8."""
    page = random.Random(2).randbytes(2000).hex()
    train, held_out = [page + "a" * 9_000_000], [page]
    smaller = [len(lzma.compress(data.encode(), preset=6)) for data in (train[0], train[0] + page)]
    assert smaller[1] - smaller[0] > 1500
    assert xz_bits_per_byte(train, held_out) < 0.2
