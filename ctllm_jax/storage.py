"""Runs, datasets and models on an object store, `gs://BUCKET/…`: the operations that differ from a file system.

`open_path` returns a path with pathlib's methods; for a local path it is pathlib's own. A store cannot rename, append
or lock, but it keeps checksums of every object, and supports writes that succeed only if an object has not changed
(generations). `etils.epath` over `gcsfs` transfers files; TensorStore, which checkpoints need anyway, makes the
conditional writes. Neither is imported for a local path. No jax.

Requests that fail for a while (5xx, 429, a lost connection) are repeated by both: gcsfs for half a minute, TensorStore
for a quarter of an hour. A request that still fails raises `StoreError`, or is described by `describe_failure`.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError

log = logging.getLogger(__name__)
SCHEME = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_WILD = re.compile(r"[*?\[\]#]")
_BLOCK = 8 << 20
_AT_ONCE = 32
"""Number of concurrent requests."""
_ANSWER = 60.0
"""Seconds after which a conditional write counts as failed; it may still be done."""


class StoreError(OSError):
    """A request to an object store that failed after all retries; `strerror` states the reason.

    Attributes:
      lasting: the error is permanent: no such bucket, no permission.
    """

    def __init__(self, message: str, *, lasting: bool):
        super().__init__(None, message)
        self.strerror, self.lasting = message, lasting

    def __str__(self) -> str:
        return self.strerror


class Entry(NamedTuple):
    """A store's metadata of an object: bytes, and MD5 in hexadecimal digits (None: it was composed of others)."""

    size: int
    md5: str | None


def in_parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Apply a function to each item in threads, in order; for work that mostly waits for a store or a file server."""
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="requests") as threads:
        return list(threads.map(function, items))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on an object store."""
    return str(path).startswith(SCHEME)


def open_path(path: str | os.PathLike) -> Path:
    """A path of a file system or of an object store.

    Raises:
      UserError: gs:// has no bucket, or a required package is not installed.
    """
    if not is_remote(path):
        return Path(path)
    bucket, _, name = str(path).removeprefix(SCHEME).partition("/")
    if not _BUCKET.fullmatch(bucket) or not name.strip("/"):
        raise UserError(f"{path}: needs gs://BUCKET/NAME, a name below a bucket")
    if _WILD.search(name):
        raise UserError(f"{path}: a name on an object store may not have any of * ? [ ] #, which its clients expand")
    _connect()
    from etils import epath

    return epath.Path(str(path).rstrip("/"))


def absolute(path: Path) -> Path:
    """An absolute path; `etils` would put a store's path below the working directory."""
    return path if is_remote(path) else path.absolute()


