"""Read files of dialogues as messages, in the layouts that `layouts.DIALOGUES` describes. No jax.

Rows of preference pairs (`chosen` and `rejected`, or an `output` of two) are read too: their chosen answer counts.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.folders import files_below
from ctllm_jax.data.chat import Message
from ctllm_jax.data.layouts import DIALOGUES, Dropped, check_fields, dialogue_of, kind_of, unread_fields
from ctllm_jax.dataset.text import BOM, Quarantine, read_json_lines

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
          ("instruction", "response"), *((name, "chosen") for name in ("prompt", "question", "query", "instruction")))
_EXPECTED = ("messages or conversation [{role, content}], conversations [{from, value}], instruction + output, or "
             + ", ".join(" + ".join(pair) for pair in _PAIRS[:5]))
_FIRST_LINES = 100  # in which a whole one is looked for
logger = logging.getLogger(__name__)


class Dialogue(NamedTuple):
    """Messages that end with an answer, and their place: the line, or the number in an array or table, from 1."""

    messages: tuple[Message, ...]
    file: Path
    row: int


class Rows(NamedTuple):
    """The usable items made from rows, the number of rows read, and rows left out by reason."""

    parsed: list[Any]
    rows: int
    dropped: dict[str, int]


class Conversations(NamedTuple):
    """The dialogues, the layout of each file in words, rows read, rows left out by reason."""

    dialogues: list[Dialogue]
    layouts: dict[str, str]
    rows: int
    dropped: dict[str, int]


class _Named(Quarantine):
    """A `Quarantine` that also logs the place of each row."""

    def put(self, file: Path, line: int, reason: str, raw: bytes = b"") -> None:
        """Set one record aside."""
        super().put(file, line, reason, raw)
        logger.warning("%s:%d is left out: %s", file, line, reason)


def read_conversations(path: Path | str, *, layout: str | None = None, max_bad: int = 0,
                       quarantine: Path | None = None) -> Conversations:
    """Read all dialogues of a file, or of the files below a folder in order of their paths.

    A row without an answer, with an empty question, or with a field that cannot be used (`layouts.DIALOGUES`) is left
    out and counted; messages after the last answer are removed. A row that cannot be read counts against `max_bad`, and
    is listed in the file `quarantine` if given. Raises UserError if there are more, or if no layout is recognized, with
    the fields that were seen.
    """
    layouts: dict[str, str] = {}
    tables: dict[Path, dict[str, str]] = {}
    parse_messages = message_parser(layout, layouts, tables)

    def parse(record: dict, file: Path, row: int) -> Dialogue:
        return Dialogue(up_to_last_answer(parse_messages(record, file, row)), file, row)

    read = read_rows(path, parse, max_bad=max_bad, quarantine=quarantine, tables=tables)
    if not read.parsed:
        raise UserError(f"{path} holds no dialogue with an answer ({read.rows} rows, {read.dropped or 'all empty'})")
    return Conversations(read.parsed, layouts, read.rows, read.dropped)


def message_parser(layout: str | None, layouts: dict[str, str], tables: dict[Path, dict[str, str]]
                   ) -> Callable[[dict, Path, int], list[Message]]:
    """Return `(record, file, row) -> all messages of the row`, unchanged.

    If the layout is None, it is detected from the file's first row. `layouts` receives it in words, and `tables` its
    fields. Raises ValueError or `Dropped` for a row without messages, and UserError if no layout is recognized, with
    the fields seen.
    """
    detected: dict[Path, str] = {}

    def parse(record: dict, file: Path, row: int) -> list[Message]:
        found = layout or detected.get(file) or _detected(record, file, row)
        detected[file], tables[file] = found, DIALOGUES[found]
        if str(file) not in layouts:
            layouts[str(file)] = _in_words(record, found)
            logger.info("%s: %s", file, layouts[str(file)])
        check_fields(record, DIALOGUES[found])
        return _PARSERS[found](record)

    return parse


def read_rows(path: Path | str, parse: Callable[[dict, Path, int], Any], *, max_bad: int = 0,
              quarantine: Path | None = None, tables: Mapping[Path, dict[str, str]] | None = None) -> Rows:
    """Apply `parse(record, file, row)` to every row of a file, or of the files below a folder in order of their paths.

    A row for which it raises `Dropped` is counted by reason. A row for which it raises ValueError is set aside, as is
    one that is not a JSON object. Fields that are missing from the file's entry in `tables` are reported once. A
    UserError is passed on, and also raised if more than `max_bad` rows were set aside.
    """
    bad = _Named(quarantine, max_bad)
    parsed: list[Any] = []
    dropped: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for file in _files(Path(path)):
        for row, record in _records(file, bad):
            try:
                if not isinstance(record, dict):
                    raise ValueError(f"not an object but {type(record).__name__}")
                parsed.append(parse(record, file, row))
            except Dropped as reason:
                dropped[str(reason)] += 1
            except ValueError as error:
                if isinstance(error, UserError):
                    raise
                bad.put(file, row, str(error), json.dumps(record, ensure_ascii=True, default=str).encode())
            if isinstance(record, dict) and file in (tables or {}):
                unread.update(unread_fields(record, tables[file]))
    if bad.count:
        dropped["unreadable"] = bad.count
    rows = len(parsed) + dropped.total()
    if dropped:
        logger.warning("%s: of %d rows, left out: %s", path, rows,
                       ", ".join(f"{count} ({reason})" for reason, count in sorted(dropped.items())))
    if unread:
        logger.warning("%s: fields that are not read: %s", path,
                       ", ".join(f"{name} ({count} rows)" for name, count in unread.most_common()))
    return Rows(parsed, rows, dict(sorted(dropped.items())))


def first_record(path: Path | str) -> dict[str, Any] | None:
    """The first JSON object or table row of a file, or of the files below a folder; None if there is none, or if the
    file has another format."""
    try:
        for file in _files(Path(path)):
            for _, record in _records(file, Quarantine(None, max_bad=_FIRST_LINES)):
                if isinstance(record, dict):
                    return record
    except UserError:
        return None
    return None


def detect_layout(record: dict[str, Any]) -> str | None:
    """Return the layout that matches the fields of a row, or None."""
    def entries(name: str) -> dict:
        value = record.get(name)
        return value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}

    for name in ("messages", "conversation", "conversations"):
        if {"role", "content"} <= entries(name).keys():
            return "messages"
        if {"from", "value"} <= entries(name).keys():
            return "sharegpt"
    if "instruction" in record and "output" in record:
        return "alpaca"
    # Preference pairs whose answers are whole dialogues, or follow a prompt.
    if {"role", "content"} <= entries("chosen").keys():
        return "messages"
    return "prompt" if _pair_of(record) is not None else None


def _detected(record: dict, file: Path, row: int) -> str:
    layout = detect_layout(record)
    if layout is None:
        seen = ", ".join(f"{name} ({kind_of(value)})" for name, value in list(record.items())[:12]) or "none"
        raise UserError(f"{file}:{row}: no known layout of dialogues; fields seen: {seen}; needed: {_EXPECTED}")
    return layout


def _in_words(record: dict, layout: str) -> str:
    shown = f"{layout} ({', '.join(list(record)[:8])})"
    pairs = "chosen" in record or isinstance(record.get("output"), list)
    return shown + (", the chosen answer of each pair" if pairs else "")


def _from_list(record: dict) -> list[Message]:
    """messages and sharegpt."""
    if not any(name in record for name in ("messages", "conversations", "conversation", "chosen")):
        raise ValueError(f"no field messages or conversations; its fields are {', '.join(record) or 'none'}")
    return dialogue_of(record, DIALOGUES["messages"], question="prompt" if record.get("prompt") is not None else None,
                       answer="chosen" if record.get("chosen") is not None else None)


def _from_alpaca(record: dict) -> list[Message]:
    for name in ("instruction", "output"):
        if name not in record:
            raise ValueError(f"no field {name!r}; its fields are {', '.join(record) or 'none'}")
    return dialogue_of(record, DIALOGUES["alpaca"], question="instruction", answer="output")


def _from_pair(record: dict) -> list[Message]:
    pair = _pair_of(record)
    if pair is None:
        raise ValueError(f"no fields such as prompt and completion; its fields are {', '.join(record) or 'none'}")
    return dialogue_of(record, DIALOGUES["prompt"], question=pair[0], answer=pair[1])


def _pair_of(record: dict) -> tuple[str, str] | None:
    found = [pair for pair in _PAIRS if set(pair) <= record.keys()]
    # Every row of a table has all columns, with null if the row has no such field.
    return next((pair for pair in found if record[pair[0]] is not None), found[0] if found else None)


_PARSERS = {"messages": _from_list, "sharegpt": _from_list, "alpaca": _from_alpaca, "prompt": _from_pair}


def up_to_last_answer(messages: list[Message]) -> tuple[Message, ...]:
    """The messages up to the last answer, if it has a weight above 0. An empty system prompt counts as none."""
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    while messages and not (messages[-1].role == "assistant" and messages[-1].content.strip()):
        messages = messages[:-1]
    if not messages:
        raise Dropped("no answer")
    if any(message.role == "system" for message in messages[1:]):
        raise Dropped("system prompt after the first message")
    if not all(message.content.strip() for message in messages):
        raise Dropped("an empty message before the last answer")
    if all(message.role != "user" for message in messages):
        raise Dropped("no question")
    return tuple(messages)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = [file for file in files_below(path) if file.name.endswith(SUFFIXES)]
        if not files:
            raise UserError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        return files
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    return [path]


def _records(file: Path, bad: Quarantine) -> Iterator[tuple[int, Any]]:
    """(number, row) of a file. A .json file holds one array, or JSON lines."""
    if file.suffix == ".parquet":
        yield from _parquet_records(file)
        return
    if file.suffix == ".json":
        data = file.read_bytes().removeprefix(BOM)
        if data.lstrip()[:1] == b"[":
            try:
                yield from enumerate(json.loads(data.decode("utf-8")), 1)
            except UnicodeDecodeError as error:
                line = data.count(b"\n", 0, error.start) + 1
                raise UserError(f"{file}:{line}: invalid UTF-8 in a JSON array") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{error.lineno}: malformed JSON array: {error.msg}") from None
            except RecursionError:
                raise UserError(f"{file}: malformed JSON array: nested too deeply") from None
            return
    for line, record, _, _ in read_json_lines(file, bad):
        yield line, record


def _parquet_records(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs the package pyarrow: pip install 'ctllm-jax[prep]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            row = 0
            for batch in table.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: the Parquet file is damaged: {error}") from None
