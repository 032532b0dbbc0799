"""Shards of an object store on this machine's disk: each comes once, whole, and goes when it is in nobody's way."""

import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.dataset import shard_cache
from ctllm_jax.dataset.manifest import Shard
from ctllm_jax.dataset.shard_cache import ShardCache
from ctllm_jax.storage import StoreError, open_path
from tests.object_store import BUCKET

SIZE = 1000
TAKE = """
import json, sys, time
from pathlib import Path
from ctllm_jax.dataset.manifest import Shard
from ctllm_jax.dataset.shard_cache import ShardCache
from ctllm_jax.storage import open_path
source, folder, shard, stay = json.loads(sys.argv[1])
path = ShardCache(Path(folder), limit=10**6).take(open_path(source), Shard(**shard))
print(len(path.read_bytes()), flush=True)
time.sleep(stay)
"""


@pytest.fixture(autouse=True)
def nothing_held():
    """What this process has read is not in use any more when a test ends."""
    yield
    for file in shard_cache._held.values():
        os.close(file)
    shard_cache._held.clear()


def let_go(path):
    os.close(shard_cache._held.pop(path))


def put(store, name, content):
    """A shard on the store, and where."""
    store.write(f"shards/{name}", content)
    return open_path(f"gs://{BUCKET}/shards/{name}"), Shard(name, 1, 1, 1, 1, len(content),
                                                           hashlib.sha256(content).hexdigest())


def other(source, folder, shard, *, stay=0.0):
    """Another process that takes a shard."""
    words = json.dumps([str(source), str(folder), shard.__dict__, stay])
    return subprocess.Popen([sys.executable, "-c", TAKE, words], stdout=subprocess.PIPE, text=True)


def downloads(store, name):
    return sum(method == "GET" and path.endswith(f"shards/{name}") and "/download/" in path
               for method, path in store.requests)


def test_three_processes_download_it_once(store, tmp_path):
    source, shard = put(store, "once", b"x" * SIZE)
    store.requests.clear()
    started = [other(source, tmp_path, shard) for _ in range(3)]
    assert [each.communicate()[0].strip() for each in started] == [str(SIZE)] * 3
    assert downloads(store, "once") == 1
    asked = len(store.requests)
    ShardCache(tmp_path, limit=SIZE).take(source, shard)  # what is there needs neither room nor the store
    assert len(store.requests) == asked
    assert [path.name for path in tmp_path.glob("*.arrayrecord")] == [f"{shard.sha256}.arrayrecord"]


def test_the_longest_unused_goes_and_what_is_read_stays(store, tmp_path):
    cache = ShardCache(tmp_path, limit=2 * SIZE)
    sources = [put(store, f"lru{index}", bytes([index]) * SIZE) for index in range(3)]
    paths = [cache.take(*source) for source in sources[:2]]
    with pytest.raises(UserError, match=r"data.cache_gb=2e-06: .*lru2 takes .* are in use: raise it"):
        cache.take(*sources[2])
    for path in paths:
        let_go(path)
    time.sleep(0.02)
    cache.take(*sources[0])  # used again
    let_go(paths[0])
    cache.take(*sources[2])
    assert paths[0].exists() and not paths[1].exists()
    # In use by another process.
    holder = other(*sources[0][:1], tmp_path, sources[0][1], stay=60)
    holder.stdout.readline()
    with pytest.raises(UserError, match="are in use"):
        cache.take(*sources[1])
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert cache.take(*sources[1]).read_bytes() == bytes([1]) * SIZE and not paths[0].exists()


def test_killed_while_it_downloads(store, tmp_path):
    source, shard = put(store, "killed", b"y" * SIZE)
    store.fail(on="shards/killed")
    first = other(source, tmp_path, shard)
    part = tmp_path / f"{shard.sha256}.part"
    deadline = time.monotonic() + 30
    while not (store.failed and part.exists()) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    assert part.exists()
    store.heal()
    assert ShardCache(tmp_path, limit=SIZE).take(source, shard).read_bytes() == b"y" * SIZE and not part.exists()


def test_not_what_the_manifest_says(store, tmp_path):
    cache = ShardCache(tmp_path, limit=10 * SIZE)
    source, shard = put(store, "changed", b"z" * SIZE)
    store.write("shards/changed", b"z" * (SIZE - 1) + b"a")
    with pytest.raises(UserError, match="gs://bucket/shards/changed is not what its manifest says"):
        cache.take(source, shard)
    store.fail(on="shards/changed", status=403)
    with pytest.raises(StoreError, match="no permission"):
        cache.take(source, shard)
    store.heal()
    source.unlink()
    with pytest.raises(UserError, match="changed is missing"):
        cache.take(source, shard)
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.arrayrecord"))


def test_a_store_that_comes_back(store, tmp_path):
    source, shard = put(store, "shaky", b"w" * SIZE)
    store.fail(seconds=1.5, on="shards/shaky")
    assert ShardCache(tmp_path, limit=SIZE).take(source, shard).read_bytes() == b"w" * SIZE and store.failed
