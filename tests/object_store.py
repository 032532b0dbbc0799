"""An object store on loopback: gcp-storage-emulator, with what it lacks and what goes wrong.

It knows no conditions on generations (and does not say which one it sends), and it never fails; both are added around
its handler of requests. Nothing else of it is changed.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class Store:
    """A running store, and its requests: `(method, path)` each."""

    def __init__(self):
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(BUCKET, self.storage)
        self.requests: list[tuple[str, str]] = []
        self.failing_until, self.failing_on, self.status, self.failed = 0.0, "", 503, 0
        self.server = HTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.server.request_queue_size = 128
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What tells the clients of a process where it is."""
        url = f"http://127.0.0.1:{self.server.server_port}"
        return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}

    def fail(self, *, seconds: float = 1e9, on: str = "", status: int = 503) -> None:
        """Answer requests whose path (decoded) matches with an error, for so long."""
        self.failing_until, self.failing_on, self.status, self.failed = time.monotonic() + seconds, on, status, 0

    def heal(self) -> None:
        """Answer everything again."""
        self.failing_until = 0.0

    def names(self, prefix: str = "") -> list[str]:
        """The objects that there are."""
        return sorted(name for name in self.storage.objects.get(BUCKET, {}) if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        """An object."""
        return self.storage.get_file(BUCKET, name)

    def write(self, name: str, content: bytes) -> None:
        """Make or replace an object, as another client would."""
        _file_system().pipe(f"{BUCKET}/{name}", content)

    def download(self, prefix: str, target: Path) -> Path:
        """What lies below a prefix, as files."""
        for name in self.names(f"{prefix}/"):
            path = target / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(name))
        return target

    def upload(self, folder: Path, prefix: str) -> str:
        """A folder of files; returns where it is now."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.write(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"gs://{BUCKET}/{prefix}"

    def close(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


class _Handler(RequestHandler):
    def __init__(self, store: Store, *args):
        self.store = store
        super().__init__(store.storage, *args)

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # a client that was killed
            self.close_connection = True

    def _checked(self, method: str, answer) -> None:
        path, query = unquote(urlparse(self.path).path), parse_qs(urlparse(self.path).query)
        name = query.get("name", [""])[0]
        where = "/".join(filter(None, [path, name, query.get("prefix", [""])[0]]))
        self.store.requests.append((method, where))
        if time.monotonic() < self.store.failing_until and re.search(self.store.failing_on, where):
            self.store.failed += 1
            return self._refuse(self.store.status)
        wanted = query.get("ifGenerationMatch")
        if wanted and wanted[0] != self._generation(name or path.partition("/o/")[2]):
            return self._refuse(412)
        answer()

    def _generation(self, name: str) -> str:
        found = self.storage.objects.get(BUCKET, {}).get(name)
        return found["generation"] if found else "0"

    def _refuse(self, status: int) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers(self):
        if self.command == "GET" and "alt=media" in self.path:
            generation = self._generation(unquote(urlparse(self.path).path).partition("/o/")[2])
            if generation != "0":
                self.send_header("x-goog-generation", generation)
        super().end_headers()

    def do_GET(self):
        self._checked("GET", super().do_GET)

    def do_POST(self):
        self._checked("POST", super().do_POST)

    def do_PUT(self):
        self._checked("PUT", super().do_PUT)

    def do_DELETE(self):
        self._checked("DELETE", super().do_DELETE)

    def log_message(self, *arguments):
        """Say nothing."""


def _file_system():
    import fsspec

    return fsspec.filesystem("gcs", token="anon", use_listings_cache=False)


@contextmanager
def running():
    """A store while inside."""
    store = Store()
    os.environ |= {**store.environment, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    try:
        yield store
    finally:
        store.close()
