"""A dialogue token by token: the tokens of `generate`, and text that is never half a character."""

import jax
import pytest

from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.inference.generate import generate
from ctllm_jax.inference.stream import stream, stream_text
from ctllm_jax.model.decoder import Decoder, init_params
from data_prep.train_tokenizer import fit

PROMPT = [5, 9, 3, 7]


@pytest.fixture(scope="module")
def model():
    """The debug model, with weights large enough that its text has turns."""
    config = load(PretrainConfig, target="debug/pretrain", overrides=["model.init_std=0.3"]).model
    return Decoder(config), init_params(config, jax.random.key(0))


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "seed": 1}])
def test_the_tokens_are_those_of_generate(model, options):
    whole, = generate(*model, [PROMPT], max_tokens=20, **options)
    assert list(stream(*model, PROMPT, max_tokens=20, **options)) == whole


def test_it_ends_before_a_stop_id_and_at_the_most(model):
    whole = list(stream(*model, PROMPT, max_tokens=20, temperature=0))
    assert len(whole) == 20
    stop = whole[4]
    assert list(stream(*model, PROMPT, max_tokens=20, temperature=0, stop_ids=[stop])) == whole[:whole.index(stop)]
    assert list(stream(*model, PROMPT, max_tokens=0, temperature=0)) == []


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        list(stream(*model, [], max_tokens=1))


@pytest.mark.parametrize("text", ["今天😀天气龘不错", "a\u0301b", "😀😀", "no bytes at all", "龘", ""])
def test_text_comes_in_whole_characters(tmp_path, text):
    (tmp_path / "t.model").write_bytes(fit(["今天天气不错 no bytes at all"] * 20, vocab_size=300,
                                           character_coverage=0.99))
    tokenizer = load_tokenizer(tmp_path / "t.model")
    ids = tokenizer.encode(text)
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert all(pieces)


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tmp_path):
    (tmp_path / "t.model").write_bytes(fit(["今天天气不错"] * 20, vocab_size=270, character_coverage=0.99))
    tokenizer = load_tokenizer(tmp_path / "t.model")
    cut = tokenizer.encode("今😀")[:-1]
    pieces = list(stream_text(tokenizer, iter(cut)))
    assert pieces[0] == "今" and set("".join(pieces[1:])) == {"\ufffd"}
