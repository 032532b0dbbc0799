"""A small raw corpus with known copies, and what a run of the pipeline leaves, as bytes."""

import json
import random
from pathlib import Path

from ctllm_jax.config.prepare import PrepareConfig

WORDS = """今天 明天 昨天 上午 下午 晚上 早晨 春天 夏天 秋天 冬天 学校 老师 学生 同学 教室 图书 公园 花园 树木
河流 高山 大海 城市 乡村 工厂 农民 工人 医生 医院 护士 病人 健康 身体 精神 思想 文化 历史 科学 技术
研究 发展 经济 社会 国家 世界 人民 生活 工作 学习 朋友 家庭 父亲 母亲 孩子 兄弟 姐妹 爷爷 奶奶 邻居
街道 房屋 窗户 桌子 椅子 电脑 手机 电视 报纸 新闻 记者 作家 小说 诗歌 音乐 电影 演员 观众 比赛 运动
足球 篮球 游泳 跑步 天气 下雨 刮风 太阳 月亮 星星 天空 土地 森林 动物 小鸟 鱼儿 猫咪 问题 答案 方法
原因 结果 过程 开始 结束 喜欢 讨厌 希望 失望 高兴 难过 努力 认真 仔细 简单 复杂 重要 必须 可以 能够
应该 已经 正在 将要 非常 比较 特别 一直 经常 有时 忽然 终于 因为 所以 虽然 但是 如果""".split()
"""Common words of two characters: sentences of them pass the web rules."""
HAN = "".join(sorted(set("".join(WORDS))))


def sentence(draw, count=9):
    """Words without a common meaning, with a full stop."""
    return "".join(draw.choices(WORDS, k=count)) + "。"


def document(seed, sentences=40):
    """A document of about 800 characters that the web rules keep."""
    draw = random.Random(seed)
    return "".join(sentence(draw, draw.randint(6, 13)) for _ in range(sentences))


def edited(text, share, seed=0):
    """The text with this share of its characters replaced, in one run: near to it by Jaccard of shingles."""
    draw = random.Random(seed)
    count = max(1, int(share * len(text)))
    start = draw.randrange(len(text) - count)
    return text[:start] + "".join(draw.choices(HAN, k=count)) + text[start + count:]


def write_corpus(folder, *, documents=60, files=4, seed=0):
    """JSONL files of distinct documents, every tenth twice exactly and every tenth once more with a small edit."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [document(seed * 1000 + index) for index in range(documents)]
    copies = texts[::10]
    near = [edited(text, 0.001, seed=index) for index, text in enumerate(texts[5::10])]
    records = [{"id": f"d{index:04d}", "text": text} for index, text in enumerate([*texts, *copies, *near])]
    random.Random(seed).shuffle(records)
    for index in range(files):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records[index::files])
        (folder / f"{index}.jsonl").write_text(lines)
    return texts


def config(folder, **changes):
    """The pipeline over `folder`/raw, in this process, without a tokenizer."""
    return PrepareConfig(**{"input": [str(folder / "raw")], "output": str(folder / "out"), "rules": "web",
                            "workers": 1, "validation_fraction": 0.1, "record_tokens": 64, **changes})


def tree(folder, *names):
    """Every file below these folders, as bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for name in names
            for path in sorted((folder / name).rglob("*")) if path.is_file()}


def clean_texts(output, source="text"):
    """The clean documents of a source by id."""
    from data_prep.stages.common import read_jsonl_zst

    return {record["id"]: record["text"] for path in sorted(Path(output, "clean", source).glob("*.zst"))
            for record in read_jsonl_zst(path)}
