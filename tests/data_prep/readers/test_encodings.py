"""GB18030 and Big5 beside UTF-8: detected, forced, counted, and bad bytes put aside."""

import gzip

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.readers.encodings import detect_encoding

SIMPLIFIED = "我们的国家是一个大国，人民在这里生活。他们说：“今天的天气很好！”"
TRADITIONAL = "我們的國家是一個大國，人民在這裡生活。他們說：「今天的天氣很好！」"
CLASSICAL = "學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？人不知而不慍，不亦君子乎？"

NAMES = "张伟 王芳 李娜 刘洋 陈杰 杨静 赵磊 黄敏 周涛 吴霞 徐强 孙丽 马超 朱婷 胡军 郭艳"
NAMES_BIG5 = "陳志明 林美玲 黃國華 張淑芬 李建宏 王雅婷 吳俊傑 劉怡君 蔡佳穎 楊宗翰"
KOREAN = "대한민국의 국민이 되는 요건은 법률로 정한다. 국가는 재외국민을 보호할 의무를 진다."
RUSSIAN = "Все люди рождаются свободными и равными в своём достоинстве и правах."
JAPANESE = "日本国民は、正当に選挙された国会における代表者を通じて行動し、われらとわれらの子孫のために"


@pytest.mark.parametrize(("text", "codec", "name"), [
    (SIMPLIFIED, "utf-8", "utf-8"), (SIMPLIFIED, "utf-8-sig", "utf-8"), (SIMPLIFIED, "gb2312", "gb18030"),
    (SIMPLIFIED + "㐀", "gb18030", "gb18030"), (TRADITIONAL, "gbk", "gb18030"), (TRADITIONAL, "big5", "big5"),
    (TRADITIONAL + "嘅", "big5hkscs", "big5"), (CLASSICAL, "big5", "big5"), (CLASSICAL, "gb18030", "gb18030"),
    ("plain ASCII", "ascii", "utf-8"), ("", "ascii", "utf-8"), ("café, naïve, déjà vu", "latin-1", "utf-8"),
    (NAMES, "gb2312", "gb18030"), (NAMES_BIG5, "big5", "big5"), (KOREAN, "euc-kr", "utf-8"), (KOREAN, "cp949", "utf-8"),
    (RUSSIAN, "koi8-r", "utf-8"), (RUSSIAN, "cp1251", "utf-8"), (JAPANESE, "euc-jp", "utf-8"),
    (JAPANESE, "shift-jis", "utf-8")])
@pytest.mark.parametrize("lines", [1, 7])
def test_an_encoding_is_known_by_its_bytes(text, codec, name, lines):
    data = "\n".join([text] * lines).encode(codec)
    assert detect_encoding(data) == name
    assert detect_encoding(data[:-1]) == name, "a sample may end inside a character"


def test_a_few_bad_lines_do_not_decide():
    good = (SIMPLIFIED + "\n").encode()
    assert detect_encoding(good * 3 + SIMPLIFIED.encode("gbk") + b"\n" + good) == "utf-8"
    good = (SIMPLIFIED + "\n").encode("gbk")
    assert detect_encoding(good * 3 + SIMPLIFIED.encode() + b"\n" + good) == "gb18030"


@pytest.mark.parametrize(("encoding", "text"), [("gb18030", SIMPLIFIED), ("big5", TRADITIONAL), ("utf-8", SIMPLIFIED)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_files_of_an_encoding_are_read_in_it(tmp_path, read, as_lines, encoding, text, pack):
    (tmp_path / "a.jsonl").write_bytes(pack(as_lines("ASCII first", text, text * 2, encoding=encoding)))
    (tmp_path / "b.txt").write_bytes(pack((text + "\n").encode(encoding)))
    reading = read([tmp_path])
    assert reading.texts == ["ASCII first", text, text * 2, text + "\n"]
    assert [unit["encoding"] for unit in reading.units] == [encoding] * 2
    assert reading.tally.encodings == {encoding: 4}


def test_ranges_of_gb18030_begin_with_lines(tmp_path, read, as_lines):
    (tmp_path / "a.jsonl").write_bytes(as_lines(*[SIMPLIFIED] * 20, encoding="gb18030"))
    cut = read([tmp_path], unit_bytes=100)
    assert len(cut.units) > 5 and cut.texts == [SIMPLIFIED] * 20


def test_text_after_much_ascii_is_still_seen(tmp_path, read, as_lines):
    (tmp_path / "a.jsonl").write_bytes(as_lines(*["x" * 1000] * 300, SIMPLIFIED, encoding="gb18030"))
    assert read([tmp_path]).texts[-1] == SIMPLIFIED


def test_a_line_in_another_encoding_is_put_aside(tmp_path, read, as_lines):
    (tmp_path / "a.jsonl").write_bytes(as_lines(SIMPLIFIED, "b", SIMPLIFIED) + as_lines(SIMPLIFIED, encoding="gbk"))
    (tmp_path / "b.jsonl").write_bytes(as_lines(TRADITIONAL, "b", encoding="big5") + b'{"text": "\xff\xff"}\n')
    reading = read([tmp_path])
    assert reading.texts == [SIMPLIFIED, "b", SIMPLIFIED, TRADITIONAL, "b"]
    assert [(bad.position, bad.reason) for bad in reading.bad] == [
        (4, "invalid UTF-8 at byte 10 of the line"), (3, "invalid BIG5HKSCS at byte 10 of the line")]


def test_an_encoding_can_be_forced(tmp_path, read):
    (tmp_path / "a.txt").write_bytes("ÄÖ".encode("gb18030"))
    assert read([tmp_path]).bad != []
    (tmp_path / "a.txt").write_bytes("一丁".encode("gb18030"))
    assert read([tmp_path], encoding="gb18030").texts == ["一丁"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_unicode_with_a_mark_is_read_in_its_encoding(tmp_path, read, as_lines, encoding, pack):
    mark = "\ufeff" if encoding.endswith("be") else ""
    lines = as_lines("first", SIMPLIFIED, "三" * 70_000 + "😀").decode()
    broken = lines + '{"text": "half: '
    (tmp_path / "a.jsonl").write_bytes(pack((mark + broken).encode(encoding) + b"\x00"))
    (tmp_path / "b.txt").write_bytes(pack((mark + SIMPLIFIED).encode(encoding)))
    reading = read([tmp_path], unit_bytes=100)
    assert reading.texts == ["first", SIMPLIFIED, "三" * 70_000 + "😀", SIMPLIFIED]
    assert [bad.position for bad in reading.bad] == [4]
    assert reading.tally.encodings == {encoding.removesuffix("-be"): 4}


def test_nul_characters_are_dropped_and_counted(tmp_path, read, as_lines):
    (tmp_path / "a.jsonl").write_bytes(as_lines("one\0", "two").replace(b"two", b"t\0wo") + b"\0" * 9 + b"\n")
    (tmp_path / "b.txt").write_bytes("一\0二".encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p\0\0"]}), tmp_path / "c.parquet")
    reading = read([tmp_path])
    assert reading.texts == ["one", "two", "一二", "p"] and reading.bad == []
    assert reading.tally.left_out == {"NUL characters, left out of text that is kept": 1 + 1 + 9 + 1 + 2}
