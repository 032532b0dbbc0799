"""Batches of pretraining from dataset directories: the same for any number of processes, at any start."""

import itertools
import json
import shutil
import threading
import time

import numpy as np
import pytest

from ctllm_jax.config.data import DataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.pretrain import open_held_out_data, open_training_data
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.reader import Dataset


def config(*directories, **changes):
    """Sources s0, s1, … with weights 1, 2, …"""
    sources = {f"s{index}": {"path": str(directory), "weight": index + 1.0}
               for index, directory in enumerate(directories)}
    return DataConfig(**{"sources": sources, **changes})


def training(data_config, **changes):
    """Training data of 6 rows of 64 tokens."""
    return open_training_data(data_config, **{"sequence_length": 64, "rows": 6, "seed": 5, "vocab_size": 512,
                                              **changes})


def held_out(data_config, **changes):
    """The validation split as batches of 4 rows of 64 tokens."""
    return open_held_out_data(data_config, **{"split": "validation", "sequence_length": 64, "rows": 4,
                                              "max_tokens": 10**6, "vocab_size": 512, **changes})


def take(data, count, *, start=0, local_rows=range(6)):
    """That many batches, and the iterator closed."""
    iterator = data.iterate(start, local_rows=local_rows)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def assert_same(one, other):
    """Two batches are equal in every array."""
    for array, same in zip(one[:5], other[:5], strict=True):
        np.testing.assert_array_equal(array, same)


@pytest.fixture(scope="module")
def other_dataset(make_dataset, make_texts):
    """Another 60 documents."""
    return make_dataset(make_texts(60, seed=9))


def test_any_number_of_processes_gives_the_same_global_batches(dataset, other_dataset):
    whole = take(training(config(dataset, other_dataset)), 5)
    for processes in (2, 3, 6):
        parts = [take(training(config(dataset, other_dataset, threads=1)), 5, local_rows=rows)
                 for rows in np.array_split(np.arange(6), processes)]
        for step, batch in enumerate(whole):
            assert_same(batch, [np.concatenate(arrays) for arrays in zip(*(part[step][:5] for part in parts),
                                                                         strict=True)])


@pytest.mark.parametrize("length", [16, 64, 192])
def test_resume_at_any_step(dataset, length):
    data = training(config(dataset), sequence_length=length)
    straight = take(data, 9)
    for start in (1, 4, 8):
        again = take(training(config(dataset), sequence_length=length), 9 - start, start=start)
        for batch, resumed in zip(straight[start:], again, strict=True):
            assert_same(batch, resumed)
    assert straight[0].tokens.shape == (6, length)
    assert [array.dtype.name for array in straight[0][:5]] == ["int32", "int32", "float32", "int32", "int32"]
    assert straight[0].preference is None


def test_a_late_step_starts_at_once(dataset):
    data = training(config(dataset))
    take(data, 1)
    started = time.perf_counter()
    take(data, 1, start=10**9)
    assert time.perf_counter() - started < 2


def test_worker_processes_give_the_same_batches(dataset):
    wanted = take(training(config(dataset)), 4, start=2)
    for batch, same in zip(wanted, take(training(config(dataset, workers=2)), 4, start=2), strict=True):
        assert_same(batch, same)
        assert same.tokens.flags.owndata