@cache
def _connect() -> None:
    """Settings of gcsfs, which etils makes itself."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError("gs:// needs gcsfs: pip install 'ctllm-jax[gcs]' (or mount the bucket, and give that path)")
    # Otherwise it queries the control API about each bucket, for rapid buckets, which we do not use.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec.config

    settings = {"use_listings_cache": False}  # other processes write there too
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        settings["token"] = "anon"
    for name in ("gcs", "gs"):
        fsspec.config.conf[name] = {**settings, **fsspec.config.conf.get(name, {})}


def _file_system() -> Any:
    _connect()
    import fsspec

    return fsspec.filesystem("gcs")


def list_objects(folder: Path) -> dict[str, Entry]:
    """The objects below a folder of a store, by relative path; empty if there are none.

    Raises:
      StoreError: the store cannot be queried.
    """
    prefix = str(folder).removeprefix(SCHEME) + "/"
    with told(folder):
        found = _file_system().find(prefix, detail=True)
    return {name.removeprefix(prefix): Entry(int(entry["size"]), _hexadecimal(entry.get("md5Hash")))
            for name, entry in found.items() if name.startswith(prefix)}


def list_names(folder: Path) -> list[str]:
    """The names directly below a folder of a store, sorted; one request."""
    with told(folder):
        try:
            return sorted({str(path).rstrip("/").rpartition("/")[2] for path in
                           _file_system().ls(str(folder), detail=False)})
        except FileNotFoundError:
            return []


def read_small(paths: Sequence[Path]) -> dict[Path, bytes]:
    """The contents of several small objects of a store, without missing ones; requested in parallel."""
    if not paths:
        return {}
    names = {str(path).removeprefix(SCHEME): path for path in paths}
    found = {}
    for name, content in _file_system().cat(list(names), on_error="return").items():
        with told(names[name]), suppress(FileNotFoundError):
            if isinstance(content, Exception):
                raise content
            found[names[name]] = content
    return found


def remove_tree(folder: Path) -> None:
    """Remove everything below a folder of a store; it may be missing."""
    with told(folder):
        try:
            _file_system().rm(str(folder), recursive=True)
        except FileNotFoundError:
            pass


def move_tree(folder: Path, target: Path) -> None:
    """Copy a folder inside the store, then remove it; unlike a rename on a disk, this is not atomic."""
    with told(folder):
        system = _file_system()
        for name in system.find(str(folder)):
            system.cp_file(name, f"{target}/{name.removeprefix(str(folder).removeprefix(SCHEME) + '/')}")
    remove_tree(folder)


def upload_tree(folder: Path, target: Path) -> None:
    """Copy the files below a local folder to a store."""
    with told(target):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                (target / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


def copy_file(path: Path, target: Path) -> None:
    """Copy a file, whichever of the two is on a store."""
    if is_remote(path) or is_remote(target):
        with told(target):
            target.write_bytes(path.read_bytes())
    else:
        shutil.copyfile(path, target)


def write_whole(path: Path, content: bytes) -> None:
    """Write a local file atomically, with the permissions of the user's umask."""
    partial = path.with_name(f".{path.name[:100]}-{secrets.token_hex(4)}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_blocks(path: Path) -> Iterator[bytes]:
    """Read an object, a few MiB at a time.

    Raises:
      FileNotFoundError: there is none.
      StoreError: it cannot be read.
    """
    with told(path), _file_system().open(str(path), "rb", block_size=_BLOCK, cache_type="readahead") as file:
        while block := file.read(_BLOCK):
            yield block


def local_copy(path: Path) -> Path:
    """A small file as a local file: itself, or a copy that is removed when this process ends."""
    return _download(path) if is_remote(path) else path


@cache
def _download(path: Path) -> Path:
    target = Path(_own_folder()) / hashlib.sha256(str(path.parent).encode()).hexdigest()[:16] / path.name
    target.parent.mkdir(exist_ok=True)
    with told(path):
        target.write_bytes(path.read_bytes())
    return target


@cache
def _own_folder() -> str:
    folder = tempfile.mkdtemp(prefix="ctllm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Conditional:
    """One object with conditional writes: a write succeeds only if the writer has seen the last version."""

    def __init__(self, path: Path):
        import tensorstore as ts

        bucket, _, name = str(path).removeprefix(SCHEME).partition("/")
        self.path, self._name = path, name
        self._store = ts.KvStore.open({"driver": "gcs", "bucket": bucket}).result()

    def read(self) -> tuple[bytes, bytes] | None:
        """Return (content, version), or None if it does not exist."""
        with told(self.path):
            found = self._store.read(self._name).result(timeout=_ANSWER)
        return None if found.state == "missing" else (bytes(found.value), bytes(found.stamp.generation))

    def write(self, content: bytes | None, *, version: bytes | None) -> bytes | None:
        """Replace that version (None: create it if it does not exist), or remove it if the content is None.

        Returns the new version, or None if the object had another version and was not changed.
        """
        with told(self.path):
            written = self._store.write(self._name, content, if_equal=_absent() if version is None else version)
            generation = bytes(written.result(timeout=_ANSWER).generation)
        return generation or None  # empty: the condition did not hold


@cache
def _absent() -> bytes:
    """TensorStore's name for the version of a missing object."""
    import tensorstore as ts

    return bytes(ts.KvStore.open({"driver": "memory"}).result().read("x").result().stamp.generation)


class Uploader:
    """Writes small objects in the background: the newest content of each, every few seconds.

    Temporary failures of the store only cause delay. Gives up after `patience` seconds of failures.
    """

    def __init__(self, *, interval: float = 10.0, patience: float = 600.0):
        self._interval, self._patience = interval, patience
        self._waiting: dict[Path, bytes] = {}
        self._changed, self._wake, self._ended = threading.Lock(), threading.Event(), False
        self._failing_since: float | None = None
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="uploads")
        self._thread.start()

    def put(self, path: Path, content: bytes) -> None:
        """Schedule an object for writing.

        Raises:
          StoreError: nothing could be written for longer than `patience`.
        """
        if self._error is not None:
            raise self._error
        with self._changed:
            self._waiting[path] = content

    def wake(self) -> None:
        """Write now, before the interval is over."""
        self._wake.set()

    def close(self) -> None:
        """Write all scheduled objects.

        Raises:
          StoreError: it cannot be written.
        """
        self._ended = True
        self._wake.set()
        self._thread.join()
        if self._waiting:
            self._write_all()

    def _work(self) -> None:
        while not self._ended:
            self._wake.wait(self._interval)
            self._wake.clear()
            try:
                self._write_all()
                self._failing_since = None
            except Exception as error:  # any error: this thread must not end unnoticed
                now = time.monotonic()
                if self._failing_since is None:
                    self._failing_since = now
                    log.warning("%s; retrying", error)
                if now - self._failing_since > self._patience:
                    self._error = error if isinstance(error, OSError) else StoreError(
                        f"{type(error).__name__}: {error}", lasting=False)
                    return

    def _write_all(self) -> None:
        for path in list(self._waiting):
            with self._changed:
                content = self._waiting[path]
            with told(path):
                path.write_bytes(content)
            with self._changed:
                if self._waiting[path] is content:
                    del self._waiting[path]


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Convert errors of a store's clients to `StoreError`; errors about missing objects are passed on."""
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except TimeoutError as error:
        raise StoreError(f"{path}: no answer for {_ANSWER:g} s", lasting=False) from error
    except Exception as error:
        failure = _explain(error)
        if failure is None:
            raise
        reason, lasting = failure
        raise StoreError(f"{path}: {reason}", lasting=lasting) from error


def describe_failure(error: BaseException) -> tuple[str, bool] | None:
    """(description, whether it is permanent) of an error of a store's clients; None for other errors."""
    if isinstance(error, StoreError):
        return str(error), error.lasting
    return _explain(error)


def _explain(error: BaseException) -> tuple[str, bool] | None:
    text, module = " ".join(str(error).split())[:300], type(error).__module__
    if module.startswith(("gcsfs", "aiohttp", "google.auth", "google.api_core", "google.cloud")):
        code = getattr(error, "code", None) or getattr(error, "status", None)
        lasting = str(code) in ("400", "401", "403", "404") or "credentials" in text
        return f"{_advice(str(code))}{text or type(error).__name__}", lasting
    if isinstance(error, RuntimeError) and text.endswith("is closed"):  # aiohttp's session, or the loop that it is in
        return f"the connection to the store was closed in this process ({text})", False
    if isinstance(error, OSError) and text.startswith("Forbidden:"):  # gcsfs: an OSError without a number
        return _advice("403") + text, True
    # TensorStore: "PERMISSION_DENIED: Error reading gs://…", as a ValueError or a KeyError.
    if isinstance(error, ValueError | KeyError | RuntimeError | OSError) and (
            found := re.search(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|"
                               r"RESOURCE_EXHAUSTED|INTERNAL|UNKNOWN)\b", text)) and (
            any(sign in text for sign in (SCHEME, "http_response_code", "googleapis.com", "CURL error"))):
        lasting = found[1] in ("PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND")
        code = {"PERMISSION_DENIED": "403", "UNAUTHENTICATED": "401", "NOT_FOUND": "404"}.get(found[1], "")
        return _advice(code) + text, lasting
    return None


def _advice(code: str) -> str:
    return {"401": "no credentials (gcloud auth application-default login): ",
            "403": "no permission (roles/storage.objectUser on the bucket is needed): ",
            "404": "no such bucket, or object: "}.get(code, "")


def _hexadecimal(encoded: str | None) -> str | None:
    return base64.b64decode(encoded).hex() if encoded else None
