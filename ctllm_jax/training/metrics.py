"""metrics.jsonl, which holds all records of a run, and the sinks that receive the same records.

Every line is one JSON object with "event" and "time" (unix seconds). Lines are only appended: each is written by one
system call, and a line torn by a crash is ended before the next one. An object store cannot append, so there the file
is split into parts, metrics-00001.jsonl and so on. A thread rewrites the newest part every few seconds, the others do
not change, and each start begins a new part. JSON has no NaN and no infinity: such a number is written as null, and its
name goes into "nonfinite" ({"loss": "nan"}), so that a reader can distinguish it from a missing number. TensorBoard and
Weights & Biases get the same records; one that fails is dropped with a warning, and training goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from ctllm_jax.config.errors import UserError
from ctllm_jax.report.run import METRICS, PART, metrics_files
from ctllm_jax.storage import Uploader, is_remote, open_path

logger = logging.getLogger(__name__)

STATUS = "status.json"
_PART_BYTES = 1 << 20


class Sink(Protocol):
    """A receiver of records."""

    name: str

    def write(self, record: dict[str, Any]) -> None:
        """Take a record; may raise anything."""

    def close(self) -> None:
        """Finish; may raise anything."""


class MetricsWriter:
    """Appends records to a run directory's metrics.jsonl, keeps its status.json, and feeds the sinks."""

    def __init__(self, run_dir: str | Path, *, steps: int | None = None, tensorboard: bool = False,
                 wandb_project: str | None = None, config: dict[str, Any] | None = None,
                 process_index: int | None = None):
        """Open the run's file for appending; on any process but 0, do nothing here or later.

        Args:
          run_dir: the run directory; made if it does not exist.
          steps: steps of the whole run, for status.json.
          tensorboard: also write TensorBoard events to run_dir/tensorboard (extra: tb).
          wandb_project: also log to this project (extra: wandb; WANDB_MODE=offline is respected).
          config: the resolved config, for Weights & Biases.
          process_index: this process; None asks jax.
        """
        if process_index is None:
            import jax

            process_index = jax.process_index()
        self._steps = steps
        self._status: dict[str, Any] = {"step": 0, "steps": steps, "state": "running", "loss": None}
        self._sinks: list[Sink] = []
        self._file: _Parts | FileIO | None = None
        if process_index != 0:
            return
        self._directory = open_path(run_dir)
        if is_remote(self._directory):
            if tensorboard or wandb_project is not None:
                raise UserError(f"{run_dir}: TensorBoard and Weights & Biases need a run directory on a disk")
            self._file = _Parts(self._directory)
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / METRICS
        self._file = open(path, "ab+", buffering=0)
        _end_torn_line(self._file)
        if tensorboard:
            self._add_sink("tensorboard", lambda: TensorBoardSink(self._directory))
        if wandb_project is not None:
            self._add_sink("wandb", lambda: WandbSink(self._directory, wandb_project, config or {}))

    def event(self, event: str, **fields: Any) -> None:
        """Append one record, with the time of now. Raises OSError if it cannot be written."""
        if self._file is None:
            return
        record = _record(event, fields)
        self._append(record)
        self._update_status(record)
        if isinstance(self._file, _Parts) and event != "train":
            self._file.uploader.wake()
        for sink in list(self._sinks):
            self._guarded(sink, lambda sink=sink: sink.write(record))

    def close(self) -> None:
        """Close the file and the sinks."""
        if self._file is None:
            return
        for sink in list(self._sinks):
            self._guarded(sink, sink.close)
        self._sinks.clear()
        self._file.close()
        self._file = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, record: dict[str, Any]) -> None:
        data = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        # A full disk writes only a part and reports this only by the count; the next call raises an error.
        while data and self._file is not None:
            data = data[self._file.write(data):]

    def _update_status(self, record: dict[str, Any]) -> None:
        if record["event"] not in ("start", "train", "end"):
            return
        self._status["state"] = record.get("reason", "done") if record["event"] == "end" else "running"
        self._status["step"] = record.get("step", self._status["step"])
        if record["event"] == "train":
            self._status["loss"] = record.get("loss")
        text = json.dumps({**self._status, "updated": record["time"]}) + "\n"
        if isinstance(self._file, _Parts):
            self._file.uploader.put(self._directory / STATUS, text.encode())
        else:
            write_atomically(self._directory / STATUS, text)

    def _add_sink(self, name: str, make: Any) -> None:
        try:
            self._sinks.append(make())
        except Exception as error:
            self._warn(name, error)

    def _guarded(self, sink: Sink, call: Any) -> None:
        try:
            call()
        except Exception as error:
            self._sinks.remove(sink)
            self._warn(sink.name, error)

    def _warn(self, name: str, error: Exception) -> None:
        message = f"{name} is dropped, the run goes on without it: {type(error).__name__}: {error}"
        logger.warning(message)
        self._append(_record("warning", {"message": message}))


