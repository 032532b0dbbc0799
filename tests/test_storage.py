"""Paths, conditional writes and errors of an object store."""

import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ctllm_jax import storage
from ctllm_jax.config.errors import UserError
from ctllm_jax.storage import Conditional, StoreError, Uploader, open_path
from tests.object_store import BUCKET


def at(name):
    return open_path(f"gs://{BUCKET}/{name}")


def test_a_local_path_needs_none_of_it(repository):
    code = ("import pathlib, sys; from ctllm_jax.storage import open_path, local_copy; "
            "assert type(local_copy(open_path('/x/y'))) is type(pathlib.Path('/x')); "
            "assert not {'etils', 'fsspec', 'gcsfs', 'tensorstore', 'jax'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)


@pytest.mark.parametrize(("url", "told"), [
    ("gs://", "needs gs://BUCKET/NAME"), ("gs://bucket", "needs gs://BUCKET/NAME"), ("gs://Bucket/x", "BUCKET/NAME"),
    ("gs:///x", "needs gs://BUCKET/NAME"), ("gs://bucket/a[1]", r"may not have any of \* \? \[ \] #")])
def test_names(url, told):
    with pytest.raises(UserError, match=told):
        open_path(url)


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    storage._connect.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'ctllm-jax\[gcs\]'"):
        open_path("gs://bucket/run")
    storage._connect.cache_clear()


def test_objects(store, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "deep/b").write_bytes(b"two" * 1000)
    folder = at("objects")
    storage.upload_tree(tmp_path, folder)
    assert storage.list_objects(folder) == {
        name: (len(data), hashlib.md5(data).hexdigest()) for name, data in (("a", b"one"), ("deep/b", b"two" * 1000))}
    assert storage.list_names(folder) == ["a", "deep"] and storage.list_names(at("nothing")) == []
    assert storage.list_objects(at("object")) == {}  # of the same beginning, and another name
    assert b"".join(storage.read_blocks(folder / "deep/b")) == b"two" * 1000
    copy = storage.local_copy(folder / "a")
    assert copy.read_bytes() == b"one" and isinstance(copy, Path) and not storage.is_remote(copy)
    storage.move_tree(folder, at("moved"))
    assert store.names("objects/") == [] and store.read("moved/deep/b") == b"two" * 1000
    storage.remove_tree(at("moved"))
    storage.remove_tree(at("moved"))
    assert store.names("moved") == []


def test_of_eight_at_once_one_makes_it(store):
    lock, made = threading.Barrier(8), []

    def attempt(index):
        mine = Conditional(at("raced"))
        lock.wait()
        made.append(mine.write(f"{index}".encode(), version=None))

    threads = [threading.Thread(target=attempt, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    versions = [version for version in made if version is not None]
    assert len(versions) == 1 and len(made) == 8
    mine = Conditional(at("raced"))
    content, version = mine.read()
    assert version == versions[0]
    newer = mine.write(b"newer", version=version)
    assert newer != version and mine.write(b"late", version=version) is None and mine.read() == (b"newer", newer)
    assert mine.write(None, version=version) is None and store.read("raced") == b"newer"
    mine.write(None, version=newer)
    assert mine.read() is None


def test_uploads_go_on_behind_a_failure(store, monkeypatch):
    uploader = Uploader(interval=0.05)
    store.fail(seconds=1, on="uploaded")
    for number in range(5):
        uploader.put(at("uploaded"), b"%d" % number)
        time.sleep(0.03)
    uploader.close()
    assert store.read("uploaded") == b"4" and store.failed


def test_uploads_that_fail_for_good(store):
    uploader = Uploader(interval=0.02, patience=0.1)
    store.fail(on="refused", status=403)
    uploader.put(at("refused"), b"x")
    with pytest.raises(StoreError, match=r"gs://bucket/refused: no permission \(roles/storage.objectUser"):
        for _ in range(200):
            time.sleep(0.02)
            uploader.put(at("refused"), b"x")
    with pytest.raises(StoreError):
        uploader.close()


def test_what_went_wrong(store):
    with pytest.raises(StoreError, match="no such bucket") as caught:
        Conditional(open_path("gs://elsewhere/lock")).write(b"x", version=None)
    assert caught.value.lasting
    store.fail(on="forbidden", status=403)
    with pytest.raises(StoreError, match="no permission") as caught:
        storage.list_names(at("forbidden"))
    assert storage.describe_failure(caught.value) == (str(caught.value), True)
    with pytest.raises(FileNotFoundError), storage.told(at("missing")):
        at("missing").read_bytes()
    for local in ("INTERNAL: of a disk", "INTERNAL: Failed to compile; see https://openxla.org",
                  "UNAVAILABLE: chttp2 of a peer"):
        assert storage.describe_failure(ValueError(local)) is None
    with pytest.raises(KeyError), storage.told(at("x")):
        raise KeyError("a mistake of ours")
