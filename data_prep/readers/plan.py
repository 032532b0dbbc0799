"""The plan of reading: which files, what they hold, and the units they are cut into."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import RESERVED_NAMES, PrepareConfig, SourceInput
from ctllm_jax.dataset.text import BOM
from data_prep.readers import fields, files, lines, parquet
from data_prep.readers.encodings import CODECS, detect_encoding, line_codec
from data_prep.readers.files import InputFile, Recognised
from data_prep.readers.unit import InputUnit

UNIT_BYTES = 2**26
_THREADS = 8
_SAMPLES = 32
_MADE = (*RESERVED_NAMES, "quarantine.jsonl", "report.json", "report.html")
logger = logging.getLogger(__name__)


class _Looked(NamedTuple):
    """What was seen of a file. `candidates`: names that may be its text; `known`: whether any record could be read."""

    file: InputFile
    kind: str | None
    compression: str | None
    contradicts: bool = False
    encoding: str | None = None
    names: Sequence[str] = ()
    candidates: Sequence[str] = ()
    samples: Sequence[dict] = ()
    layout: parquet.Layout | None = None


def plan_files(source_name: str, source: SourceInput, config: PrepareConfig, *, unit_bytes: int = UNIT_BYTES
               ) -> list[InputUnit]:
    """The units of a source, in a fixed order: by file, then by place in it.

    Uncompressed JSON lines and Parquet are cut into units of about `unit_bytes`; everything else is a unit a file.
    Files of other kinds in a folder are left out with a warning; so are empty ones. UserError for an input that does
    not exist, holds no file that can be read, or whose text field is unknown or ambiguous.
    """
    from data_prep.readers.read import sample_of

    listed = _without_output(files.list_files(source.input, links=config.links), config.output)
    wanted = [file for file in listed if file.size and files.may_be_read(file)]
    given = source.text_field or config.text_field
    with ThreadPoolExecutor(_THREADS) as pool:
        looked = list(pool.map(lambda file: _look(file, config.encoding, given), wanted))
        taken = [one for one in looked if one.kind is not None]
        _tell_left_out(source, listed, [one.file for one in looked if one.kind is None])
        if not taken:
            raise UserError(f"{_key(source_name, config, 'input')}={', '.join(source.input)} holds no file that can be "
                            f"read: JSON lines (.jsonl, .gz, .zst), Parquet, plain text (.txt), WET or WARC")
        text_fields = _text_fields(taken, source_name, config, given)
        units = [unit for one in taken for unit in _units(source_name, one, text_fields[one.file.file], unit_bytes)]
        firsts = {unit["file"]: unit for unit in reversed(units)}
        samples = dict(zip(firsts, pool.map(lambda unit: sample_of(unit, config), firsts.values()), strict=True))
    return [{**unit, "sample": samples[unit["file"]]} for unit in units]


def describe(units: Sequence[InputUnit]) -> list[dict]:
    """What was recognised, a row per file: source, file, kind, compression, encoding, text_field, bytes, units, and
    the start of the first record (`sample`, or None where none could be read)."""
    rows: dict[tuple[str, str], dict] = {}
    for unit in units:
        row = rows.setdefault((unit["source"], unit["file"]), {
            "source": unit["source"], "file": unit["file"], "kind": unit["kind"], "compression": unit["compression"],
            "encoding": unit["encoding"], "text_field": unit["text_field"], "bytes": unit["file_size"], "units": 0,
            "sample": unit["sample"]})
        row["units"] += 1
    return list(rows.values())


def _look(file: InputFile, encoding: str, given: str | None) -> _Looked:
    try:
        seen = files.recognise(file)
    except OSError as error:
        raise UserError(f"{file.file} cannot be opened: {error}") from error
    kind = seen.kind
    if kind == "parquet":
        layout = parquet.layout(file.file)
        return _Looked(file, kind, None, seen.contradicts, None, layout.columns if layout else (),
                       layout.candidates if layout else (), layout=layout)
    if kind not in ("jsonl", "text"):
        return _Looked(file, kind, seen.compression, seen.contradicts)
    encoding = seen.unicode or (detect_encoding(seen.head) if encoding == "auto" else encoding)
    if kind == "text":
        return _Looked(file, kind, seen.compression, seen.contradicts, encoding)
    samples = list(_sample_lines(seen, encoding))
    names = list(dict.fromkeys(name for values in samples for name in values))
    candidates = fields.text_candidates(samples)
    if files.suffix_of(file.name) == ".json" and not file.explicit and not (
            candidates or given and any(fields.lookup(values, given) is not fields.MISSING for values in samples)):
        return _Looked(file, None, None)  # A .json without text describes other files: dataset_info.json.
    return _Looked(file, kind, seen.compression, seen.contradicts, encoding, names, candidates, samples)


def _sample_lines(seen: Recognised, encoding: str) -> Iterator[dict]:
    for line in seen.head.removeprefix(BOM).split(b"\n")[:_SAMPLES]:
        try:
            values = json.loads(line.decode(line_codec(encoding)))
        except (ValueError, RecursionError):
            continue  # Bad lines are put aside when they are read; the last may be cut here.
        if isinstance(values, dict):
            yield values


def _without_output(listed: list[InputFile], output: str) -> list[InputFile]:
    """The files of a source but for what a former run has made, where `output` lies in a folder of the input, or in one
    that a link there leads to."""
    made = [Path(output).resolve() / name for name in _MADE] if output else []
    return [file for file in listed if file.explicit or files.is_remote(file.file)
            or not any(path.is_relative_to(one) for path in [Path(file.file).resolve()] for one in made)]


def _key(source_name: str, config: PrepareConfig, key: str) -> str:
    return f"sources.{source_name}.{key}" if config.sources else key


def _text_fields(taken: Sequence[_Looked], source_name: str, config: PrepareConfig, given: str | None
                 ) -> dict[str, str | None]:
    """The text field of each file. One without a readable sample has the field of most others."""
    key = _key(source_name, config, "text_field")
    asked = [one for one in taken if one.kind in ("jsonl", "parquet")]
    if given:
        with_names = [one for one in asked if one.names]
        if with_names and not any(_holds(one, given) for one in with_names):
            raise UserError(f"{key}={given}: no such field in {with_names[0].file.file}; its fields are "
                            f"{', '.join(with_names[0].names[:12])}")
        return {one.file.file: given if one in asked else None for one in taken}
    for one in asked:
        if len(one.candidates) > 1:
            raise UserError(f"{one.file.file} has several fields that may be the text; say which: "
                            f"{' or '.join(f'{key}={name}' for name in one.candidates)}")
    found = Counter(one.candidates[0] for one in asked if one.candidates)
    unknown = next((one for one in asked if one.names and not one.candidates), None)
    if unknown and not found:
        raise UserError(f"{unknown.file.file}: no field of a name that is known to hold text; give {key}=, one of "
                        f"{', '.join(unknown.names[:12])}")
    usual = found.most_common(1)[0][0] if found else fields.TEXT_FIELDS[0]
    return {one.file.file: (one.candidates[0] if one.candidates else usual) if one in asked else None for one in taken}


def _holds(one: _Looked, name: str) -> bool:
    if one.samples:
        return any(fields.lookup(values, name) is not fields.MISSING for values in one.samples)
    return name in one.names or name.split(".")[0] in one.names


def _units(source_name: str, one: _Looked, text_field: str | None, unit_bytes: int) -> Iterator[InputUnit]:
    file = one.file
    ranges: list[tuple[int | None, int | None, int, int]] = [(None, None, 1, file.size)]
    if one.kind == "jsonl" and one.compression is None and one.encoding in CODECS and file.size > unit_bytes:
        with files.open_file(file.file) as stream:
            ranges = [(start, stop, line, stop - start) for start, stop, line in
                      lines.line_ranges(stream, unit_bytes)]
    elif one.layout is not None and one.layout.groups:
        ranges = parquet.group_ranges(one.layout, unit_bytes)
    if one.contradicts:
        logger.warning("%s is read as what it holds: %s%s", file.file, one.kind,
                       f", {one.compression}" if one.compression else ", not compressed")
    # The hash keeps files of equal base name apart, and the name of a part says which file it is.
    digest = hashlib.sha256(file.name.encode()).hexdigest()[:10]
    stem = re.sub(r"[^A-Za-z0-9.]+", "_", file.name)[-40:].strip("._") or "file"
    for index, (start, stop, first, size) in enumerate(ranges):
        yield InputUnit(
            id=f"{source_name}-{stem}-{digest}-{index:05d}", source=source_name, file=file.file, name=file.name,
            kind=one.kind, compression=one.compression, encoding=one.encoding, text_field=text_field,
            id_field=fields.first_known(fields.ID_FIELDS, one.names),
            url_field=fields.first_known(fields.URL_FIELDS, one.names),
            time_field=fields.first_known(fields.TIME_FIELDS, one.names),
            start=start, stop=stop, first=first, size=size, file_size=file.size, sample=None)


def _tell_left_out(source: SourceInput, listed: Sequence[InputFile], unknown: Sequence[InputFile]) -> None:
    """Warn of files that are not read; UserError where the user gave one of them by name."""
    for file in unknown:
        if file.explicit:
            raise UserError(f"input {file.file} is of no known kind: JSON lines, Parquet, WET and WARC are known by "
                            f"their content, plain text by the suffix .txt")
    others = [file for file in listed if file.size and not files.may_be_read(file)] + list(unknown)
    suffixes = Counter(files.suffix_of(file.name) or "no suffix" for file in others)
    if suffixes:
        logger.warning("%s: %d files of other kinds are left out (%s)", ", ".join(source.input), len(others),
                       ", ".join(f"{suffix}: {count}" for suffix, count in suffixes.most_common(8)))
    if empty := sum(not file.size for file in listed):
        logger.warning("%s: %d empty files are left out", ", ".join(source.input), empty)
