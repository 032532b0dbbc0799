"""Random access to the streams, by us and by TFDS."""

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset.reader import DamagedShard, Dataset

from .conftest import EOD, R


def stream_of(stream):
    """Ids and ends of a list of documents."""
    ids = [token for document in stream for token in [*document, EOD]]
    return ids, np.cumsum([len(document) + 1 for document in stream])


def test_any_window_is_a_part_of_the_stream(directory, documents):
    for reader, stream in zip(Dataset(directory).split("train").shards, documents["train"], strict=True):
        ids, ends = stream_of(stream)
        assert (reader.shard.tokens, reader.shard.documents) == (len(ids), len(ends))
        for start in range(len(ids)):
            for length in (1, 5, R, R + 1, 3 * R, 1000):
                window = reader.window(start, length)
                assert window.tokens.tolist() == ids[start:start + length]
                stop = min(start + length, len(ids))
                assert window.ends.tolist() == [end - start for end in ends if start < end <= stop]


def test_tfds_reads_the_directory(directory, documents):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(directory).as_data_source("train")
    tokens = np.concatenate([source[index]["tokens"][:source[index]["num_tokens"]] for index in range(len(source))])
    assert tokens.tolist() == [token for stream in documents["train"] for token in stream_of(stream)[0]]
    assert source[0]["ends"].tolist() == [4]
    assert len(tfds.builder_from_directory(directory).as_data_source("validation")) == 1


def test_tensorflow_is_not_imported(directory):
    program = f"""
import sys
import tensorflow_datasets as tfds
from ctllm_jax.dataset.reader import Dataset
assert tfds.builder_from_directory({str(directory)!r}).as_data_source("train")[0]["num_tokens"] == {R}
assert Dataset({str(directory)!r}).split("train").shards[0].record(0).num_tokens == {R}
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_reader_that_was_used_may_be_pickled(directory):
    reader = Dataset(directory).split("train").shards[0]
    window = reader.window(3, 20)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader)).window(3, 20).tokens, window.tokens)


def test_the_splits_that_exist_are_named(directory):
    with pytest.raises(UserError, match=r"numbers has no split 'test' with data; its splits: train, validation"):
        Dataset(directory).split("test")


def test_a_folder_without_manifest_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"is not a dataset directory: it has no manifest.json"):
        Dataset(tmp_path)


def test_every_shard_is_looked_at_once_and_none_waits_for_another(directory, monkeypatch):
    paths = [shard.path for shard in Dataset(directory).split("train").shards]
    looked, together, stat = [], threading.Barrier(len(paths)), Path.stat

    def counting(path, **options):
        if path in paths:
            looked.append(path)
            together.wait(timeout=60)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", counting)
    Dataset(directory).split("train")
    assert len(paths) > 1 and sorted(looked) == sorted(paths)


def test_a_store_is_asked_once_for_all_shards(directory, store):
    dataset = Dataset(store.upload(directory, "listed"))
    store.requests.clear()
    reader = dataset.split("train")
    assert len(reader.shards) > 1 and len(store.requests) <= 2 and all("/listed/" in path for _, path in store.requests)


def test_only_the_damaged_record_is_lost(directory):
    reader = Dataset(directory).split("train").shards[0]
    wanted = [reader.record(index) for index in range(reader.shard.records)]
    data = bytearray(reader.path.read_bytes())
    data[300] ^= 1
    reader.path.write_bytes(data)
    damaged = Dataset(directory).split("train").shards[0]
    bad = []
    for index, record in enumerate(wanted):
        try:
            np.testing.assert_array_equal(damaged.record(index).tokens, record.tokens)
        except DamagedShard as error:
            assert str(error).startswith(f"{reader.path}: record {index} cannot be read")
            bad.append(index)
    assert len(bad) == 1


def test_reading_imports_nothing_once_a_reader_is_there(directory):
    """Two threads that import parts of TFDS at the same time can wait for each other forever."""
    pickled = pickle.dumps(Dataset(directory).split("train").shards[0])
    for made in (f"Dataset({str(directory)!r}).split('train').shards[0]", f"pickle.loads({pickled!r})"):
        program = f"""
import pickle, sys, threading
from ctllm_jax.dataset.reader import Dataset
reader = {made}
before = set(sys.modules)
thread = threading.Thread(target=reader.window, args=(0, 40))
thread.start()
thread.join()
assert reader.open().num_records() == 5
sys.exit(", ".join(sorted(set(sys.modules) - before)) or 0)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