class _Parts:
    """The replacement for an open metrics.jsonl on an object store."""

    def __init__(self, directory: Path):
        self._directory, self.uploader = directory, Uploader()
        self._number, self._part = max((number for number, _ in metrics_files(directory)), default=0) + 1, bytearray()

    def write(self, data: bytes) -> int:
        """Append lines to the newest part."""
        if len(self._part) + len(data) > _PART_BYTES:
            self._number, self._part = self._number + 1, bytearray()
        self._part += data
        self.uploader.put(self._directory / PART.format(self._number), bytes(self._part))
        return len(data)

    def close(self) -> None:
        """Write the lines that are not on the store yet."""
        self.uploader.close()


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _record(event: str, fields: dict[str, Any]) -> dict[str, Any]:
    nonfinite: dict[str, str] = {}
    record = {"event": event, "time": round(time.time(), 3), **{key: _plain(value, key, nonfinite)
                                                               for key, value in fields.items()}}
    if nonfinite:
        record["nonfinite"] = nonfinite
    return record


def _plain(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    """Convert a value for JSON: arrays of one number become the number, paths become text, non-finite numbers null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(part, f"{path}.{key}", nonfinite) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{path}.{index}", nonfinite) for index, part in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            nonfinite[path] = repr(float(value))
            return None
        return float(value)
    if hasattr(value, "item"):
        return _plain(value.item(), path, nonfinite)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{path}: {type(value).__name__} does not go into {METRICS}; numbers, text, lists and mappings do")


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The curves that a record adds to: train/loss, evaluation/zh/bits_per_byte, benchmarks/cmmlu. Empty for other
    events."""
    kind = record["event"]
    if kind == "benchmarks":
        return {f"benchmarks/{task}": float(told["value"]) for task, told in record["tasks"].items()}
    if kind not in ("train", "evaluation"):
        return {}
    parts = {f"{kind}/{name}": value for name, value in record.items() if name not in ("event", "time", "step")}
    if kind == "evaluation":
        parts.pop("evaluation/tokens", None)  # training tokens at that step
        parts |= {f"evaluation/{source}/{name}": value for source, values in record["sources"].items()
                  for name, value in values.items()}
    return {name: float(value) for name, value in parts.items()
            if isinstance(value, int | float) and not isinstance(value, bool)}


def _end_torn_line(file: FileIO) -> None:
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


class TensorBoardSink:
    """Events under run_dir/tensorboard, by tensorboardX."""

    name = "tensorboard"

    def __init__(self, run_dir: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboardX is missing: pip install 'ctllm-jax[tb]'") from error
        # A file's name contains the second of its creation; without a suffix, another file of the same second would
        # replace it.
        self._open = lambda purge_step: SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step,
                                                      filename_suffix=f".{time.time_ns()}")
        self._writer = None

    def write(self, record: dict[str, Any]) -> None:
        """Scalars of training and evaluation, texts of samples. If a run resumes from an earlier step, TensorBoard
        discards the later ones, which are repeated."""
        if self._writer is None or record["event"] == "rollback":
            again = {"start": "step", "rollback": "to"}.get(record["event"])
            self.close()
            self._writer = self._open(record[again] + 1 if again and record[again] else None)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])
        if record["event"] == "sample":
            text = str(record["text"])
            self._writer.add_text(f"sample/{record['prompt']}", text, record["step"], walltime=record["time"])

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """A run of Weights & Biases; a resumed run directory continues the same one."""

    name = "wandb"

    def __init__(self, run_dir: Path, project: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("wandb is missing: pip install 'ctllm-jax[wandb]'") from error
        identity = run_dir / "wandb" / "ctllm_run_id"
        if not identity.exists():
            identity.parent.mkdir(exist_ok=True)
            write_atomically(identity, uuid.uuid4().hex)
        self._run = wandb.init(project=project, name=run_dir.resolve().name, id=identity.read_text(encoding="utf-8"),
                               resume="allow", dir=str(run_dir), config=config, settings=wandb.Settings(console="off"))
        # Its own step must not decrease, but a restart's does, so ours is a separate axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        """Scalars of training and evaluation."""
        values = scalars(record)
        if values:
            self._run.log({**values, "step": record["step"]})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
