"""The engine of the pipeline: Daft, on the processes of this machine or on a Ray cluster. Only this module uses it.

Two kinds of work: units, each a call of a function in a worker process; and the few questions that are about all
documents at once (who is a copy of whom), as joins over Parquet files.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import pickle
import re
import resource
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctllm_jax.config.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_RAY_SECONDS = 10
logger = logging.getLogger(__name__)

PART_BITS = 32
"""A document's number is part << PART_BITS | row, its place."""


class Part(NamedTuple):
    """A Parquet file of documents with a column `row`.

    `rank` is its source's: the lowest wins. `index` is its place among all parts; None: its place in the list given.
    """

    path: Path
    rank: int = 0
    index: int | None = None


class UnitFailed(NamedTuple):
    """A unit that raised an error. `user_error`: the text is a message for the user; otherwise it is a traceback."""

    unit: str
    message: str
    user_error: bool


class Engine:
    """Runs functions over units, and joins over parts. One a process: Daft keeps its runner."""

    def __init__(self, *, kind: str = "native", address: str | None = None, workers: int = 0):
        self.kind, self.workers = kind, workers or len(os.sched_getaffinity(0))
        self._inline = kind == "native" and self.workers == 1
        os.environ.setdefault("DO_NOT_TRACK", "1")
        os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
        _let_workers_import_us()
        self._daft = _import_daft()
        if kind == "ray":
            self._start_ray(address)
        _set_runner(kind)

    def run(self, function: Callable[[dict, dict], dict], units: Sequence[dict], options: dict,
            ) -> Iterator[dict | UnitFailed]:
        """Run `function(unit, options)` for every unit in worker processes; yields the results in the order of
        finishing.

        `function` must be a top-level function of a module; units, options and results are JSON values. A unit that
        raises gives a UnitFailed, and the others go on.
        """
        if self._inline or len(units) == 1 and self.kind == "native":
            yield from (_parse(_call(function, options, json.dumps(unit))) for unit in units)
            return
        if not units:
            return
        daft = self._daft
        runner = daft.cls(_worker(), use_process=True, max_concurrency=min(self.workers, len(units)))
        worker = runner(pickle.dumps(function), json.dumps(options))
        frame = daft.from_pydict({"unit": [json.dumps(unit) for unit in units]}).into_batches(1)
        if self.kind == "ray":
            frame = frame.into_partitions(len(units))
        rows = frame.select(worker.run(frame["unit"]).alias("result")).iter_rows(results_buffer_size=None)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # Daft's own, of many kinds; a unit that raises gives a UnitFailed.
                raise UserError(f"a worker process has ended ({str(error).splitlines()[0][:200]}). If the memory ran "
                                f"out, fewer at a time need less: workers={max(1, self.workers // 2)}. What was done "
                                f"is kept, and the same command continues") from error
            if row is None:
                return
            yield _parse(row["result"])

    def copies(self, parts: Sequence[Part], *, key: Sequence[str], order: Sequence[str]) -> pa.Table:
        """Documents that are a copy of another and not the first of their kind, and who is.

        Two documents are duplicates if all columns `key`, integers, are equal. The first has the lowest (rank, then
        columns `order`).

        Returns:
          A table of `node` and `first`, int64, sorted by node, and `group`, the number of documents of that kind.
        """
        from daft import col

        key = list(key)
        documents = self._documents(parts, [*key, *order])
        # A file that two sources name gives documents of one place: the first of the two parts has the first.
        documents = documents.with_column("place", self._place([*order, "node"], documents))
        groups = documents.groupby(*key).agg(col("node").count().alias("group"), col("place").min().alias("lowest"))
        among = documents.join(groups.where(col("group") > 1), on=key)
        firsts = among.where(col("place") == col("lowest")).select(*key, col("node").alias("first"))
        found = among.where(col("place") != col("lowest")).join(firsts, on=key)
        return _table(found, ["node", "first", "group"]).sort_by("node")

    def edges(self, parts: Sequence[Part], *, key: str) -> np.ndarray:
        """Pairs (first, node) of documents whose column `key` is equal: a star for each value, int64 [edges, 2]."""
        import numpy as np
        from daft import col

        if not parts:
            return np.empty((0, 2), np.int64)
        documents = self._documents(parts, [key])
        groups = documents.groupby(key).agg(col("node").min().alias("first"), col("node").count().alias("group"))
        stars = documents.join(groups.where(col("group") > 1), on=key).where(col("node") != col("first"))
        table = _table(stars.select("first", "node"), ["first", "node"])
        pairs = np.stack([table["first"].to_numpy(), table["node"].to_numpy()], axis=1).astype(np.int64)
        return np.unique(pairs, axis=0)

    def lookup(self, parts: Sequence[Part], nodes: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Columns of these documents, with `node` and the rank of their source, sorted by node."""
        import numpy as np
        import pyarrow as pa

        # Only the parts that hold any: a few samples are no reason to read a whole corpus.
        holding = set(np.unique(nodes >> PART_BITS).tolist())
        places = [place if part.index is None else part.index for place, part in enumerate(parts)]
        parts = [part._replace(index=place) for place, part in zip(places, parts, strict=True) if place in holding]
        wanted = self._daft.from_arrow(pa.table({"node": pa.array(nodes, pa.int64())}))
        found = self._documents(parts, columns).join(wanted, on="node")
        return _table(found.select("node", "rank", *columns), ["node", "rank", *columns]).sort_by("node")

    def pairs(self, parts: Sequence[Part], edges: np.ndarray, column: str,
              measure: Callable[[str, str], float]) -> np.ndarray:
        """`measure(text of first, text of node)` of each edge, float64 [edges]; `column` holds the texts."""
        import numpy as np
        import pyarrow as pa
        from daft import DataType, col

        daft = self._daft
        frame = daft.from_arrow(pa.table({"edge": pa.array(np.arange(len(edges))), "first": pa.array(edges[:, 0]),
                                          "second": pa.array(edges[:, 1])}))
        texts = self._documents(parts, [column]).select("node", column)
        frame = frame.join(texts.select(col("node").alias("first"), col(column).alias("left")), on="first")
        frame = frame.join(texts.select(col("node").alias("second"), col(column).alias("right")), on="second")
        function = daft.func(measure, return_dtype=DataType.float64(), use_process=self.workers > 1)
        table = _table(frame.select("edge", function(frame["left"], frame["right"]).alias("value")), ["edge", "value"])
        return table.sort_by("edge")["value"].to_numpy()

    def _documents(self, parts: Sequence[Part], columns: Sequence[str]):
        """The columns of all parts, with `node` and `rank`."""
        from daft import col

        daft = self._daft
        paths = [str(part.path.resolve()) for part in parts]
        # Daft takes a path for a pattern: of a folder x[1] it would find nothing.
        frame = daft.read_parquet([re.sub(r"([\\[\]{}*?])", r"\\\1", path) for path in paths], file_path_column="path")
        frame = frame.select("path", "row", *columns)
        known = daft.from_pydict({"path": paths, "part": [place if part.index is None else part.index
                                                           for place, part in enumerate(parts)],
                                  "rank": [part.rank for part in parts]})
        frame = frame.with_column("path", col("path").regexp_replace("^file://", "")).join(known, on="path")
        node = col("part").cast("int64") * (1 << PART_BITS) + col("row").cast("int64")
        return frame.with_column("node", node).select("node", "rank", *columns)

    @staticmethod
    def _place(order: Sequence[str], documents: Any):
        """A string that sorts as (rank, columns of `order`) do."""
        from daft import col, lit

        place = col("rank").cast("string").lpad(20, "0")
        for name in order:
            text = col(name).cast("string")
            if documents.schema()[name].dtype.is_integer():
                text = text.lpad(20, "0")
            place = place + lit("\x00") + text
        return place

    def _start_ray(self, address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("engine=ray needs the package ray: pip install 'ctllm-jax[ray]'") from None
        if not ray.is_initialized():
            what = f"the Ray cluster at ray.address={address}" if address else "Ray on this machine"
            if address:
                _check_reachable(address)
            # Our own cluster has no dashboard, and uses only the loopback address.
            own = {"num_cpus": self.workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            with _still_waiting(what):
                try:
                    ray.init(address=address, logging_level="warning", log_to_driver=False, **({} if address else own))
                except Exception as error:  # Ray's own, of many kinds.
                    raise UserError(f"{what} does not start: {str(error).strip() or type(error).__name__}. "
                                    f"engine=native needs no Ray") from error
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))


def _let_workers_import_us() -> None:
    """Put the folder of this package on the path of processes that are started, wherever this one was started from."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *paths])


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing answers at the address of a Ray cluster; Ray itself would wait for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"ray.address={address}: it is HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_RAY_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"ray.address={address}: nothing answers there ({error}). Start the cluster, or give the "
                        f"address that `ray start --head` printed; without ray.address a cluster of this machine alone "
                        f"is started") from None


