"""The benchmark of faults: two of its rows, and what it makes of the rest."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.runs import REPOSITORY, environment


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        spec = importlib.util.spec_from_file_location("faults_benchmark", REPOSITORY / "benchmarks/faults.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_two_rows(tmp_path):
    """A disk that refuses to write, in two ways: told, and over when it is over."""
    output = tmp_path / "faults.json"
    done = subprocess.run([sys.executable, "benchmarks/faults.py", "--only", "file-limit", "other-user", "--scratch",
                           tmp_path, "--output", output], check=False, capture_output=True, text=True, timeout=300,
                          cwd=REPOSITORY, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "survived 3 of 3 faults of 2 kinds"
    limit, user = json.loads(output.read_text())["rows"]
    assert (limit["fault"], limit["tried"], limit["survived"], user["tried"], user["survived"]) == (
        "file-limit", 1, 1, 2, 2)
    assert limit["message"] == ("error: a checkpoint could not be written below RUN: File too large; make room there"
                                " and give the same command again: it goes on from step 2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faults.json"]


def row(name, **differing):
    return {"fault": name, "what": f"{name} is broken", "tried": 2, "survived": 2, "lost": "none", "message": "a | b",
            "not_tried": "", "steps_again": 1, "seconds_again": 0.25, "problems": [], "took": 3.0, **differing}


def test_rows_of_before_stay_and_the_table_stands_between_its_markers(benchmark, tmp_path, monkeypatch):
    page, output = tmp_path / "page.md", tmp_path / "faults.json"
    monkeypatch.setattr(benchmark, "PAGE", page)
    benchmark.write_results(output, [row("kill"), row("flip")], order=["kill", "flip", "nan"])
    lost = row("flip", survived=1, problems=["run 3: other bits"])
    rows = benchmark.write_results(output, [lost, row("nan", not_tried="no", tried=0, survived=0)],
                                   order=["kill", "flip", "nan"])
    page.write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    benchmark.write_table(rows)
    assert page.read_text().splitlines()[4:] == [
        "| kill is broken | 2 | 2 | none | 1 step, 0.25 s | `a \\| b` |",
        "| flip is broken | 2 | 1 | run 3: other bits | 1 step, 0.25 s | `a \\| b` |",
        "| nan is broken | not tried | – | no | – | – |", benchmark.END, "after"]
    assert json.loads(output.read_text())["figures"]["survived"] == {"kill is broken": 2, "flip is broken": 1}
    assert "NOT SURVIVED: run 3: other bits" in benchmark.say(lost)
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        benchmark.write_table(rows)


def test_a_row_that_is_lost_says_so(benchmark, tmp_path, monkeypatch):
    """And exit status 1 comes of it."""
    monkeypatch.setattr(benchmark, "prepare", lambda scratch: None)
    from fault_matrix import bench

    def lose(its_bench, outcome):
        outcome.add()
        raise bench.Lost("nothing is left")

    def refuse(its_bench, outcome):
        raise bench.NotTried("there is no disk")

    monkeypatch.setattr(bench, "FAULTS", {"a": bench.Fault("a", "A", lose), "b": bench.Fault("b", "B", refuse)})
    for names, status in ((["b"], 0), (["a", "b"], 1)):
        monkeypatch.setattr(sys, "argv", ["faults.py", "--only", *names, "--output", str(tmp_path / "faults.json")])
        assert benchmark.main() == status
    first, second = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert (first["tried"], first["survived"], first["problems"]) == (2, 1, ["nothing is left"])
    assert (second["tried"], second["not_tried"]) == (0, "there is no disk")
