"""Signatures: frozen bits, the same from rensa and numpy; they estimate Jaccard, and bands find what they should."""

import hashlib
import sys

import numpy as np
import pytest
import rensa
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import MinHashConfig
from data_prep.dedup import minhash

ALPHABET = "".join(chr(0x4E00 + index) for index in range(2000))
SENTENCE = "今天天气很好，我们出去玩吧！"


def draw_text(draw, length, alphabet=ALPHABET):
    return "".join(alphabet[index] for index in draw.integers(len(alphabet), size=length))


def pairs_of(draw, *, pairs, length, shared):
    """Pairs of texts that share about this fraction of their characters, in one run, and their true Jaccard."""
    texts = []
    for _ in range(pairs):
        common = draw_text(draw, int(shared * length))
        texts += [common + draw_text(draw, length - len(common)), draw_text(draw, length - len(common)) + common]
    return texts, np.array([minhash.jaccard(a, b, 13) for a, b in zip(texts[::2], texts[1::2], strict=True)])


@pytest.mark.parametrize("sketch", [minhash._rensa, minhash._numpy], ids=["rensa", "numpy"])
@pytest.mark.parametrize(("count", "seed", "expected"), [
    (8, 1, [[4160179461, 3169439567, 3412090254, 1079949178, 3781430778, 3326488119, 1064622479, 3420136710],
            [3264571612, 1242460167, 3803243072, 3718006095, 321897176, 3195720810, 2038772474, 543482926],
            [1225488152, 529166528, 712168312, 2127388646, 701249102, 1993788272, 650986866, 2650601341],
            [minhash.EMPTY] * 8]),
    (5, 42, [[563363039, 2338585818, 3804056324, 3759028382, 1566974091],
             [3543519574, 3270666351, 521634037, 1735706419, 998117944],
             [444584207, 106341545, 150330949, 2124084845, 3107410349],
             [minhash.EMPTY] * 5]),
])
def test_signatures_are_those_of_rensa_0_5_0(sketch, count, seed, expected):
    hashes = np.array([0, 1, 2, 3, 2**64 - 1, 12345678901234567890, 1 << 63], dtype=np.uint64)
    offsets = np.array([0, 1, 3, 7, 7], dtype=np.uint64)
    assert sketch(hashes, offsets, count, seed).tolist() == expected


@pytest.mark.parametrize("sketch", [minhash._rensa, minhash._numpy], ids=["rensa", "numpy"])
def test_signatures_of_many_tokens_are_those_of_rensa_0_5_0(sketch):
    hashes = minhash._splitmix(np.arange(5000, dtype=np.uint64))
    values = sketch(hashes, np.array([0, 20, 300, 5000], dtype=np.uint64), 128, 1)
    digest = hashlib.sha256(values.astype("<u4").tobytes()).hexdigest()
    assert digest == "2150d59957d7ccab034044adf88beaadfb357a687d10f992d3eaa1a6dd9baab7"


def test_hashes_keys_and_signatures_of_a_text_stay_what_they_are():
    assert [hex(value) for value in minhash.shingle_hashes(SENTENCE, 13)] == ["0x4dd854dfd7f57c1a",
                                                                              "0x7ea6210e0af6e6b5"]
    assert [hex(value) for value in minhash.shingle_hashes("a😀b", 3)] == ["0x3a5e8ab39dc4ed21"]
    values = minhash.signatures([SENTENCE + "明天也去。"], MinHashConfig()).values
    assert values[0, :4].tolist() == [3244774769, 3302977589, 3746488364, 3279406914]
    assert [hex(key) for key in minhash.band_keys(values, 9, 13)[0, :3]] == [
        "0x89252f6dc2ebf3b6", "0xe7123b10c3311838", "0x35da305343b2c67"]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.sampled_from(ALPHABET[:40] + "abc 😀\n。\ud800"), max_size=400), max_size=6),
       permutations=st.sampled_from([117, 128, 1, 100]), seed=st.integers(0, 2**64 - 1))
