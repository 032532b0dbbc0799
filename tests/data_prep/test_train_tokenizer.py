"""Training a tokenizer: Baichuan2's options, the same file every time, and errors that say what to change."""

import json

import pytest
from sentencepiece import sentencepiece_model_pb2

from ctllm_jax.config.data import TokenizerTrainConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.text import Document
from data_prep.train_tokenizer import language_of, sample_lines, train_tokenizer

TEXTS = ["今天天气不错，我们去公园散步。\n明天再说。", "The model reads text, and the text is short.",
         "def read(path):\n    return open(path).read()  # 42", "    for x in range(10):\n        x += 1"] * 20


@pytest.fixture
def text(tmp_path):
    """The texts as JSON lines."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def config(text, **changes):
    """400 pieces."""
    return TokenizerTrainConfig(**{"input": [str(text)], "output": str(text.parent / "out" / "t.model"),
                                   "vocab_size": 400, "character_coverage": 1.0, **changes})


def test_the_model_has_the_options_of_baichuan2(text):
    tokenizer, compression = train_tokenizer(config(text))
    spec = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    assert trainer.ModelType.Name(trainer.model_type) == "BPE"
    assert trainer.byte_fallback and trainer.split_digits and trainer.allow_whitespace_only_pieces
    assert (normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces) == (
        "identity", False, False)
    assert normalizer.escape_whitespaces and not normalizer.precompiled_charsmap
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, None)
    assert tokenizer.vocab_size == len(spec.pieces) == 400
    assert not any(piece.type == piece.USER_DEFINED for piece in spec.pieces)
    assert len(tokenizer.encode("        ")) < 8
    assert compression.bytes_per_token("Chinese") > 3 and compression.tokens["English"] > 0


def test_the_same_text_gives_the_same_file(text):
    first, _ = train_tokenizer(config(text))
    again, _ = train_tokenizer(config(text, output=str(text.parent / "again.model")))
    assert first.path.read_bytes() == again.path.read_bytes()
    assert sorted(path.name for path in first.path.parent.iterdir()) == ["t.model"]


@pytest.mark.parametrize("vocab_size, message", [
    (300, r"vocab_size=300 is too small: .* take \d+\. Raise vocab_size above that, or lower character_coverage=1.0"),
    (9000, r"vocab_size=9000 is too large: this text yields no more than \d+ pieces")])
def test_a_vocabulary_that_does_not_suit_the_text_is_refused(text, vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(config(text, vocab_size=vocab_size))
    assert not (text.parent / "out" / "t.model").exists()


def test_text_without_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " \\n "}\n')
    with pytest.raises(UserError, match=r"input=.*a.jsonl holds no text to train on"):
        train_tokenizer(config(tmp_path / "a.jsonl"))


def test_a_bad_line_is_named(text):
    text.write_text(text.read_text() + "bad\n")
    with pytest.raises(UserError, match=r"text.jsonl:81: malformed JSON"):
        train_tokenizer(config(text))
    train_tokenizer(config(text, max_bad=1))


def test_the_output_must_be_a_model(text):
    with pytest.raises(UserError, match=r"output=t.txt must end in .model"):
        train_tokenizer(config(text, output="t.txt"))


def test_lines_are_sampled_evenly_by_seed():
    documents = [Document("\n".join(f"{index}-{line}" for line in range(10)) + "\n\n \n", None, 1)
                 for index in range(100)]
    assert len(sample_lines(documents, limit=10**6, seed=1)) == 1000
    drawn = sample_lines(documents, limit=300, seed=1)
    assert drawn == sample_lines(documents, limit=300, seed=1) != sample_lines(documents, limit=300, seed=2)
    assert len(set(drawn)) == 300
    late = sum(int(line.split("-")[0]) >= 50 for line in drawn)
    assert 110 < late < 190


def test_a_long_line_is_cut_not_dropped():
    lines = sample_lines([Document("长" * 2500, None, 1)], limit=10, seed=0)
    assert [len(line) for line in lines] == [1024, 1024, 452]


@pytest.mark.parametrize("line, language", [
    ("今天天气不错。", "Chinese"), ("我用 Python 写代码", "Chinese"), ("The model reads text.", "English"),
    ("    return x[0] + y;", "code"), ("for (int i = 0; i < n; ++i) {", "code"), ("12345 67890", "other"),
    ("Это русский текст", "other"), ("", "other")])
def test_languages_are_told_apart_by_their_characters(line, language):
    assert language_of(line) == language


@pytest.mark.parametrize("place", ["a_file/t.model", "/proc/t.model", "folder.model"])
def test_an_output_that_cannot_be_written_is_refused_before_the_text_is_read(tmp_path, monkeypatch, place):
    (tmp_path / "a_file").touch()
    (tmp_path / "folder.model").mkdir()
    monkeypatch.setattr("data_prep.train_tokenizer.find_files", None)
    with pytest.raises(UserError, match="output=.* cannot be written: "):
        train_tokenizer(TokenizerTrainConfig(input=["x"], output=str(tmp_path / place), vocab_size=500))


def test_a_training_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("a few words\n" * 20)
    with pytest.raises(UserError, match="vocab_size=9999 is too large"):
        train_tokenizer(TokenizerTrainConfig(input=[str(tmp_path / "a.txt")], output=str(tmp_path / "out" / "t.model"),
                                             vocab_size=9999))
    assert list((tmp_path / "out").iterdir()) == []
