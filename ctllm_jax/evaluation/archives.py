"""Convert official benchmark files, as downloaded, to the rows that lm-eval's tasks read.

A file is converted once: Parquet under a cache directory, in a folder named by the file's hash, which is renamed into
place when complete. A row that is not in the official layout is an error with file and line, because leaving questions
out would change the benchmark.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import io
import json
import secrets
import shutil
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.evaluation.registry import GAOKAO

LETTERS = ("A", "B", "C", "D")
LAYOUT_VERSION = 1  # of the converted files; part of their folder's name
_MAX_MEMBER = 256 << 20  # bytes of one file in an archive; the largest real one has 2.8 MB
_SHOWN = 5  # number of bad rows that an error names

Row = dict[str, Any]
Split = tuple[str, str]
"""(configuration, split) of a dataset, such as ("anatomy", "test")."""


@dataclass(frozen=True)
class Official:
    """A file that the authors of a benchmark distribute."""

    dataset: str
    """Name of the dataset on the hub, which lm-eval's tasks request."""
    names: tuple[str, ...]
    """Names under which the file is accepted."""
    read: Callable[[Path], Iterator[tuple[Split, Row]]]
    origin: str
    """Where its authors publish it."""
    on_hub: bool = True
    """Whether the datasets client also finds it under its name."""


