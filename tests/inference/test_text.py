"""Text as it becomes certain, whatever the tokens: whole characters, and nothing of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.inference.model import decode_completion
from ctllm_jax.inference.text import TextStream
from data_prep.train_tokenizer import fit


@pytest.fixture(scope="module", params=["sentencepiece", pytest.param("byte-level", marks=pytest.mark.prep)])
def tokenizer(request, tmp_path_factory):
    """One with byte fallback, and one whose pieces are of bytes."""
    path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        (path / "t.model").write_bytes(fit(["今天天气不错 no bytes at all"] * 20, vocab_size=300,
                                           character_coverage=0.99))
        return load_tokenizer(path / "t.model")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(["今天天气不错 no bytes at all"] * 20, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]))
    backend.save(str(path / "tokenizer.json"))
    return load_tokenizer(path / "tokenizer.json")


def pieces_of(tokenizer, ids, prompt=(), stop=()):
    """(the pieces that were given, whether a stop string ended them)."""
    stream = TextStream(tokenizer, prompt, stop=stop)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == stream.text
    return pieces, stream.stopped


def first_complete(text, stop):
    """The text before the stop text that is complete first, read a character at a time; None without one."""
    ends = (text[:end] for end in range(1, len(text) + 1))
    return next((read[:-len(each)] for read in ends for each in stop if each and read.endswith(each)), None)


texts = st.text(st.sampled_from("今天气不错龘😀e\u0301 noabyt\n\u200d👩👦") | st.characters(exclude_categories=["Cs"]),
                max_size=12)


@settings(deadline=None, max_examples=150)
@given(text=texts, prompt=texts, data=st.data())
def test_no_half_character_and_nothing_of_a_stop_text(tokenizer, text, prompt, data):
    """The pieces are the text up to the stop text that is complete first, and each is certain when it is given."""
    inside = st.builds(lambda start, size: text[start:start + size], st.integers(0, 10), st.integers(1, 4))
    stop = data.draw(st.lists(st.text("今天 nb😀", min_size=1, max_size=3) | inside, max_size=3))
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    text = decode_completion(tokenizer, before, ids)
    pieces, stopped = pieces_of(tokenizer, ids, before, stop)
    cut = first_complete(text, stop)
    assert stopped == (cut is not None)
    assert "".join(pieces) == (text if cut is None else cut)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_ids_at_all_come_to_an_end(tokenizer, data):
    """Bytes that are no UTF-8 among them: as many characters come out as if all were read at once."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    pieces, _ = pieces_of(tokenizer, ids, tokenizer.encode("天"))
    assert "".join(pieces) == decode_completion(tokenizer, tokenizer.encode("天"), ids)


@pytest.mark.parametrize("text", ["今天😀天气龘不错", "a\u0301b", "😀😀", " no  bytes", "龘", ""])
def test_text_comes_as_soon_as_it_is_whole(tokenizer, text):
    """A character's last token gives it; before that there is nothing."""
    ids = tokenizer.encode(text)
    stream, before = TextStream(tokenizer, tokenizer.encode("天")), ""
    for place, token in enumerate(ids):
        before += stream.push(token)
        whole = decode_completion(tokenizer, tokenizer.encode("天"), ids[:place + 1])
        assert before == whole.rstrip("\ufffd")


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer):
    pieces, _ = pieces_of(tokenizer, tokenizer.encode("今😀")[:-1])
    assert "".join(pieces[:-1]) == "今" and set(pieces[-1]) == {"\ufffd"}


@pytest.mark.parametrize(("text", "stop", "given"), [
    ("00000000010", ["0010", "01"], "0" * 8), ("00000000010", ["01", "0010"], "0" * 8),
    ("no bytes", ["bytes", "yt"], "no b"),
    ("no bytes", ["bytes", "es"], "no "), ("no bytes", ["es", "bytes"], "no byt"),
    ("aaab", ["aaaa", "ab"], "aa"), ("今天气", ["天气", "今天气"], "今"), ("今天气", ["今天气", "天气"], "")])
def test_of_overlapping_stop_texts_the_one_that_is_complete_first_counts(tokenizer, text, stop, given):
    """vLLM's rule (its pull request 49391): of two that end at one character, the first in the list."""
    assert first_complete(text, stop) == given
    for ids in (tokenizer.encode(text), [token for each in text for token in tokenizer.encode(each)]):
        pieces, stopped = pieces_of(tokenizer, ids, stop=stop)
        assert stopped and "".join(pieces) == given


def test_a_stop_text_that_has_only_begun_is_given_at_the_end(tokenizer):
    pieces, _ = pieces_of(tokenizer, tokenizer.encode("no byt"), stop=["bytes", "byz"])
    assert "".join(pieces) == "no byt" and "b" not in "".join(pieces[:-1])


def test_blanks_at_the_seam_stay(tokenizer):
    ids = tokenizer.encode("no bytes")
    assert "".join(pieces_of(tokenizer, tokenizer.encode(" at all"), ids)[0]) == " at all"
