"""Text files and a real tokenizer to a dataset directory that reads back as the same text."""

import gzip
import json

import numpy as np
import pytest

from ctllm_jax.config.data import BuildConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.build import build_from_files
from ctllm_jax.dataset.reader import Dataset
from data_prep.train_tokenizer import fit

TEXTS = ["今天天气不错，我们去公园。\n\n明天再说。", "  spaces\tand tabs  ", "▁ 😀 \u2028 end", "<s>not special</s>",
         "1234"]


@pytest.fixture
def folder(tmp_path):
    """Texts in files of three kinds, one of them twice, and a tokenizer."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3])
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.txt").write_text(TEXTS[3])
    (folder / "d.txt").write_text(TEXTS[4])
    (tmp_path / "t.model").write_bytes(fit(TEXTS * 10, vocab_size=330, character_coverage=1.0))
    return folder


def options(folder, output="out", **changes):
    """Records of 16 tokens, all for training."""
    return BuildConfig(**{"input": [str(folder)], "output": str(folder.parent / output), "record_tokens": 16,
                            "tokenizer": str(folder.parent / "t.model"), "validation_fraction": 0, **changes})


def prepare(config):
    """The dataset directory of a config, with the tokenizer it names."""
    return build_from_files(config, load_tokenizer(config.tokenizer))


def test_the_text_comes_back_from_the_shards(folder):
    summary = prepare(options(folder))
    assert (summary.read, summary.duplicates) == (8, 3)
    dataset = Dataset(folder.parent / "out")
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    reader = dataset.split("train").shards[0]
    window = reader.window(0, reader.shard.tokens)
    assert sorted(tokenizer.decode(part[:-1]) for part in np.split(window.tokens, window.ends[:-1])) == sorted(TEXTS)
    assert reader.shard.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert tokenizer.token_bytes()[window.tokens].sum() == reader.shard.text_bytes


def test_two_preparations_are_identical_byte_for_byte(folder):
    prepare(options(folder))
    prepare(options(folder, "again"))
    one, other = ({path.name: path.read_bytes() for path in (folder.parent / name).iterdir()}
                  for name in ("out", "again"))
    assert one == other


def test_the_options_are_hashed_and_paths_are_not(folder):
    base = prepare(options(folder)).manifest.config_sha256
    (folder.parent / "moved.model").write_bytes((folder.parent / "t.model").read_bytes())
    assert prepare(options(folder, "b", tokenizer=str(folder.parent / "moved.model"))).manifest.config_sha256 == base
    assert prepare(options(folder, "c", seed=1)).manifest.config_sha256 != base
    assert prepare(options(folder, "d", eod_id=1)).manifest.config_sha256 != base


def test_a_missing_tokenizer_is_named_before_anything_is_read(folder):
    with pytest.raises(UserError, match="no.model does not exist"):
        prepare(options(folder, tokenizer="no.model"))
