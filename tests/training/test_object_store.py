"""A run on an object store: the bits of one on a disk, through kills and a store that fails."""

import contextlib
import json
import time

import jax
import pytest

from ctllm_jax import storage
from ctllm_jax.cli import checkpoint as cli
from ctllm_jax.cli import main
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import CheckpointConfig
from ctllm_jax.config.statuses import REQUEUE, WRONG_INPUT
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.report.run import read_run
from ctllm_jax.storage import open_path
from ctllm_jax.training.checkpoints import checkpoint, files
from ctllm_jax.training.checkpoints import manager as checkpoint_manager
from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint, list_checkpoints, load_params
from ctllm_jax.training.checkpoints.checkpointer import Checkpointer, NotWritten
from ctllm_jax.training.supervision.lock import make_lock, read_owner
from ctllm_jax.training.tuning import open_text
from tests.object_store import BUCKET
from tests.runs import DEBUG, assert_same_bits, cached, launch, read_arrays, start
from tests.small_text import VOCABULARY, make_corpus
from tests.training.test_checkpoint import TOKENS, abstract_state, make_state, save
from tests.training.test_processes import free_port


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cached(tmp_path_factory.mktemp("compiled"))


def open_run(url, **config):
    return Checkpointer(open_path(url), CheckpointConfig(every=1, **config), tokens_per_step=TOKENS, meta={"eod_id": 3})


def steps_at(url):
    return [path.name for path in files.list_steps(open_path(url), files.CHECKPOINTS)]


@pytest.fixture(scope="module")
def three_steps(object_store, tmp_path_factory):
    """A run directory with steps 1 to 3, of which the newest two are kept; as files."""
    object_store.write("three/config.yaml", b"")
    checkpointer = open_run(f"gs://{BUCKET}/three", keep_last=2)
    save(checkpointer, [1, 2, 3])
    checkpointer.close()
    return object_store.download("three", tmp_path_factory.mktemp("three"))


@pytest.fixture
def url(store, three_steps, tmp_path):
    """A copy of it on the store."""
    return store.upload(three_steps, tmp_path.name.replace("[", "-").replace("]", ""))


def test_kept_and_restored(url, store):
    assert steps_at(url) == ["2", "3"]
    checkpointer = open_run(url, keep_last=2)
    assert checkpointer.latest() == 3
    restored = checkpointer.restore(abstract_state(), step=3)
    for ours, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(make_state(3)), strict=True):
        assert ours.tobytes() == wanted.tobytes()
    checkpointer.close()
    newest = list_checkpoints(open_path(url))[-1]
    assert newest.size == sum(len(store.read(name)) for name in store.names(f"{url[12:]}/checkpoints/3/"))
    load_params(newest, abstract_state().params)
    # A step that was copied to a disk is compared there, too.
    assert files.find_damage(newest.path) == []


def test_copied_to_a_disk_and_back(url, store, tmp_path):
    run_dir = store.download(url[12:], tmp_path / "run")
    step = run_dir / "checkpoints/3"
    assert files.find_damage(step) == []
    name = next(path for path in (step / "params").rglob("d/*"))
    data = name.read_bytes()
    name.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "its md5 is another" in files.find_damage(step)[0]
    name.write_bytes(data)
    (step / files.MANIFEST).unlink()
    files.write_manifest(step)  # of crc32, as a disk has it
    assert files.find_damage(open_path(store.upload(run_dir, f"{url[12:]}-back")) / "checkpoints/3") == []


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted"])
def test_damage_goes_into_quarantine(url, store, damage):
    name = next(name for name in store.names(f"{url[12:]}/checkpoints/3/params/") if "/d/" in name)
    data = store.read(name)
    if damage == "deleted":
        open_path(f"gs://{BUCKET}/{name}").unlink()
    else:
        store.write(name, data[:-1] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    checkpointer = open_run(url, keep_last=2)
    assert checkpointer.latest() == 2
    checkpointer.close()
    assert steps_at(url) == ["2"]
    assert list(files.quarantined(open_path(url))) == ["3"]
    assert f"{url[12:]}/quarantine/3/manifest.json" in store.names()


def test_half_removed_is_gone(url, store):
    """A process that is killed while it removes a step has taken away its last object first."""
    store.fail(on="checkpoints/2/(params|trainer)", status=403)
    with pytest.raises(OSError, match="no permission"):
        files.discard(open_path(url) / "checkpoints/2")
    store.heal()
    assert [name for name in store.names(f"{url[12:]}/checkpoints/2/")] and steps_at(url) == ["3"]
    open_run(url, keep_last=2).close()
    assert not store.names(f"{url[12:]}/checkpoints/2/")


@pytest.fixture
def count(store, monkeypatch):
    """(function) -> the requests that it makes, those that wait for each other counted as one."""
    at_once = []

    def watch(whole):
        def watched(*arguments):
            before = len(store.requests)
            answer = whole(*arguments)
            at_once.append(len(store.requests) - before)
            return answer

        return watched

    for name in ("read_small", "in_parallel"):
        watched = watch(getattr(storage, name))
        for module in (storage, checkpoint, cli):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, watched)

    def made(function):
        store.requests.clear()
        at_once.clear()
        function()
        return len(store.requests), len(store.requests) - sum(at_once) + len([each for each in at_once if each])

    return made