def test_closing_ends_the_threads(dataset):
    before = threading.active_count()
    iterator = training(config(dataset)).iterate(0, local_rows=range(6))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_tokens_and_epochs_are_arithmetic(dataset, other_dataset):
    data = training(config(dataset, other_dataset))
    assert data.tokens_per_source(300) == {"s0": 300 * 6 * 64 // 3, "s1": 300 * 6 * 64 * 2 // 3}
    rows = sum(-(-shard.tokens // 64) for shard in Dataset(dataset).manifest.splits["train"].shards)
    assert data.epochs(300)["s0"] == pytest.approx(600 / rows)


def test_one_epoch_holds_every_token(dataset):
    manifest = Dataset(dataset).manifest
    rows = sum(shard.records for shard in manifest.splits["train"].shards)
    batches = take(training(config(dataset), rows=rows), 1, local_rows=range(rows))
    assert int((batches[0].segment_ids > 0).sum()) == manifest.splits["train"].total("tokens")


def test_what_the_model_is_told_of_the_tokenizer(dataset, tokenizer_path):
    data = training(config(dataset))
    assert load_tokenizer(data.tokenizer_path).sha256 == load_tokenizer(tokenizer_path).sha256
    assert data.eod_id == 2
    assert data.token_bytes.shape == (512,)
    np.testing.assert_array_equal(data.token_bytes[:330], load_tokenizer(tokenizer_path).token_bytes())
    assert not data.token_bytes[330:].any()


def test_the_fingerprint_tells_what_changes_the_batches(dataset, other_dataset):
    base = training(config(dataset)).fingerprint
    assert json.loads(json.dumps(base)) == base
    assert training(config(dataset, threads=1, prefetch=9, workers=1)).fingerprint == base
    moved = shutil.copytree(dataset, dataset.parent / "moved")
    assert training(config(moved)).fingerprint == base
    others = [training(config(other_dataset)), training(config(dataset), seed=6),
              training(config(dataset, isolate_documents=False)), training(config(dataset, mask_eod=False)),
              training(config(dataset), sequence_length=128), training(config(dataset), rows=12)]
    assert all(other.fingerprint != base for other in others)


def test_isolation_and_masking_are_options(dataset):
    isolated = take(training(config(dataset)), 1)[0]
    joined = take(training(config(dataset, isolate_documents=False, mask_eod=False)), 1)[0]
    np.testing.assert_array_equal(isolated.tokens, joined.tokens)
    assert isolated.segment_ids.max() > 1
    assert set(np.unique(joined.segment_ids)) <= {0, 1}
    real = joined.segment_ids[0] == 1
    np.testing.assert_array_equal(joined.positions[0][real], np.arange(real.sum()))
    ends = isolated.tokens == 2
    assert ends.any() and not isolated.loss_weights[ends].any()
    assert joined.loss_weights[ends & (joined.segment_ids > 0)].any()


def test_held_out_rows_come_once_in_order_and_again(dataset):
    data = held_out(config(dataset))["s0"]
    batches = list(data)
    assert len(batches) == len(data)
    assert all(batch.tokens.shape == (4, 64) for batch in batches)
    stream = np.concatenate([batch.tokens[batch.segment_ids > 0] for batch in batches])
    split = Dataset(dataset).split("validation")
    np.testing.assert_array_equal(stream, split.shards[0].window(0, 10**6).tokens)
    for batch, again in zip(batches, data, strict=True):
        assert_same(batch, again)
    empty = batches[-1].segment_ids.max(axis=1) == 0
    assert empty.any() and not batches[-1].loss_weights[empty].any()


@pytest.mark.parametrize("max_tokens, rows", [(1, 1), (64, 1), (200, 3)])
def test_held_out_tokens_are_capped(dataset, max_tokens, rows):
    batches = list(held_out(config(dataset), max_tokens=max_tokens)["s0"])
    assert sum(int((batch.segment_ids.max(axis=1) > 0).sum()) for batch in batches) == rows


def test_synthetic_needs_no_files():
    data = training(DataConfig(kind="synthetic"))
    assert take(data, 2)[1].tokens.shape == (6, 64)
    assert held_out(DataConfig(kind="synthetic")) == {}


def refused(data_config, *, match, **changes):
    """The message with which both doors refuse a config."""
    with pytest.raises(UserError, match=match):
        training(data_config, **changes)


def test_a_length_that_does_not_fit_is_refused(dataset):
    refused(config(dataset), sequence_length=48, match="sequence_length=48 neither divides nor multiplies")


def test_a_missing_split_is_refused_with_those_that_exist(dataset, make_dataset, make_texts):
    refused(DataConfig(sources={"a": {"path": str(dataset), "split": "test"}}),
            match="no split 'test' with data; its splits: train, validation")
    with pytest.raises(UserError, match="no split 'validation' with data; its splits: train$"):
        held_out(config(make_dataset(make_texts(5), validation_fraction=0)))


def test_a_model_with_too_few_ids_is_refused(dataset):
    refused(config(dataset), vocab_size=329, match=r"330 pieces.*model.vocab_size=329 must be at least 330")


def test_an_end_id_beyond_the_tokenizer_counts(make_dataset, make_texts):
    directory = make_dataset(make_texts(10), eod_id=400)
    refused(config(directory), vocab_size=400, match="must be at least 401")
    assert (take(training(config(directory), vocab_size=401), 1)[0].tokens == 400).any()


def test_sources_of_different_tokenizers_are_refused(dataset, make_dataset, make_texts, tmp_path):
    from data_prep.train_tokenizer import fit

    (tmp_path / "other.model").write_bytes(fit(make_texts(50), vocab_size=325, character_coverage=1.0))
    other = make_dataset(make_texts(10), tokenizer=str(tmp_path / "other.model"))
    refused(config(dataset, other), match="data.sources.s1 and data.sources.s0 were made with different tokenizers")
    refused(config(dataset, tokenizer=str(tmp_path / "other.model")), match="is not the tokenizer that data.sources.s0")
    ends = make_dataset(make_texts(10), eod_id=1)
    refused(config(dataset, ends), match="data.sources.s1 ends documents with id 1, data.sources.s0 with 2")


@pytest.fixture
def copy(dataset, tmp_path):
    """A copy of the dataset to damage."""
    return shutil.copytree(dataset, tmp_path / "copy")


def shard_of(directory):
    """The first training shard."""
    return next(directory.glob("*train*-00000-of-*"))


def test_a_changed_tokenizer_is_refused(copy):
    with open(copy / "tokenizer.model", "ab") as file:
        file.write(b"\0\0")
    refused(config(copy), match="tokenizer.model is not")


def test_a_truncated_shard_is_refused_by_name(copy):
    shard = shard_of(copy)
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(config(copy), match=rf"{shard.name} is truncated: \d+ bytes, the manifest says \d+")


def test_a_missing_shard_is_refused_by_name(copy):
    shard_of(copy).unlink()
    refused(config(copy), match="train.array_record-00000-of-00002 is missing")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_flipped_byte_stops_the_reading_with_shard_and_record(copy, workers):
    shard = shard_of(copy)
    data = bytearray(shard.read_bytes())
    data[1000] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(Exception, match=rf"{shard.name}: record \d+ cannot be read"):
        take(training(config(copy, workers=workers)), 40)


def test_a_row_that_is_not_there_is_refused(dataset):
    with pytest.raises(ValueError, match=r"rows 0\.\.5"):
        training(config(dataset)).iterate(0, local_rows=[6])
