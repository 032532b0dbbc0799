"""Small text, a tokenizer trained on it, and dataset directories made of it."""

import json
import random

import pytest

from ctllm_jax.config.data import BuildConfig
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.build import build_from_files
from data_prep.train_tokenizer import fit

WORDS = ["今天", "天气", "不错", "我们", "去", "公园", "散步", "。", "，", "the", " model", " reads", " text", "\n",
         "42"]


@pytest.fixture(scope="session")
def make_texts():
    """(count, seed) -> that many different documents of 1 to 120 words."""
    def make(count, *, seed=0):
        draw = random.Random(seed)
        return [f"{index}:" + "".join(draw.choices(WORDS, k=draw.randint(1, 120))) for index in range(count)]

    return make


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory, make_texts):
    """A SentencePiece model of 330 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    lines = [line for text in make_texts(200) for line in text.split("\n")]
    path.write_bytes(fit(lines, vocab_size=330, character_coverage=1.0))
    return path


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory, tokenizer_path):
    """(texts, changes of BuildConfig) -> the dataset directory made of them."""
    def make(texts, **changes):
        directory = tmp_path_factory.mktemp("dataset")
        text = directory / "text.jsonl"
        text.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        config = BuildConfig(**{"input": [str(text)], "output": str(directory / "out"), "shards": 2,
                                "tokenizer": str(tokenizer_path), "record_tokens": 64, "validation_fraction": 0.1,
                                **changes})
        build_from_files(config, load_tokenizer(config.tokenizer))
        return directory / "out"

    return make


@pytest.fixture(scope="session")
def dataset(make_dataset, make_texts):
    """120 documents in records of 64 tokens; two training shards."""
    return make_dataset(make_texts(120))