def test_how_many_requests_a_list_takes(url, store, count, capsys):
    """None waits for one of another step: 600 steps took 170 s at 40 ms."""
    def look():
        found = [count(lambda: list_checkpoints(open_path(url))), count(lambda: find_checkpoint(url)),
                 count(lambda: main(["checkpoint", "ls", url])), count(lambda: main(["checkpoint", "verify", url]))]
        opened = []
        found.append(count(lambda: opened.append(open_run(url, keep_last=1000))))
        found.append(count(opened[0].latest))
        return opened[0], found

    checkpointer, few = look()
    checkpointer.close()
    prefix, added = f"{url[12:]}/checkpoints", range(4, 8)
    manifest = json.dumps({"checksum": "md5", "own": files._own_checksum({}), "files": {}}).encode()
    for step in added:
        for name, content in (("commit_success.txt", b"x"), ("meta/metadata", b'{"tokens": 0}'),
                              ("manifest.json", manifest)):
            store.write(f"{prefix}/{step}/{name}", content)
    capsys.readouterr()
    checkpointer, many = look()
    assert capsys.readouterr().out.count("@7") == 1
    assert [after[1] - before[1] for before, after in zip(few, many, strict=True)] == [0] * len(few)
    for (before, _), (after, _), each in zip(few, many, (2, 1, 12, 8, 2, 0), strict=True):
        assert after - before <= each * len(added)
    # A save asks for nothing of the steps that stay, and never lists all of them.
    store.requests.clear()
    save(checkpointer, [8])
    checkpointer.close()
    asked = [path for _, path in store.requests if "/checkpoints/" in path and "/checkpoints/8/" not in path]
    assert not [path for path in asked if path.endswith(f"{prefix}/")]
    assert not [path for path in asked if any(f"/checkpoints/{step}/" in path for step in added)]


def test_a_process_that_is_told_of_the_steps_asks_for_none(url, store, count):
    def opened(steps):
        return lambda: checkpoint_manager.Manager(open_path(url) / "checkpoints", None, steps=steps).close()

    alone = count(opened([]))
    assert count(opened(range(1000))) == alone and alone[0] < 8


def test_one_owner(store):
    run_dir = open_path(f"gs://{BUCKET}/owned")
    first, second = (make_lock(run_dir, stale_after=0.6, what=what) for what in ("first", "second"))
    assert first.attempt() is None
    with pytest.raises(UserError, match=r"is in use by process \d+ on .* \(first\)\n.*STOP"):
        second.attempt()
    # Elsewhere it is not known whether a process lives: its heartbeat tells.
    first._mine["place"] = second._mine["place"] = "elsewhere"
    time.sleep(0.3)
    with pytest.raises(UserError, match="is in use"):
        for _ in range(100):
            assert second.attempt() is not None
            time.sleep(0.02)
    first._ended.set()  # as if killed
    first._thread.join()
    third = make_lock(run_dir, stale_after=0.6, what="third")
    began = time.monotonic()
    while third.attempt() is not None:
        time.sleep(0.02)
    assert 0.5 < time.monotonic() - began and read_owner(run_dir)["command"] == "third"
    first.release()  # does not take away what is another's
    assert read_owner(run_dir)["command"] == "third"
    third.release()
    assert read_owner(run_dir) is None


def wait_until(true, *processes):
    """Until something is true, or a process that should bring it about has ended."""
    deadline = time.monotonic() + 180
    while not true() and time.monotonic() < deadline and all(each.poll() is None for each in processes):
        time.sleep(0.05)


def begin_two(*words, **variables):
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    return [start(*words, **shared, JAX_PROCESS_ID=str(index), **variables) for index in range(2)]


