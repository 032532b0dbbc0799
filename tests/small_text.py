"""A little text in two languages, a tokenizer trained on it, and a dataset directory of each language."""

import json
import random
from pathlib import Path
from typing import NamedTuple

from ctllm_jax.config.data import BuildConfig
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.build import build_from_files
from data_prep.train_tokenizer import fit

WORDS = {"zh": ["今天", "天气", "不错", "我们", "去", "公园", "散步", "。", "，", "\n", "42", "😀", "龘"],
         "en": ["the", " model", " reads", " text", " and", " writes", ".", "\n", " 42", " naïve"]}
VOCABULARY = 330
RECORD = 64


class Corpus(NamedTuple):
    """Where it lies: `folder`/zh and `folder`/en, and the tokenizer that both were made with."""

    folder: Path
    tokenizer: Path


def write_texts(path, language, *, count=90, seed=0):
    """So many documents of 5 to 120 words, no two the same."""
    draw = random.Random(seed)
    texts = [f"{index} " + "".join(draw.choices(WORDS[language], k=draw.randint(5, 120))) for index in range(count)]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return texts


def make_corpus(folder):
    """A `Corpus` in an empty folder: a tenth of the documents is held out."""
    texts = {language: write_texts(folder / f"{language}.jsonl", language) for language in WORDS}
    tokenizer = folder / "small.model"
    lines = [line for each in texts.values() for text in each for line in text.split("\n") if line]
    # Of the rare characters one has a piece and the other is left to its bytes.
    tokenizer.write_bytes(fit(lines, vocab_size=VOCABULARY, character_coverage=0.998))
    for language in WORDS:
        config = BuildConfig(input=[str(folder / f"{language}.jsonl")], output=str(folder / language),
                             tokenizer=str(tokenizer), name=language, record_tokens=RECORD, validation_fraction=0.1)
        build_from_files(config, load_tokenizer(tokenizer))
    return Corpus(folder, tokenizer)
