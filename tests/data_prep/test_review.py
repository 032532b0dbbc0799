"""Inputs and changes between two runs that once lost, doubled or kept something stale."""

import json
import os

import pytest
from pydantic import ValidationError

from ctllm_jax import cli
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import SourceInput
from data_prep.estimate import estimate
from data_prep.pipeline import plan, prepare
from data_prep.report import make_report
from data_prep.train_tokenizer import fit
from tests.data_prep.corpus import clean_texts, config, document, write_corpus


def write(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": ident, "text": text}) + "\n" for ident, text in documents.items()))


def train(path, size=600):
    path.write_bytes(fit([document(seed) for seed in range(50)], vocab_size=size, character_coverage=1.0))
    return str(path)


def source(folder, **more):
    return SourceInput(input=[str(folder)], rules="web", **more)


def test_a_file_that_two_sources_name_is_there_once(tmp_path):
    write(tmp_path / "raw/a.jsonl", {"x": document(1), "y": document(1)})
    options = config(tmp_path, input=[], sources={name: source(tmp_path / "raw") for name in "ab"},
                     minhash={"enabled": False})
    make_report(options, prepare(options), command="test")
    assert (list(clean_texts(tmp_path / "out", "a")), list(clean_texts(tmp_path / "out", "b"))) == (["x"], [])


def test_a_priority_of_many_digits_is_a_number(tmp_path):
    for name in "ab":
        write(tmp_path / name / "x.jsonl", {name: document(1)})
    prepare(config(tmp_path, input=[], sources={"a": source(tmp_path / "a", priority=10_000_001),
                                                "b": source(tmp_path / "b", priority=2_000_000)}))
    assert list(clean_texts(tmp_path / "out", "b")) == ["b"]


@pytest.mark.parametrize("name", ["x[1]", "a{b,c}", "中文 目录", "back\\slash"])
def test_an_output_whose_name_is_a_pattern_for_others(tmp_path, name):
    write_corpus(tmp_path / "raw", documents=20, files=2)
    prepare(config(tmp_path, output=str(tmp_path / name)))
    assert len(clean_texts(tmp_path / name)) == 20


def test_an_output_within_the_input_is_not_read(tmp_path):
    write_corpus(tmp_path / "raw", documents=20, files=2)
    options = config(tmp_path, output=str(tmp_path / "raw/out"))
    assert prepare(options).worked and not prepare(options).worked


def test_a_source_without_documents_keeps_no_old_dataset(tmp_path):
    for name, sentences in (("a", 40), ("b", 20)):
        write(tmp_path / name / "x.jsonl", {f"{name}{seed}": document(seed, sentences) for seed in range(3)})
    tokenizer = train(tmp_path / "t.model")
    options = {"input": [], "sources": {name: source(tmp_path / name) for name in "ab"}, "tokenizer": tokenizer,
               "deduplicate": False, "minhash": {"enabled": False}}
    prepare(config(tmp_path, **options))
    assert (tmp_path / "out/b/manifest.json").exists()
    prepare(config(tmp_path, **options, filter={"thresholds": {"web": {"length": {"low": 600}}}}))
    assert (tmp_path / "out/a/manifest.json").exists() and not (tmp_path / "out/b").exists()


def test_a_shard_that_was_deleted_is_made_again(tmp_path):
    write_corpus(tmp_path / "raw", documents=20, files=2)
    options = config(tmp_path, tokenizer=train(tmp_path / "t.model"))
    prepare(options)
    shard = next((tmp_path / "out/text").glob("*train*"))
    shard.unlink()
    prepare(options)
    assert shard.exists()


def test_files_of_the_same_name_are_read_again_in_the_same_process(tmp_path):
    write_corpus(tmp_path / "raw", documents=20, files=2)
    exam = tmp_path / "exam.txt"
    for seed, size in ((3, 600), (4, 700)):
        exam.write_text(document(seed)[40:80])
        ran = prepare(config(tmp_path, decontaminate={"files": [str(exam)]},
                             tokenizer=train(tmp_path / "t.model", size)))
        assert {f"d{index:04d}" for index in range(20)} - set(clean_texts(tmp_path / "out")) == {f"d{seed:04d}"}
        assert ran.manifests["text"].tokenizer.vocab_size == size


def test_a_report_is_of_the_files_that_there_are(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write(tmp_path / "raw" / f"{name}.jsonl", {name: document(seed)})
    command = ["prepare", f"input={tmp_path / 'raw'}", f"output={tmp_path / 'out'}", "rules=web", "workers=1"]
    report = tmp_path / "out/report.json"

    def records():
        assert cli.main(command) == 0
        return json.loads(report.read_bytes())["funnel"][0]["in"]

    assert records() == 2
    (tmp_path / "raw/b.jsonl").unlink()
    assert records() == 1
    before = report.stat().st_mtime_ns
    assert records() == 1 and report.stat().st_mtime_ns == before
    report.unlink()
    assert records() == 1


def test_an_estimate_of_a_long_book(tmp_path):
    (tmp_path / "raw").mkdir()
    text = document(1, 400) * 200
    (tmp_path / "raw/book.txt").write_text(text)
    options = config(tmp_path, rules="none", lines={"enabled": False})
    assert estimate(options, plan(options)).documents == 1


def test_a_file_name_that_is_not_utf_8_is_said(tmp_path):
    write_corpus(tmp_path / "raw", documents=20, files=2)
    os.rename(tmp_path / "raw/0.jsonl", os.fsencode(tmp_path / "raw") + "/中文.jsonl".encode("gbk"))
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        plan(config(tmp_path))


@pytest.mark.parametrize("name", ["stages", "clean"])
def test_a_source_is_not_named_as_a_folder_of_the_output(tmp_path, name):
    with pytest.raises(ValidationError, match=f"name={name}"):
        config(tmp_path, name=name)


def test_what_stands_in_the_place_of_the_output_is_not_touched(tmp_path):
    write_corpus(tmp_path / "raw", documents=20, files=2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="output="):
        prepare(config(tmp_path, output=str(tmp_path / "file")))
    own = tmp_path / "out/clean/mine.txt"
    own.parent.mkdir(parents=True)
    own.write_text("x")
    with pytest.raises(UserError, match=r"mine\.txt is in the way"):
        prepare(config(tmp_path))
    assert own.exists()