def test_killed_in_the_last_write_of_a_save_and_resumed(store, tmp_path, cache):
    """Two processes, data and run on the store; the same bits as one process on a disk that nobody killed."""
    (tmp_path / "corpus").mkdir()
    corpus = make_corpus(tmp_path / "corpus")
    words = ["mesh.data=1", "mesh.fsdp=2", f"model.vocab_size={VOCABULARY}", "data.kind=mixture", "steps=6",
             "checkpoint.every=2", "checkpoint.keep_last=2", "optimizer.schedule=constant",
             f"data.cache_dir={tmp_path}"]
    local = [f"data.sources.{name}={corpus.folder / name}" for name in ("zh", "en")]
    remote = [f"data.sources.{name}={store.upload(corpus.folder / name, f'text/{name}')}" for name in ("zh", "en")]
    alone, url = tmp_path / "alone", f"gs://{BUCKET}/two"
    done = launch("pretrain", DEBUG, f"run.dir={alone}", *words, *local, devices=2, **cache)
    assert done.returncode == 0, done.stdout
    store.fail(on="checkpoints/4/commit_success")
    both = begin_two("pretrain", DEBUG, f"run.dir={url}", *words, *remote, **cache)
    wait_until(lambda: store.failed, *both)
    for each in both:
        each.kill()
    texts = [each.wait_for_text().stdout for each in both]
    assert store.failed, "\n".join(texts)
    store.heal()
    assert "two/checkpoints/4/manifest.json" in store.names() and steps_at(url) == ["2"]
    both = begin_two("pretrain", DEBUG, f"run.dir={url}", *words, *remote, **cache)
    texts = [each.wait_for_text().stdout for each in both]
    assert [each.returncode for each in both] == [0, 0], "\n".join(texts)
    assert sum("resuming at step 2" in text for text in texts) == 1
    assert steps_at(url) == ["4", "6"]
    assert_same_bits(read_arrays(store.download("two", tmp_path / "copy"), 6), read_arrays(alone, 6))
    ours, wanted = read_run(url), read_run(alone)
    assert [record["loss"] for record in ours.train] == [record["loss"] for record in wanted.train]
    assert not ours.problems and [record["step"] for record in ours.starts] == [0, 2]
    assert {"two/metrics-00001.jsonl", "two/metrics-00002.jsonl", "two/config.yaml", "two/environment.json",
            "two/tokenizer.model"} <= set(store.names("two/")) and "two/lock" not in store.names()
    assert json.loads(store.read("two/status.json"))["step"] == 6
    # Each shard came once, for both processes and both starts.
    shards = [path for _, path in store.requests if path.startswith("/download/") and "-train.array_record" in path]
    assert len(shards) == 2, shards
    tokenizer, _ = open_text(find_checkpoint(f"{url}@6")[1])
    assert tokenizer.encode("今天") == load_tokenizer(corpus.tokenizer).encode("今天")


def test_a_save_that_the_store_refuses(url, store):
    checkpointer = open_run(url, keep_last=2)
    store.fail(seconds=1.5, on="checkpoints/4")
    save(checkpointer, [4])
    wait_until(lambda: steps_at(url) == ["3", "4"])  # a thread removes the oldest
    assert store.failed and steps_at(url) == ["3", "4"]
    store.fail(on="checkpoints/5", status=403)
    with pytest.raises(NotWritten, match="could not be written below gs://.*: no permission .* is whole") as caught:
        save(checkpointer, [5])
    assert caught.value.status == WRONG_INPUT
    store.heal()
    with contextlib.suppress(NotWritten):
        checkpointer.close()
    assert steps_at(url) == ["3", "4"]
    open_run(url, keep_last=2).close()
    assert not store.names(f"{url[12:]}/checkpoints/5/")


@pytest.mark.slow
def test_a_store_that_fails(store, cache):
    url = f"gs://{BUCKET}/shaky"
    words = ["pretrain", DEBUG, f"run.dir={url}", "steps=1000000", "checkpoint.every=1000", "log.every=100"]
    process = start(*words, **cache)
    wait_until(lambda: "shaky/checkpoints/1000/commit_success.txt" in store.names(), process)
    # For a while: nothing is lost.
    store.fail(seconds=6)
    time.sleep(6)
    assert store.failed > 3
    store.write("shaky/STOP", b"")
    done = process.wait_for_text()
    assert done.returncode == 0 and "STOP: stopping after step" in done.stdout, done.stdout
    reached = json.loads(store.read("shaky/status.json"))["step"]
    assert steps_at(url)[-1] == str(reached) and "shaky/STOP" not in store.names()
    run = read_run(url)
    assert not run.problems and [record["step"] for record in run.train[:-1]] == list(range(100, reached, 100))[
        :len(run.train) - 1]
    # For good: told, and what there is stays.
    store.fail(on=f"checkpoints/{reached + 1}", status=403)
    done = launch(*words[:3], f"steps={reached + 1}", **cache)
    assert done.returncode == WRONG_INPUT, done.stdout
    assert "error: a checkpoint could not be written below gs://bucket/shaky: no permission" in done.stdout
    assert steps_at(url)[-1] == str(reached) and "shaky/lock" not in store.names()


@pytest.mark.slow
def test_a_store_that_does_not_come_back(store, cache):
    """gcsfs gives up behind half a minute: the run ends, whole, with the status that has it started again."""
    url = f"gs://{BUCKET}/lost"
    store.fail(on="checkpoints/[2-9]")
    done = launch("pretrain", DEBUG, f"run.dir={url}", "checkpoint.every=2", **cache)
    assert done.returncode == REQUEUE and "the same command goes on" in done.stdout, done.stdout
    store.fail(seconds=20)
    done = launch("pretrain", DEBUG, f"run.dir={url}", "checkpoint.every=2", **cache)
    assert done.returncode == 0 and steps_at(url)[-1] == "10", done.stdout
