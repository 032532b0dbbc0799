"""Draw sentences from docs, docstrings and messages, for a reader who restates each one.

    python benchmarks/readability.py seed=0 count=70

A sample with a fixed seed shows whether the project's English is understood at first reading: someone who does not know
the code restates each sentence, and at least 63 of 70 should be understood. The output is numbered and names the file
and line of each sentence. Fields of f-strings are shown as {}.
"""

import ast
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
# Pages that are generated, written in Chinese, or a dated record.
LEFT_OUT = {"performance.md", "evaluation-tables.md", "guide.zh-CN.md", "log.md"}
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
PARAGRAPH = re.compile(r"(?:^[^\n]*\S[^\n]*\n?)+", re.M)
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*`{]*[A-Z{`])")
ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
MIN_WORDS = 5


class Sentence(NamedTuple):
    file: str
    line: int
    text: str


def sentences(file: str, line: int, text: str) -> Iterator[Sentence]:
    """Split a text into sentences of at least `MIN_WORDS` words of letters; `line` is where the text begins."""
    for paragraph in PARAGRAPH.finditer(text):
        first = line + text.count("\n", 0, paragraph.start())
        parts = re.split(r"\n(?=\s*(?:[-*]|\d+\.)\s)", paragraph.group())
        for part in parts:
            plain = re.sub(r"\s+", " ", ITEM.sub("", part, count=1) if ITEM.match(part) else part).strip()
            for sentence in SENTENCE_END.split(plain):
                if len(re.findall(r"[A-Za-z]{2,}", sentence)) >= MIN_WORDS and "</" not in sentence:
                    yield Sentence(file, first, sentence)
            first += part.count("\n") + 1


def of_page(path: Path) -> Iterator[Sentence]:
    """Sentences of a Markdown page, without its code, tables, headings and directives."""
    text = FENCE.sub(lambda match: re.sub(r"[^\n]", "", match.group()), path.read_text(encoding="utf-8"))
    text = re.sub(r"^(?:#|\||<!--).*$", "", text, flags=re.M)
    yield from sentences(str(path.relative_to(REPOSITORY)), 1, text)


def of_module(path: Path) -> Iterator[Sentence]:
    """Sentences of the docstrings and the longer strings of a Python file: errors, log lines, help texts."""
    name, tree = str(path.relative_to(REPOSITORY)), ast.parse(path.read_text(encoding="utf-8"))
    docstrings, inner = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                docstrings.add(node.body[0].value)
                yield from sentences(name, node.body[0].lineno, text)
        elif isinstance(node, ast.JoinedStr):
            inner.update(ast.walk(node))
            inner.remove(node)
    for node in ast.walk(tree):
        if node in docstrings or node in inner:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from sentences(name, node.lineno, node.value)
        elif isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield from sentences(name, node.lineno, text)


def draw(seed: int, count: int) -> list[Sentence]:
    """Draw `count` different sentences; the same seed gives the same ones as long as the texts stay."""
    found = [sentence for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
             if path.name not in LEFT_OUT for sentence in of_page(path)]
    for package in ("ctllm_jax", "data_prep"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            found.extend(of_module(path))
    unique = list({sentence.text: sentence for sentence in found if sentence.text.isascii()}.values())
    return random.Random(seed).sample(unique, count)


def main(words: list[str]) -> None:
    options = {"seed": 0, "count": 70} | {key: int(value) for key, _, value in (word.partition("=") for word in words)}
    for number, sentence in enumerate(draw(options["seed"], options["count"]), 1):
        print(f"{number:3}. {sentence.file}:{sentence.line}\n     {sentence.text}")


if __name__ == "__main__":
    main(sys.argv[1:])
