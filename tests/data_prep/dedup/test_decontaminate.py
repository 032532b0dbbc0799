"""Evaluation text is found in documents, however it is written; every kind of evaluation file is read."""

import io
import json
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.config.errors import UserError
from data_prep.dedup.decontaminate import NgramSet, load, normalize, weight_of

pytestmark = pytest.mark.prep
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
    assert found.passages(QUESTION) == [normalize(QUESTION)]
    assert found.passages(f"题目：{QUESTION}答案：{ANSWER}。") == [normalize(QUESTION), ANSWER]
    assert found.passages("这里的文字不算，无论它有多长都不会被读进去") == []


@pytest.mark.parametrize("text", [
    "下列关于 光合作用\n的叙述中,正确的\u3000一项", "下列关于光合作用的“叙述中”。正确的一项",
    "下列关于光合作用的叙述中\u200b正确的一项", "下列關於光合作用的敘述中，正確的一項"])
def test_white_space_punctuation_and_traditional_characters_hide_nothing(tmp_path, text):
    (tmp_path / "a.txt").write_text(QUESTION + "\n葉綠體吸收光能並把它轉變成穩定的化學能", encoding="utf-8")
    found = load([tmp_path / "a.txt"])
    assert found.passages(text) == [normalize("下列关于光合作用的叙述中正确的一项")]
    assert found.passages(ANSWER) == [ANSWER]


def test_what_occurs_everywhere_is_no_evidence():
    questions = ["地址0000000000000处的内容是什么？请选出正确的一项", "Windows 2000/XP",
                 "Which of these is a binary search tree of minimal height in computer science?",
                 "以下哪一项是二叉查找树", "0000000000000", "哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈哈"]
    found = NgramSet(map(normalize, questions), 13)
    for text in ("内存地址从 0x00000000000000 开始，" + "0" * 90, "它在 Windows 2000/XP 上运行。", "哈" * 40,
                 "In computer science, a binary search tree is a rooted binary tree.", "查找树：二叉查找树"):
        assert found.passages(text) == []
    assert found.passages(f"内存。{questions[2]}内存。") == [normalize(questions[2])]
    passage, = found.passages(f"内存。{questions[0]}内存。")  # without those zeros that are n-grams of their own
    assert passage.endswith(normalize(questions[0][12:])) and passage in normalize(questions[0])


@pytest.mark.parametrize(("shared", "is_found"), [
    ("一二三四五六七八九十甲乙丙", False), ("一二三四五六七八九十甲乙丙丁", True),  # one n-gram, and more than one
    ("abcdefghijklmnopqrstuvwxyz" * 2, False), ("abcdefghijklmnopqrstuvwxyz" * 2 + "a", True)])
def test_a_passage_must_be_heavier_than_one_ngram(shared, is_found):
    found = NgramSet([f"天地玄黄宇宙洪荒{shared}日月盈昃辰宿列张"], 13)
    assert bool(found.passages(f"寒来暑往秋收冬藏，{shared}闰余成岁律吕调阳")) == is_found


@pytest.mark.parametrize(("whole", "is_found"), [
    ("一二三四五六七八九十甲乙丙", True), ("what is the capital city of the country of", False),
    ("what is the capital of the united kingdom of great britain", True)])
def test_a_short_string_counts_where_it_occurs_whole(whole, is_found):
    found = NgramSet([normalize(whole)], 13)
    assert bool(found.passages(f"寒来暑往，{whole}？闰余成岁")) == is_found
    assert not found.passages(f"寒来暑往，{normalize(whole)[1:]}？闰余成岁")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("甲乙丙丁戊ab1", min_size=3, max_size=24), min_size=1, max_size=4),
       st.text("甲乙丙丁戊ab1", max_size=60))
def test_passages_are_those_of_a_search_in_every_place(strings, text):
    found, size = NgramSet(strings, 5), 5
    known = {one[start:start + size] for one in strings for start in range(len(one) - size + 1)}
    begins = [len(set(text[place:place + size])) >= 2 and text[place:place + size] in known
              for place in range(len(text))]
    expected = []
    for place in (place for place, begin in enumerate(begins) if begin and not (place and begins[place - 1])):
        last = next(stop for stop in range(place, len(text)) if stop + 1 == len(text) or not begins[stop + 1])
        passage = text[place:last + size]
        whole = any(one in passage and weight_of(one) >= 0.75 * size for one in strings if len(one) >= size)
        if weight_of(passage) > size or whole:
            expected.append(passage)
    assert found.passages(text) == list(dict.fromkeys(expected))


def test_normalize_keeps_letters_digits_and_signs():
    assert normalize("Ａ ﬁ，x²＋1＝３！\n😀é\ud800") == "afix2+1=3😀é"


def test_no_file_matches_nothing():
    assert len(load([])) == 0 and load([]).passages(QUESTION) == []


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