def test_numpy_gives_the_bits_of_rensa(texts, permutations, seed):
    settings_ = {"permutations": permutations, "seed": seed, "bands": 1, "rows": 1}
    theirs, long_enough = minhash.signatures(texts, MinHashConfig(implementation="rensa", **settings_))
    ours, also = minhash.signatures(texts, MinHashConfig(implementation="numpy", **settings_))
    assert np.array_equal(ours, theirs) and np.array_equal(long_enough, also)
    assert ours.shape == (len(texts), permutations) and ours.dtype == theirs.dtype == np.uint32


@pytest.mark.parametrize("implementation", ["rensa", "numpy"])
def test_a_document_has_the_same_signature_in_any_company(implementation):
    draw = np.random.default_rng(0)
    texts = [draw_text(draw, length) for length in (5, 13, 14, 100, 3000, 0, 12)] * 60
    texts.append(draw_text(draw, minhash.CHUNK + 5000))
    config = MinHashConfig(implementation=implementation)
    together = minhash.signatures(texts, config)
    for index in (0, 1, 3, 300, 420):
        assert np.array_equal(together.values[index], minhash.signatures([texts[index]], config).values[0])
    assert together.long_enough[:7].tolist() == [False, True, True, True, True, False, False]
    assert (together.values[~together.long_enough] == minhash.EMPTY).all()
    assert (together.values[together.long_enough] != minhash.EMPTY).all()


@pytest.mark.parametrize("shingle", [1, 2, 3, 5, 8, 13, 16])
def test_a_shingle_has_the_same_hash_wherever_it_stands(shingle, monkeypatch):
    text = draw_text(np.random.default_rng(shingle), 300) + "😀é\n"
    hashes = minhash.shingle_hashes(text, shingle)
    assert len(hashes) == len(text) - shingle + 1
    for place in (0, 1, 40, len(hashes) - 1):
        assert hashes[place] == minhash.shingle_hashes(text[place : place + shingle], shingle)[0]
    monkeypatch.setattr(minhash, "CHUNK", 64)
    assert np.array_equal(minhash.shingle_hashes(text, shingle), hashes)


@pytest.mark.parametrize("alphabet", ["ab", "01 ", "的一是", ALPHABET])
def test_different_shingles_have_different_hashes(alphabet):
    text = draw_text(np.random.default_rng(1), 100_000, alphabet)
    distinct = len({text[index : index + 13] for index in range(len(text) - 12)})
    assert len(np.unique(minhash.shingle_hashes(text, 13))) == distinct


@pytest.mark.parametrize("place", [0, 6, 12])
def test_another_character_changes_every_bit_half_of_the_time(place):
    draw = np.random.default_rng(place)
    changed = []
    for _ in range(1500):
        text = draw_text(draw, 13)
        other = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        changed.append(int(minhash.shingle_hashes(text, 13)[0] ^ minhash.shingle_hashes(other, 13)[0]))
    share = [sum(value >> bit & 1 for value in changed) / len(changed) for bit in range(64)]
    # Five standard deviations of 1500 throws of a coin.
    assert max(abs(value - 0.5) for value in share) < 5 * 0.5 / len(changed) ** 0.5


@pytest.mark.parametrize("length", [40, 150, 1000])
@pytest.mark.parametrize("shared", [0.5, 0.8, 0.95])
def test_the_estimate_of_jaccard_is_unbiased(length, shared):
    texts, true = pairs_of(np.random.default_rng(length), pairs=400, length=length, shared=shared)
    values = minhash.signatures(texts, MinHashConfig()).values
    error = (values[::2] == values[1::2]).mean(axis=1) - true
    assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5
    # K throws, or fewer where buckets make them without replacement.
    assert error.std() < 1.15 * (true * (1 - true) / 128).mean() ** 0.5


@pytest.mark.parametrize(("bands", "rows", "shared"), [(9, 13, 0.92), (9, 13, 0.945), (14, 8, 0.87), (1, 4, 0.9)])
def test_bands_agree_as_often_as_they_should(bands, rows, shared):
    texts, true = pairs_of(np.random.default_rng(rows), pairs=1200, length=500, shared=shared)
    values = minhash.signatures(texts, MinHashConfig(bands=bands, rows=rows)).values
    keys = minhash.band_keys(values, bands, rows)
    found = (keys[::2] == keys[1::2]).any(axis=1)
    expected = np.array([minhash.match_probability(value, bands, rows) for value in true])
    deviation = (expected * (1 - expected)).sum() ** 0.5
    assert 0.1 < expected.mean() < 0.95
    assert abs(found.sum() - expected.sum()) < 4 * deviation