@contextmanager
def _still_waiting(what: str) -> Iterator[None]:
    """Log every few seconds what the command waits for."""
    done = threading.Event()

    def say() -> None:
        waited = 0
        while not done.wait(_RAY_SECONDS):
            waited += _RAY_SECONDS
            logger.warning("waiting for %s to start since %d s", what, waited)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@functools.cache
def _worker():
    """A class that lives in a worker process and calls a function there: it takes one unit and returns its result as
    JSON."""
    import daft

    class Worker:
        def __init__(self, function: bytes, options: str):
            self.function, self.options = pickle.loads(function), json.loads(options)

        @daft.method.batch(return_dtype=daft.DataType.string(), batch_size=1)
        def run(self, unit):
            return [_call(self.function, self.options, text) for text in unit.to_pylist()]

    return Worker


def _call(function: Callable[[dict, dict], dict], options: dict, text: str) -> str:
    unit = json.loads(text)
    cpu, wall = time.process_time(), time.monotonic()
    try:
        result = {"unit": unit["id"], "result": function(unit, options)}
    except UserError as error:
        result = {"unit": unit["id"], "failed": str(error), "user_error": True}
    except OSError as error:
        result = {"unit": unit["id"], "failed": describe(error), "user_error": True}
    except Exception:
        result = {"unit": unit["id"], "failed": traceback.format_exc(), "user_error": False}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result |= {"cpu_seconds": time.process_time() - cpu, "seconds": time.monotonic() - wall,
               "peak_memory": usage.ru_maxrss * 1024}
    return json.dumps(result)


def describe(error: OSError) -> str:
    """Describe an error of the operating system, its path, and what to do."""
    what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({what}). What was done is kept: free some space, and the same command continues"
    return what


def _parse(text: str) -> dict | UnitFailed:
    values = json.loads(text)
    if "failed" in values:
        return UnitFailed(values["unit"], values["failed"], values["user_error"])
    return values


_chosen: str | None = None


def _set_runner(kind: str) -> None:
    """Choose Daft's runner: once in a process, for it keeps the first."""
    global _chosen
    import daft

    if _chosen is None:
        daft.set_runner_ray() if kind == "ray" else daft.set_runner_native()
        _chosen = kind
    elif _chosen != kind:
        raise UserError(f"engine={kind}: this process has run engine={_chosen} before, and Daft keeps the first")


def _import_daft():
    try:
        import daft
    except ImportError:
        raise UserError("prepare needs the package daft: pip install 'ctllm-jax[prep]'") from None
    return daft


def _table(frame, columns: list[str]) -> pa.Table:
    """Collect a frame; an empty result has its columns, too."""
    return frame.select(*columns).to_arrow()
