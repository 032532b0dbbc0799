"""Sources that are still text become a dataset directory once."""

import json
import subprocess
import sys

import numpy as np
import pytest

import ctllm_jax
from ctllm_jax.config.data import DataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.pretrain import open_held_out_data, open_training_data
from ctllm_jax.data.sources import check_room, open_source
from ctllm_jax.data.tokenizer import load_tokenizer


@pytest.fixture
def data_config(tmp_path, tokenizer_path):
    """path, changes of the source -> a config of this one source."""
    def make(path, *, tokenizer=str(tokenizer_path), **source):
        return DataConfig(sources={"zh": {"path": str(path), **source}}, tokenizer=tokenizer,
                          cache_dir=str(tmp_path / "cache"))

    return make


def write_jsonl(path, texts, field="text"):
    """One record a line."""
    path.write_text("".join(json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def opened(config, *, sequence_length=64):
    """The dataset of the one source."""
    return open_source("zh", config.sources["zh"], config, sequence_length=sequence_length).dataset


def documents_of(dataset, tokenizer_path):
    """All texts of a dataset, sorted."""
    tokenizer, found = load_tokenizer(tokenizer_path), []
    for name in dataset.manifest.splits:
        for reader in dataset.split(name).shards:
            window = reader.window(0, reader.shard.tokens)
            found += [tokenizer.decode(part[:-1]) for part in np.split(window.tokens, window.ends[:-1])]
    return sorted(found)


def test_text_is_prepared_once_and_read_like_any_dataset(data_config, make_texts, tmp_path, tokenizer_path):
    texts = make_texts(40)
    config = data_config(write_jsonl(tmp_path / "a.jsonl", texts))
    dataset = opened(config)
    assert documents_of(dataset, tokenizer_path) == sorted(texts)
    stamps = {path: path.stat().st_mtime_ns for path in dataset.directory.iterdir()}
    again = opened(config)
    assert {path: path.stat().st_mtime_ns for path in again.directory.iterdir()} == stamps
    data = open_training_data(config, sequence_length=64, rows=2, seed=1, vocab_size=330)
    iterator = data.iterate(0, local_rows=[0, 1])
    assert next(iterator).tokens.shape == (2, 64)
    iterator.close()
    held_out = open_held_out_data(config, split="validation", sequence_length=64, rows=2, max_tokens=64,
                                  vocab_size=330)
    assert len(list(held_out["zh"])) == 1


def test_a_new_version_finds_what_an_earlier_one_prepared(data_config, make_texts, tmp_path, monkeypatch):
    config = data_config(write_jsonl(tmp_path / "a.jsonl", make_texts(40)))
    directory = opened(config).directory
    monkeypatch.setattr(ctllm_jax, "__version__", "99.0.0")
    assert opened(config).directory == directory
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [directory.name]


def test_content_tokenizer_and_options_name_the_directory(data_config, make_texts, tmp_path):
    config = data_config(write_jsonl(tmp_path / "a.jsonl", make_texts(30)))
    first = opened(config).directory
    (tmp_path / "b").mkdir()
    assert opened(data_config(write_jsonl(tmp_path / "b" / "c.jsonl", make_texts(30)))).directory == first
    assert opened(config, sequence_length=48).directory != first
    assert opened(config, sequence_length=48).manifest.record_tokens == 48
    write_jsonl(tmp_path / "a.jsonl", make_texts(31))
    assert opened(config).directory != first


def test_a_tfds_directory_of_texts_is_read(data_config, make_texts, tmp_path, tokenizer_path):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    texts, directory = make_texts(25), tmp_path / "tfds"
    directory.mkdir()
    features = tfds.features.FeaturesDict({"content": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)})
    writer = ArrayRecordWriter(str(directory / "prose-web.array_record-00000-of-00001"), "group_size:1")
    for index, text in enumerate(texts):
        writer.write(features.serialize_example({"content": text, "id": index}))
    writer.close()
    template = tfds.core.ShardedFileTemplate(dataset_name="prose", split="web", data_dir=directory,
                                             filetype_suffix="array_record")
    split = tfds.core.SplitInfo(name="web", shard_lengths=[25], num_bytes=0, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=directory, features=features, split_infos=[split], check_data=False)
    config = data_config(directory, text_field="content", split="web")
    assert documents_of(opened(config), tokenizer_path) == sorted(texts)
    assert open_training_data(config, sequence_length=64, rows=2, seed=1, vocab_size=330).epochs(100)["zh"] > 1
    with pytest.raises(UserError, match=r"no feature 'text'; its features: content, id"):
        opened(data_config(directory, split="web"))
    with pytest.raises(UserError, match=r"no split 'test'; its splits: web"):
        opened(data_config(directory, text_field="content", split="test"))


def test_text_without_a_tokenizer_is_refused(data_config, make_texts, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    with pytest.raises(UserError, match=r"data.tokenizer must be given: data.sources.zh.path=.*a.jsonl is still text"):
        opened(data_config(path, tokenizer=None))


def test_a_missing_path_is_refused(data_config):
    with pytest.raises(UserError, match=r"data.sources.zh.path=nowhere/x does not exist$"):
        opened(data_config("nowhere/x"))
    with pytest.raises(UserError, match=r"s3://bucket/x does not exist: copy or mount it first"):
        opened(data_config("s3://bucket/x"))


def test_what_is_no_dataset_on_an_object_store(data_config, store, tmp_path):
    store.write("raw/a.jsonl", b'{"text": "x"}')
    with pytest.raises(UserError, match=r"zh.path=gs://bucket/raw holds no dataset directory .* prepare made"):
        opened(data_config("gs://bucket/raw"))


def test_shards_that_the_cache_cannot_hold(data_config, make_texts, store, tmp_path):
    made = opened(data_config(write_jsonl(tmp_path / "a.jsonl", make_texts(30))))
    url = store.upload(made.directory, "corpus")
    config = data_config(url, tokenizer=None)
    remote = opened(config)
    assert remote.manifest == made.manifest
    assert remote.tokenizer_path.read_bytes() == made.tokenizer_path.read_bytes()
    check_room([remote], config)
    with pytest.raises(UserError, match=r"data.cache_gb=1e-09: the sources on .* give data.cache_gb=1"):
        check_room([remote], config.model_copy(update={"cache_gb": 1e-9}))
    there, here = (dataset.split("train").shards[0] for dataset in (remote, made))
    assert there.window(0, 50).tokens.tolist() == here.window(0, 50).tokens.tolist()


def test_a_bad_record_names_file_and_line_and_leaves_nothing_behind(data_config, make_texts, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(3))
    path.write_text(path.read_text() + '{"text": \n')
    with pytest.raises(UserError, match=r"a.jsonl:4: malformed JSON"):
        opened(data_config(path))
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_an_empty_file_is_refused(data_config, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"input=.*a.jsonl holds no text: 0 empty documents, 0 bad records"):
        opened(data_config(tmp_path / "a.jsonl"))


def test_several_processes_make_it_once(data_config, make_texts, tmp_path, repository):
    config = data_config(write_jsonl(tmp_path / "a.jsonl", make_texts(200)))
    program = f"""
import logging, sys
from ctllm_jax.config.data import DataConfig
from ctllm_jax.data.sources import check_room, open_source
from ctllm_jax.dataset import build
made = build.finish
build.finish = lambda *given, **named: print("made") or made(*given, **named)
config = DataConfig.model_validate({config.model_dump()!r})
print(open_source("zh", config.sources["zh"], config, sequence_length=64).dataset.manifest.config_sha256)
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=repository, stdout=subprocess.PIPE, text=True)
                 for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(output.count("made") for output in outputs) == 1
    assert len({output.split()[-1] for output in outputs}) == 1
    assert len([entry for entry in (tmp_path / "cache").iterdir()]) == 1