@pytest.mark.parametrize(("jaccard", "nine", "fourteen"), [(0.8, 0.40, 0.92), (0.85, 0.69, 0.99), (0.9, 0.93, 1.0),
                                                           (0.95, 0.998, 1.0)])
def test_match_probability(jaccard, nine, fourteen):
    assert minhash.match_probability(jaccard, 9, 13) == pytest.approx(nine, abs=0.005)
    assert minhash.match_probability(jaccard, 14, 8) == pytest.approx(fourteen, abs=0.005)


def test_keys_agree_exactly_where_bands_do():
    draw = np.random.default_rng(3)
    values = draw.integers(0, 3, size=(300, 128), dtype=np.uint32)
    keys = minhash.band_keys(values, 40, 3)
    assert keys.shape == (300, 40) and keys.dtype == np.uint64
    for band in range(40):
        rows = [tuple(row) for row in values[:, 3 * band : 3 * band + 3].tolist()]
        assert len({*zip(rows, keys[:, band].tolist(), strict=True)}) == len({*rows}) == len({*keys[:, band].tolist()})
    assert not {*keys[:, 0].tolist()} & {*keys[:, 1].tolist()}


def test_short_documents_are_marked_not_merged():
    texts = ["很好", "很差", "一本值得读的书", SENTENCE]
    values, long_enough = minhash.signatures(texts, MinHashConfig())
    assert long_enough.tolist() == [False, False, False, True]
    assert minhash.jaccard("很好", "很差", 13) == 0 and minhash.jaccard("很好", "很好", 13) == 1
    assert minhash.jaccard("很好", SENTENCE, 13) == 0


def test_jaccard_is_that_of_the_sets_of_shingles():
    draw = np.random.default_rng(5)
    for _ in range(20):
        a = draw_text(draw, 200, "一二三") + draw_text(draw, 50)
        b = a[30:220] + draw_text(draw, 30)
        sets = [{text[index : index + 4] for index in range(len(text) - 3)} for text in (a, b)]
        assert minhash.jaccard(a, b, 4) == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))


def test_no_text_has_no_signature():
    values, long_enough = minhash.signatures([], MinHashConfig())
    assert values.shape == (0, 128) and long_enough.shape == (0,)
    assert minhash.band_keys(values, 9, 13).shape == (0, 9)


@pytest.fixture
def fresh():
    minhash._rensa_complaint.cache_clear()
    yield
    minhash._rensa_complaint.cache_clear()


@pytest.mark.parametrize("count", [100, 128])
def test_a_rensa_with_other_bits_is_not_used(monkeypatch, caplog, fresh, count):
    expected = minhash.signatures([SENTENCE], MinHashConfig(permutations=count, bands=1)).values
    minhash._rensa_complaint.cache_clear()

    class Other:
        sketch = staticmethod(rensa.RMinHash.digest_matrix_from_flat_token_hashes)

        @classmethod
        def digest_matrix_from_flat_token_hashes(cls, hashes, offsets, permutations, seed):
            return cls.sketch(hashes, offsets, permutations, seed + 1)

    monkeypatch.setattr(rensa, "RMinHash", Other)
    assert np.array_equal(minhash.signatures([SENTENCE], MinHashConfig(permutations=count, bands=1)).values, expected)
    assert "other signatures" in caplog.text
    with pytest.raises(UserError, match="rensa>=0.5"):
        minhash.signatures([SENTENCE], MinHashConfig(implementation="rensa"))


def test_without_rensa_numpy_takes_its_place(monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert minhash.signatures([SENTENCE], MinHashConfig()).long_enough.all()
    with pytest.raises(UserError, match=r"ctllm-jax\[prep\]"):
        minhash.signatures([SENTENCE], MinHashConfig(implementation="rensa"))