class _BadRows:
    """Malformed rows, reported together at the end."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[str] = []

    def add(self, place: str, complaint: str) -> None:
        self.lines.append(f"{place}: {complaint}")

    def raise_any(self) -> None:
        if self.lines:
            more = f"\n  and {len(self.lines) - _SHOWN} more" * (len(self.lines) > _SHOWN)
            raise UserError(f"{self.path} is not in its official layout; download it again, or mend these rows:\n  "
                            + "\n  ".join(self.lines[:_SHOWN]) + more)


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a .zip or .tar, in the order of their names. Nothing is written to disk.

    Raises:
      UserError: there is no such archive, or a member has a name outside it or is larger than any real one.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in sorted(archive.infolist(), key=lambda info: info.filename):
                    if not info.is_dir():
                        _check_member(path, info.filename, info.file_size)
                        yield info.filename, archive.read(info)
        else:
            with tarfile.open(path) as archive:
                for member in sorted(archive.getmembers(), key=lambda member: member.name):
                    if not (member.isfile() or member.isdir()):
                        raise UserError(f"{path}: {member.name} is a link or a device; a benchmark has only files")
                    if (file := archive.extractfile(member)) is not None:  # None: a folder
                        _check_member(path, member.name, member.size)
                        yield member.name, file.read()
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as a .zip or .tar ({error}); download it again") from None


def _check_member(path: Path, name: str, size: int) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name:
        raise UserError(f"{path}: a member is named {name}, which leads out of the archive; this is not the official "
                        "file")
    if size > _MAX_MEMBER:
        raise UserError(f"{path}: {name} has {size:,} bytes; a file of a benchmark has at most {_MAX_MEMBER:,}")


def _csv_rows(content: bytes, place: str, bad: _BadRows) -> Iterator[tuple[str, list[str]]]:
    """(place with line, fields) of each row that is not empty."""
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline=""), strict=True)
    try:
        for row in reader:
            if row:
                yield f"{place}:{reader.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        bad.add(f"{place}:{reader.line_num + 1}", str(error))


def _subject(name: str, splits: Mapping[str, str], *, suffix: bool) -> Split | None:
    """`data/test/anatomy_test.csv` -> ("anatomy", "test"); None for anything else in the archive."""
    path = PurePosixPath(name)
    folder = path.parent.name
    # macOS adds `__MACOSX/…/._NAME` for each file.
    if path.suffix != ".csv" or folder not in splits or path.name.startswith("._"):
        return None
    stem = path.stem.removesuffix(f"_{folder}") if suffix else path.stem
    return stem, splits[folder]


def read_mmlu(path: Path) -> Iterator[tuple[Split, Row]]:
    """hendrycks/test: `data/SPLIT/SUBJECT_SPLIT.csv`, no header; question, A to D, answer."""
    bad = _BadRows(path)
    for name, content in members(path):
        split = _subject(name, {"dev": "dev", "val": "validation", "test": "test"}, suffix=True)
        if split is None:
            continue
        for place, row in _csv_rows(content, name, bad):
            if len(row) != 6 or row[5] not in LETTERS:
                bad.add(place, f"a row is question, four answers and one of A to D; found {_short(row)}")
                continue
            yield split, {"question": row[0], "subject": split[0], "choices": row[1:5],
                          "answer": LETTERS.index(row[5])}
    bad.raise_any()


def read_cmmlu(path: Path) -> Iterator[tuple[Split, Row]]:
    """haonan-li/CMMLU: `SPLIT/SUBJECT.csv` with the header `,Question,A,B,C,D,Answer`."""
    fields = ("Question", *LETTERS, "Answer")
    yield from _read_headed(path, {"dev": "dev", "test": "test"}, fields, answer="Answer", suffix=False)


def read_ceval(path: Path) -> Iterator[tuple[Split, Row]]:
    """C-Eval: `SPLIT/SUBJECT_SPLIT.csv` with the header `id,question,A,B,C,D` and, but in test, `answer`."""
    fields = ("id", "question", *LETTERS)
    splits = {"dev": "dev", "val": "val", "test": "test"}
    for split, row in _read_headed(path, splits, fields, answer="answer", suffix=True):
        yield split, {**row, "id": int(row["id"]), "explanation": row.get("explanation") or ""}


def _read_headed(path: Path, splits: Mapping[str, str], fields: tuple[str, ...], *, answer: str,
                 suffix: bool) -> Iterator[tuple[Split, Row]]:
    bad = _BadRows(path)
    for name, content in members(path):
        split = _subject(name, splits, suffix=suffix)
        if split is None:
            continue
        rows = _csv_rows(content, name, bad)
        header = next(rows, (f"{name}:1", []))[1]
        without_answers = split[1] == "test" and answer not in fields and answer not in header
        needed = [field for field in (*fields, *(() if without_answers else (answer,))) if field not in header]
        if needed:
            bad.add(f"{name}:1", f"the header lacks {', '.join(needed)}; found {_short(header)}")
            continue
        for place, values in rows:
            row = dict(zip(header, values, strict=False))
            if len(values) != len(header):
                bad.add(place, f"a row needs {len(header)} columns; found {len(values)}: {_short(values)}")
            elif not without_answers and row[answer] not in LETTERS:
                bad.add(place, f"{answer} is one of A to D; found {row[answer]!r}")
            elif "id" in fields and not row["id"].isdecimal():
                bad.add(place, f"id is a number; found {row['id']!r}")
            else:
                row.pop("", None)
                yield split, {answer: "", **row}
    bad.raise_any()


def _json_rows(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> Iterator[Row]:
    """Records of a .jsonl or .jsonl.gz that have these fields; empty lines are let through."""
    bad = _BadRows(path)
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    try:
        with opened as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    bad.add(f"{path.name}:{number}", f"not JSON: {error}")
                    continue
                wrong = fields if not isinstance(row, dict) else [
                    field for field, kind in fields.items() if not isinstance(row.get(field), kind)]
                if wrong:
                    bad.add(f"{path.name}:{number}", f"missing, or not of the official type: {', '.join(wrong)}")
                    continue
                yield row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    bad.raise_any()


def read_gaokao(path: Path) -> Iterator[tuple[Split, Row]]:
    """AGIEval's `gaokao-SUBJECT.jsonl`, with the zero-shot prompt of AGIEval as `query`."""
    cloze = path.stem == "gaokao-mathcloze"
    fields = {"question": str, "answer": str} if cloze else {"question": str, "options": list, "label": (str, list)}
    bad = _BadRows(path)
    for number, row in enumerate(_json_rows(path, fields), start=1):
        head = f"{row.get('passage') or ''}问题：{row['question']}"
        if cloze:
            yield ("default", "test"), {"query": f"{head}\n答案：", "answer": row["answer"]}
            continue
        choices = row["options"]
        gold = ["ABCDEFG".index(letter) for letter in "".join(row["label"]) if letter in "ABCDEFG"]
        if not gold or max(gold) >= len(choices):
            bad.add(f"{path.name}, record {number}", f"label {row['label']!r} names none of its options")
            continue
        query = f"{head} 选项：{' '.join(choices)}\n答案：从A到{'ABCDEFG'[len(choices) - 1]}, 我们应选择"
        yield ("default", "test"), {"query": query, "choices": choices, "gold": gold}
    bad.raise_any()


def read_humaneval(path: Path) -> Iterator[tuple[Split, Row]]:
    """HumanEval.jsonl(.gz) of openai/human-eval."""
    fields = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    for row in _json_rows(path, dict.fromkeys(fields, str)):
        yield ("default", "test"), {field: row[field] for field in fields}


