"""Text to a SentencePiece model, with the options of Baichuan2's tokenizer."""

from __future__ import annotations

import errno
import io
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ctllm_jax.config.data import TokenizerTrainConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from ctllm_jax.dataset.text import Document, Quarantine, find_files, read_documents

# BPE with byte fallback, digits one by one, text as it is: identity normalization, white space kept, no dummy prefix.
# Runs of spaces may become pieces, for code. Baichuan2's ids: unknown 0, beginning 1, end 2, no padding.
TRAINING_OPTIONS = {
    "model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
    "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1,
}
_LINE_CHARACTERS = 1024  # longer lines are cut: the trainer would leave out what is longer than its limit
_MEASURED_LINES = 20_000
logger = logging.getLogger(__name__)


@dataclass
class Compression:
    """Measure a tokenizer on some lines: UTF-8 bytes and tokens by language."""

    text_bytes: dict[str, int]
    tokens: dict[str, int]

    def bytes_per_token(self, language: str) -> float:
        """Mean bytes of a token."""
        return self.text_bytes[language] / max(1, self.tokens[language])


def train_tokenizer(config: TokenizerTrainConfig, *, progress: Callable[[int, int], None] = lambda done, total: None
                    ) -> tuple[Tokenizer, Compression]:
    """Train a model, write it to `config.output`, and measure it on lines that it was trained on.

    The same text, options and seed give the same file. Progress is (bytes read, bytes to read). UserError where there
    is no text, or the vocabulary is too small or too large for it.
    """
    output = Path(config.output)
    if output.suffix != ".model":
        raise UserError(f"output={config.output} must end in .model")
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        temporary.touch()  # Before the hours of training, not after them.
    except OSError as error:
        raise UserError(f"output={config.output} cannot be written: {error.strerror}") from None
    try:
        lines = _training_lines(config, progress)
        logger.info("training on %d lines", len(lines))
        temporary.write_bytes(fit(lines, vocab_size=config.vocab_size, character_coverage=config.character_coverage))
        temporary.rename(output)
    finally:
        temporary.unlink(missing_ok=True)
    tokenizer = load_tokenizer(output)
    return tokenizer, measure(tokenizer, random.Random(config.seed).sample(lines, min(len(lines), _MEASURED_LINES)))


def _training_lines(config: TokenizerTrainConfig, progress: Callable[[int, int], None]) -> list[str]:
    files = find_files(config.input, links=config.links)
    total = sum(file.stat().st_size for file in files)
    quarantine = Quarantine(Path(config.output).with_suffix(".bad.jsonl"), max_bad=config.max_bad)
    quarantine.path.unlink(missing_ok=True)
    documents = read_documents(files, text_field=config.text_field, quarantine=quarantine,
                               progress=lambda done: progress(done, total))
    lines = sample_lines(documents, limit=config.max_sentences, seed=config.seed)
    if not lines:
        raise UserError(f"input={', '.join(config.input)} holds no text to train on")
    return lines


def fit(lines: Iterable[str], *, vocab_size: int, character_coverage: float) -> bytes:
    """Train the model on these lines. Raises UserError if `vocab_size` does not suit them."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size,
            character_coverage=character_coverage, max_sentence_length=8 * _LINE_CHARACTERS, minloglevel=2,
            **TRAINING_OPTIONS)
    except RuntimeError as error:
        message = str(error)
        if small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            raise UserError(f"vocab_size={vocab_size} is too small: the special, byte and single-character pieces of "
                            f"this text take {small[1]}. Raise vocab_size above that, or lower "
                            f"character_coverage={character_coverage}") from None
        if large := re.search(r"value <= (\d+)", message):
            raise UserError(f"vocab_size={vocab_size} is too large: this text yields no more than {large[1]} pieces. "
                            "Lower vocab_size, or give more text") from None
        raise UserError(f"SentencePiece could not train: {message}") from None
    return model.getvalue()


def sample_lines(documents: Iterable[Document], *, limit: int, seed: int) -> list[str]:
    """At most `limit` lines, drawn evenly from all lines that are not blank (reservoir sampling), in reading order."""
    draw = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for index, line in enumerate(_lines(documents)):
        if len(kept) < limit:
            kept.append((index, line))
        elif (place := draw.randrange(index + 1)) < limit:
            kept[place] = (index, line)
    return [line for _, line in sorted(kept)]


def _lines(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        # Only the newline ends a line: it is left to byte fallback, and its piece is <0x0A>.
        for line in document.text.split("\n"):
            if line.strip():
                for start in range(0, len(line), _LINE_CHARACTERS):
                    yield line[start:start + _LINE_CHARACTERS]


def measure(tokenizer: Tokenizer, lines: list[str]) -> Compression:
    """Bytes and tokens of these lines by language."""
    text_bytes = dict.fromkeys(LANGUAGES, 0)
    tokens = dict.fromkeys(LANGUAGES, 0)
    for line, ids in zip(lines, tokenizer.encode_batch(lines), strict=True):
        language = language_of(line)
        text_bytes[language] += len(line.encode())
        tokens[language] += len(ids)
    return Compression(text_bytes, tokens)


LANGUAGES = ("Chinese", "English", "code", "other")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile("[A-Za-z]")
_CODE = re.compile(r"[{}()\[\]<>=;_+*/\\|&$#@`~^%]|^\s{2,}|\t")


def language_of(line: str) -> str:
    """Which of LANGUAGES a line is, by its characters: a rough division, for a report and nothing else."""
    visible = max(1, sum(not character.isspace() for character in line))
    if len(_HAN.findall(line)) > 0.2 * visible:
        return "Chinese"
    if len(_CODE.findall(line)) > 0.08 * visible:
        return "code"
    return "English" if len(_LATIN.findall(line)) > 0.6 * visible else "other"
