"""Killed anywhere, any number of times, the pipeline comes to the same bytes; and so it does on a cluster."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.pipeline import prepare
from data_prep.report import make_report
from data_prep.train_tokenizer import fit
from tests.data_prep.corpus import config, document, tree, write_corpus

REPOSITORY = Path(__file__).resolve().parent.parent.parent
RESULT = ("clean", "text", "stages/read/parts", "stages/filter/parts", "stages/minhash/parts", "stages/exact/parts",
          "stages/clusters/parts", "stages/tokenize/parts", "stages/pack/parts")


@pytest.fixture
def corpus(tmp_path):
    """Text, a tokenizer, and what an undisturbed run makes of them in out/."""
    write_corpus(tmp_path / "raw", documents=200, files=8)
    (tmp_path / "t.model").write_bytes(fit([document(seed) for seed in range(50)], vocab_size=600,
                                           character_coverage=1.0))
    options = config(tmp_path, tokenizer=str(tmp_path / "t.model"), shards=2)
    rows = make_report(options, prepare(options), command="test")["funnel"]
    assert {row["stage"]: row["dropped"] for row in rows} == {
        "read": 0, "filter": 0, "exact": 20, "minhash": 20, "lines": 0, "tokenize": 0}
    return tmp_path


def start(folder, **changes):
    """The same run in a process group of its own."""
    options = {"tokenizer": folder / "t.model", "shards": 2, "output": folder / "killed", **changes}
    command = [sys.executable, "-m", "tests.data_prep.killed_pipeline", str(folder),
               *(f"{name}={value}" for name, value in options.items())]
    return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.PIPE,
                            env={**os.environ, "JAX_PLATFORMS": "cpu"})


def kill_at_random(folder, *, kills, seed):
    """Start the run again and again and kill it and its workers, each time soon after another of its commits, then
    let it end; gives the kills that hit."""
    draw, hits = random.Random(seed), 0
    commits = len(list(folder.glob("out/stages/*/commits/*")))
    for awaited in sorted(draw.sample(range(commits * 3 // 4), kills)):  # places, not times: machines differ in speed
        process = start(folder, workers=2)
        while process.poll() is None and len(list(folder.glob("killed/stages/*/commits/*"))) < awaited:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            hits += 1
        _, error = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, error.decode()
            break
    process = start(folder, workers=2)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error.decode()
    return hits


@pytest.mark.prep
def test_a_killed_run_ends_as_if_it_had_not_been(corpus):
    assert kill_at_random(corpus, kills=4, seed=time.time_ns()) >= 2
    assert tree(corpus / "killed", *RESULT) == tree(corpus / "out", *RESULT)


@pytest.mark.slow
@pytest.mark.prep
def test_twenty_kills_lose_nothing_and_double_nothing(corpus):
    hits = 0
    for round_ in range(20):
        output = corpus / f"killed{round_}"
        process = start(corpus, workers=2, output=output)
        try:
            process.wait(timeout=random.uniform(0.5, 9))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            hits += 1
        process.communicate()
        process = start(corpus, workers=2, output=output)
        assert process.wait(timeout=300) == 0, process.stderr.read().decode()
        process.communicate()
        assert tree(output, *RESULT) == tree(corpus / "out", *RESULT), f"round {round_}"
    assert hits >= 10


@pytest.mark.slow
@pytest.mark.prep
def test_a_cluster_gives_the_same_bytes(corpus):
    process = start(corpus, engine="ray", workers=2)
    _, error = process.communicate(timeout=500)
    assert process.returncode == 0, error.decode()
    assert tree(corpus / "killed", *RESULT) == tree(corpus / "out", *RESULT)


@pytest.mark.prep
def test_ctrl_c_ends_at_once_with_its_status_and_the_command_goes_on(corpus):
    command = [sys.executable, "launch.py", "prepare", f"input={corpus / 'raw'}", f"output={corpus / 'stopped'}",
               "rules=web", "workers=2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 60
    while not list(corpus.glob("stopped/stages/*/commits/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and b"interrupted" in error and b"Traceback" not in error
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=200,
                           env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert again.returncode == 0, again.stderr.decode()
    assert tree(corpus / "stopped", "clean") == tree(corpus / "out", "clean")