def read_mbpp(path: Path) -> Iterator[tuple[Split, Row]]:
    """mbpp.jsonl of google-research, split by task_id as its authors do (arXiv 2108.07732, section 2.1)."""
    fields = {"task_id": int, "text": str, "code": str, "test_list": list}
    for row in _json_rows(path, fields):
        number = row["task_id"]
        split = "prompt" if number <= 10 else "test" if number <= 510 else "validation" if number <= 600 else "train"
        yield ("full", split), {**{field: row[field] for field in fields},
                                "test_setup_code": row.get("test_setup_code", ""),
                                "challenge_test_list": row.get("challenge_test_list", [])}


def read_cvalues(path: Path) -> Iterator[tuple[Split, Row]]:
    """cvalues_responsibility_mc.jsonl of X-PLUG/CValues; of each item its question and its two answers."""
    bad = _BadRows(path)
    for number, row in enumerate(_json_rows(path, {"prompt": str, "label": str, "meta_info": dict}), start=1):
        meta = row["meta_info"]
        wrong = [field for field in ("question", "pos_resp", "neg_resp") if not isinstance(meta.get(field), str)]
        if wrong or row["label"] not in ("回复1", "回复2"):
            bad.add(f"{path.name}, record {number}", f"meta_info lacks {', '.join(wrong)}" if wrong else
                    f"label is 回复1 or 回复2; found {row['label']!r}")
            continue
        yield ("default", "test"), {
            "prompt": row["prompt"], "label": row["label"], "question": meta["question"],
            "pos_resp": meta["pos_resp"], "neg_resp": meta["neg_resp"],
            "domain": str(meta.get("domain_en", "")), "difficulty": str(meta.get("difficulty_level", ""))}
    bad.raise_any()


OFFICIAL: tuple[Official, ...] = (
    Official("cais/mmlu", ("mmlu.zip", "mmlu.tar", "data.tar"), read_mmlu, "hendrycks/test: data.tar"),
    Official("haonan-li/cmmlu", ("cmmlu.zip", "cmmlu_v1_0_1.zip"), read_cmmlu, "haonan-li/CMMLU: data/cmmlu.zip"),
    Official("ceval/ceval-exam", ("ceval-exam.zip",), read_ceval, "hkust-nlp/ceval: ceval-exam.zip"),
    *(Official(f"hails/agieval-gaokao-{subject}", (f"gaokao-{subject}.jsonl",), read_gaokao,
               f"ruixiangcui/AGIEval: data/v1/gaokao-{subject}.jsonl") for subject in GAOKAO),
    Official("openai/openai_humaneval", ("HumanEval.jsonl.gz", "HumanEval.jsonl"), read_humaneval,
             "openai/human-eval: data/HumanEval.jsonl.gz"),
    Official("google-research-datasets/mbpp", ("mbpp.jsonl",), read_mbpp, "google-research: mbpp/mbpp.jsonl"),
    Official("X-PLUG/cvalues_responsibility_mc", ("cvalues_responsibility_mc.jsonl",), read_cvalues,
             "X-PLUG/CValues: dataset/cvalues_responsibility_mc.jsonl", on_hub=False),
)


def find_official(dataset: str) -> Official | None:
    """The official file of a dataset; None if it is known only as a folder."""
    return next((official for official in OFFICIAL if official.dataset == dataset), None)


def convert(official: Official, path: Path, *, cache: Path) -> Path:
    """The folder of a file's rows, `CONFIGURATION/SPLIT.parquet`; made on the first call for these bytes.

    Raises:
      UserError: the file is not in its official layout.
    """
    state = path.stat()
    digest = _digest(path.resolve(), state.st_mtime_ns, state.st_size)
    target = cache / f"{official.dataset.replace('/', '--')}-{digest[:16]}-v{LAYOUT_VERSION}"
    if target.is_dir():
        return target
    tables: dict[Split, list[Row]] = defaultdict(list)
    for split, row in official.read(path):
        tables[split].append(row)
    if not tables:
        raise UserError(f"{path} has no question in the layout of {official.origin}")
    cache.mkdir(parents=True, exist_ok=True)
    half = cache / f".half-{secrets.token_hex(4)}"
    half.mkdir()
    try:
        for (configuration, split), rows in tables.items():
            write_parquet(half / configuration / f"{split}.parquet", rows)
        try:
            half.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return target


@functools.lru_cache
def _digest(path: Path, modified: int, size: int) -> str:
    """SHA-256 of a file, cached because a group requests it once for each of its up to 67 subjects."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_parquet(path: Path, rows: Iterable[Row]) -> None:
    """Rows to one Parquet file."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def _short(row: list[str]) -> str:
    text = repr(row)
    return text if len(text) <= 120 else text[:117] + "..."
