"""CHC-Bench's and MT-Bench's layouts, in every kind of file; what is no question is named by file and row."""

import json
from pathlib import Path

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.questions import CATEGORIES, canonical, choose, hash_of, in_order, read_questions
from tests.data.test_conversations import write_lines

MT_BENCH = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval" / "mt-bench-zh" / "question.jsonl"

# Names of the released splits, and how many questions each has.
CHC_BENCH = {"writting": 33, "social": 20, "science": 20, "roleplaying": 20, "read_compre": 30, "math": 34,
             "hard_case": 37, "coding": 20}


def chc_row(category, number):
    return {"source": "自拟", "category": category, "type": "问答", "multi_choice": "",
            "query": f"{category} 第{number}问？"}


def chc_rows():
    return [chc_row(category, number) for category, count in CHC_BENCH.items() for number in range(count)]


def content(questions):
    return [question._replace(source="") for question in questions]


def test_chc_bench_is_the_same_from_json_lines_json_and_parquet(tmp_path):
    rows = chc_rows()
    lines = read_questions(write_lines(tmp_path / "chc.jsonl", rows))
    assert len(lines) == 214 and len({question.id for question in lines}) == 214
    (tmp_path / "chc.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert content(read_questions(tmp_path / "chc.json")) == content(lines)
    # In the paper's order, by the names that both benchmarks share.
    assert in_order(question.category for question in lines) == list(CATEGORIES)[:8]
    counts = {canonical(name): count for name, count in CHC_BENCH.items()}
    assert {name: sum(question.category == name for question in lines) for name in counts} == counts
    assert lines[0] == ("writing-1", "writing", ("writting 第0问？",), (), f"{tmp_path / 'chc.jsonl'}:1")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "chc.parquet")
    assert content(read_questions(tmp_path / "chc.parquet")) == content(lines)


def test_splits_may_be_files_whose_rows_say_something_finer(tmp_path):
    folder = tmp_path / "chc"
    folder.mkdir()
    for split, count in CHC_BENCH.items():
        rows = [{**chc_row(split, number), "category": "多音字" if split == "hard_case" else None} for number in
                range(count)]
        (folder / f"{split}-00000-of-00001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    apart, together = read_questions(folder), read_questions(write_lines(tmp_path / "all.jsonl", chc_rows()))
    assert [question.category for question in apart] == [question.category for question in together]
    assert hash_of(apart) == hash_of(together) == hash_of(reversed(together)) != hash_of(together[1:])


def test_mt_bench_has_two_turns_and_references(tmp_path):
    rows = [{"question_id": 101, "category": "zh_reasoning", "turns": ["一？", "二？"], "reference": ["甲", "乙"]},
            {"question_id": 81, "category": "zh_writing", "turns": ["三？", "四？"]},
            {"question_id": 102, "category": "reasoning", "turns": ["五？", "六？"], "reference": ["", "没有第一个"]}]
    questions = read_questions(write_lines(tmp_path / "mt.jsonl", rows))
    assert [question[:4] for question in questions] == [
        ("81", "writing", ("三？", "四？"), ()), ("101", "reasoning", ("一？", "二？"), ("甲", "乙")),
        ("102", "reasoning", ("五？", "六？"), ())]


def test_real_mt_bench_in_chinese():
    if not MT_BENCH.exists():
        pytest.skip(f"no {MT_BENCH.name} of MT-Bench beside the checkout")
    questions = read_questions(MT_BENCH)
    assert len(questions) == 80 and all(len(question.turns) == 2 for question in questions)
    assert {question.category for question in questions} <= set(CATEGORIES)
    referenced = [question.category for question in questions if question.references]
    # All of reasoning and math; fewer of coding and STEM.
    assert referenced.count("reasoning") == referenced.count("math") == 10 and len(referenced) > 22


@pytest.mark.parametrize(("row", "complaint"), [
    ({"category": "math"}, "no question: a row has query, question, prompt or turns; this one has category"),
    ({"query": " "}, "a question must be a text, and not empty"), ({"query": 7}, "must be a text"),
    ({"turns": []}, "one or two texts"), ({"turns": ["一", "二", "三"]}, "one or two texts"),
    ({"turns": ["一"], "reference": ["甲", "乙"]}, "a list of at most 1 text"),
    ({"turns": ["一"], "reference": {"a": 1}}, "reference must be"),
    ({"query": "一", "category": 3}, "category must be"),
    ({"query": "一", "question_id": [1]}, "question_id must be"),
    ({"query": "一", "context": "文"}, "field 'context' changes what is asked"),
    ({"query": "一", "images": ["a.png"]}, "field 'images' changes"),
    ({"query": "一", "question_id": 7}, "question_id 7 is also that of"), ("{", "malformed JSON"),
    ([1], "not an object"), ({"query": "a\ud800"}, "half of a surrogate pair"),
], ids=str)
def test_what_is_no_question_is_named_by_file_and_row(row, complaint, tmp_path):
    path = tmp_path / "set.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text(json.dumps({"query": "好？", "question_id": "7"}) + "\n\n" + text)
    with pytest.raises(UserError, match=complaint) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:3: ") and "max_bad" not in str(caught.value)


def test_a_part_of_a_set(tmp_path):
    questions = read_questions(write_lines(tmp_path / "chc.jsonl", chc_rows()))
    assert [question.id for question in choose(questions, categories=["role-playing", "writting"], limit=2)] == [
        "writing-1", "writing-2", "roleplay-1", "roleplay-2"]
    with pytest.raises(UserError, match="categories=poetry: there are writing, humanities"):
        choose(questions, categories=["poetry"])


def test_rows_without_a_category_have_that_of_their_file(tmp_path):
    assert [question.category for question in read_questions(write_lines(tmp_path / "诗词.jsonl", [{"prompt": "背"}]))
            ] == ["诗词"]
    with pytest.raises(UserError, match="does not exist"):
        read_questions(tmp_path / "none.jsonl")
