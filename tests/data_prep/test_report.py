"""The numbers of prepare's report against the documents that a run wrote."""

import json

from ctllm_jax.config.prepare import SourceInput
from data_prep.pipeline import prepare
from data_prep.report import make_report
from data_prep.report_page import render
from tests.data_prep.corpus import clean_texts, config, document, edited


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": f"{path.stem}{number}", "text": text}, ensure_ascii=False) + "\n"
                            for number, text in enumerate(texts)))


def test_what_stays_and_what_each_file_lost_is_what_was_written(tmp_path):
    question = "在一个直角三角形里两条直角边的平方和等于斜边的平方这就是勾股定理"
    write(tmp_path / "raw/a.jsonl", [document(1), document(2) + "\n更多内容请点击首页\n", document(3),
                                     "太短", question])
    write(tmp_path / "raw/b.jsonl", [document(1), edited(document(3), 0.001), "加微信领红包送礼" * 20, document(4),
                                     document(5) + question + "。", "首页登录\n" * 3 + "甲。\n" * 9])
    (tmp_path / "questions.txt").write_text(question)
    options = config(tmp_path, decontaminate={"files": [str(tmp_path / "questions.txt")]},
                     filter={"mode": "statistics", "samples": 50})
    report = make_report(options, prepare(options), command="test")
    written = clean_texts(tmp_path / "out")
    assert sorted(name[0] for name in written) == ["a", "a", "a", "b"]
    assert {row["file"][-7]: (row["records"], row["kept"], row["dropped"]) for row in report["inputs"]} == {
        "a": (5, 3, 2), "b": (6, 1, 5)}
    kept = [sample for sample in report["samples"] if sample["kept"]]
    assert {sample["id"]: sample["text"] for sample in kept} == {name: text[:600] for name, text in written.items()}
    dropped = {sample["id"] for sample in report["samples"] if not sample["kept"] and sample["stage"] != "lines"}
    assert dropped and not dropped & set(written)
    assert report["removed"] == {"text": {"lines_terminal_punctuation": 1}}
    empty = next(row for row in report["rules"] if row["name"] == "empty")
    assert empty["measured"] == 11 and empty["failed"] >= 1
    (tmp_path / "raw").rename(tmp_path / "moved")
    options = options.model_copy(update={"input": [str(tmp_path / "moved")]})
    again = make_report(options, prepare(options), command="test")["inputs"]
    assert [row["kept"] for row in again] == [row["kept"] for row in report["inputs"]]
    page = render(report)
    assert "Documents that stay" in page and "<b>empty</b>" in page


def test_a_file_of_two_sources_is_counted_for_each(tmp_path):
    write(tmp_path / "raw/a.jsonl", [document(1), document(2)])
    sources = {name: SourceInput(input=[str(tmp_path / "raw")], rules="web", priority=priority)
               for priority, name in enumerate(("first", "second"))}
    options = config(tmp_path, input=[], sources=sources)
    report = make_report(options, prepare(options), command="test")
    assert [(row["source"], row["records"], row["kept"], row["dropped"]) for row in report["inputs"]] == [
        ("first", 2, 2, 0), ("second", 2, 0, 2)]
