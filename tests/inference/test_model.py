"""Prompts to ids as they stand in training, and new ids to the text behind a prompt."""

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.inference.model import decode_completion, encode_prompts
from data_prep.train_tokenizer import fit

EOD = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(fit(["今天天气不错 the model reads text"] * 20, vocab_size=300, character_coverage=1.0))
    return load_tokenizer(path)


def test_a_prompt_stands_behind_what_preceded_documents(tokenizer):
    ids = tokenizer.encode("今天")
    assert encode_prompts(tokenizer, ["今天", ""], prefix_id=EOD, stop_id=EOD) == [[EOD, *ids], [EOD]]


def test_isolated_documents_had_nothing_before_them(tokenizer):
    """An empty prompt still needs a token to go on from: the end of a document."""
    ids = tokenizer.encode("今天")
    assert encode_prompts(tokenizer, ["今天", ""], prefix_id=None, stop_id=EOD) == [ids, [EOD]]
    with pytest.raises(UserError, match="prompt is empty"):
        encode_prompts(tokenizer, ["今天", ""], prefix_id=None, stop_id=None)


@pytest.mark.parametrize(("prompt", "new"), [
    ("the", " model reads"), ("the ", "model"), ("今天", "天气"), ("今天", "😀龘"), ("", " text"), ("the", ""),
    ("the\n", "\n model"), ("\ufffd", "text")])
def test_prompt_and_completion_are_the_text(tokenizer, prompt, new):
    """Blanks at the seam stay, and characters that are spelled in bytes come out whole."""
    before, behind = [EOD, *tokenizer.encode(prompt)], tokenizer.encode(new)
    assert decode_completion(tokenizer, before, behind) == new


def test_a_character_that_is_cut_off_at_the_end(tokenizer):
    """The last bytes of the last character are missing: it is replaced, and the rest stays."""
    behind = tokenizer.encode("天😀")[:-1]
    text = decode_completion(tokenizer, tokenizer.encode("今"), behind)
    assert text.startswith("天") and set(text[1:]) == {"\ufffd"}
