"""Evaluation text is found in documents, however it is written; every kind of evaluation file is read."""

import io
import json
import zipfile

import numpy as np
import pytest

from ctllm_jax.config.errors import UserError
from data_prep.dedup.decontaminate import NgramSet, load, normalize
from data_prep.dedup.minhash import shingle_hashes

QUESTION = "下列关于光合作用的叙述中，正确的一项是哪一个？"
ANSWER = "叶绿体吸收光能并把它转变成稳定的化学能"
CSV = f"id,question,A,answer\r\n0,\"{QUESTION}\",\"{ANSWER},\"\"是\"\"\",A\r\n"


def csv_zip(text=CSV):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("test/biology.csv", text)
        archive.writestr("README.md", "这里的文字不算，无论它有多长都不会被读进去")
    return buffer.getvalue()


def ngrams(text, n=13):
    text = normalize(text)
    return {text[index : index + n] for index in range(len(text) - n + 1)}


@pytest.mark.parametrize(("name", "content"), [
    ("ceval.zip", csv_zip()),
    ("ceval.csv", CSV.encode()),
    ("ceval.csv", CSV.encode("gb18030")),
    ("ceval.csv", CSV.encode("utf-8-sig")),
    ("ceval.jsonl", (json.dumps({"q": QUESTION, "choices": [{"text": ANSWER + "，是"}], "n": 1}) + "\n\n").encode()),
    ("ceval.json", json.dumps([{"q": QUESTION, "choices": {"A": ANSWER + "是"}}], ensure_ascii=False).encode()),
    ("ceval.txt", f"{QUESTION}\n短\n{ANSWER}是\n".encode()),
])
@pytest.mark.parametrize("folder", [False, True])
def test_every_kind_of_file_gives_the_same_ngrams(tmp_path, name, content, folder):
    (tmp_path / name).write_bytes(content)
    found = load([tmp_path if folder else tmp_path / name])
    assert len(found) == len(ngrams(QUESTION) | ngrams(ANSWER + "是"))
    assert found.matches(QUESTION) == len(ngrams(QUESTION))
    assert found.matches(f"题目：{QUESTION}答案：{ANSWER}。") == len(ngrams(QUESTION)) + len(ngrams(ANSWER))
    assert found.matches("这里的文字不算，无论它有多长都不会被读进去") == 0


@pytest.mark.parametrize("text", [
    "下列关于 光合作用\n的叙述中,正确的\u3000一项", "下列关于光合作用的“叙述中”。正确的一项",
    "下列关于光合作用的叙述中\u200b正确的一项"])
def test_white_space_and_punctuation_hide_nothing(tmp_path, text):
    (tmp_path / "a.txt").write_text(QUESTION + "\nThe Quick brown FOX １２３", encoding="utf-8")
    found = load([tmp_path / "a.txt"])
    assert found.matches(text) == len(ngrams(text)) > 0
    assert found.matches("the quick BROWN fox 123") == len(ngrams("thequickbrownfox123"))


def test_matches_are_distinct_ngrams_of_n_characters(tmp_path):
    (tmp_path / "a.txt").write_text("一二三四五六七八九十", encoding="utf-8")
    found = load([tmp_path / "a.txt"], ngram=8)
    assert len(found) == 3
    assert found.matches("一二三四五六七八") == 1 and found.matches("一二三四五六七") == 0
    assert found.matches("一二三四五六七八，" * 5) == 1
    assert found.matches("零一二三四五六七八九") == 2


def test_ngrams_are_counted_as_sets_count_them():
    draw = np.random.default_rng(0)
    texts = ["".join(chr(0x4E00 + point) for point in draw.integers(12, size=3000)) for _ in range(2)]
    found = NgramSet(shingle_hashes(texts[0], 5), 5)
    assert len(found) == len(ngrams(texts[0], 5))
    assert found.matches(texts[1]) == len(ngrams(texts[0], 5) & ngrams(texts[1], 5)) > 20
    assert found.matches(texts[0]) == len(found)


def test_normalize_keeps_letters_digits_and_signs():
    assert normalize("Ａ ﬁ，x²＋1＝３！\n😀é\ud800") == "afix2+1=3😀é"


def test_no_file_matches_nothing():
    assert len(load([])) == 0 and load([]).matches(QUESTION) == 0


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", b'{"q": "x"}\n{"q": ', "a.jsonl, line 2: not JSON"),
    ("a.json", b"[1, 2", "a.json: not JSON"),
    ("a.zip", b"PK nothing", "cannot read .*a.zip"),
    ("a.parquet", b"PAR1", "a.parquet is of no kind that is read: .jsonl, .json, .csv, .txt, .zip"),
    ("a.txt", b"\xff\xff\xff", "a.txt is neither UTF-8 nor GB18030"),
    ("a.txt", "短".encode(), "none of their 1 strings has 13 characters"),
    ("a.zip", b"PK\x05\x06" + bytes(18), "a.zip has no .jsonl"),
])
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load([tmp_path / name])


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*no.csv: No such file"):
        load([tmp_path / "no.csv"])
    with pytest.raises(UserError, match="has no .jsonl"):
        load([tmp_path])
