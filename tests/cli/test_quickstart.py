"""`quickstart` over a little text in place of the installed packages': every stage, once."""

import json
import random

import pytest

from ctllm_jax.cli import quickstart
from ctllm_jax.report.run import read_run
from tests.cli.conftest import call
from tests.small_text import write_texts

STAGES = ["text", "clean", "tokenizer", "datasets", "baselines"]


def write_small_text(folder):
    """What the packages would give: three JSONL files, one document of each twice."""
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder / "zh.jsonl", "zh", count=150)
    write_texts(folder / "en.jsonl", "en", count=150)
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(60)]
    functions = ["".join(f"def {one}({two}):\n    return {three} + {draw.randrange(99)}\n" for one, two, three in
                         (draw.sample(names, 3) for _ in range(1 + index % 5))) for index in range(150)]
    (folder / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in functions))
    for path in folder.iterdir():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines, lines[0]]))


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.quickstart_text.write_quickstart_text", write_small_text)
    small = ["model.vocab_size=330", "data.kind=mixture", "batch.sequence_length=32", "batch.tokens=256", "steps=4",
             "evaluation.rows_per_device=4", "evaluation.every=4", "sample.every=4", "log.report=true"]
    sources = [f"data.sources.{name}.path={tmp_path / 'data' / name}" for name in quickstart.SOURCES]
    return ["quickstart", "debug/pretrain", f"run.dir={tmp_path / 'run'}", *small, *sources]


def test_from_nothing_to_a_report_and_again(command, tmp_path, monkeypatch):
    printed = call(*command)
    assert printed.status == 0, printed.err
    run = read_run(tmp_path / "run")
    assert run.state == "done" and [stage["name"] for stage in run.stages] == [*STAGES, "training"]
    assert set(run.baselines) == set(json.loads((tmp_path / "data/baselines.json").read_text()))
    assert (tmp_path / "run/report.html").exists()
    # Ours beside each baseline, for each source; the copies were found.
    figures = run.evaluation[-1]["sources"]
    for source in quickstart.SOURCES:
        rows = [line.split() for line in printed.out.splitlines() if line.split()[:1] == [source]]
        assert rows[0][1] == "151" and rows[0][3] == "1"
        assert rows[-1][1] == f"{figures[source]['bits_per_byte']:.3f}"
        assert len(rows[-1]) == 3 + len(run.baselines)

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    monkeypatch.setattr(quickstart, "train", lambda *arguments, **options: {})
    again = call(*command)
    assert again.status == 0 and all(f"{stage}: there already" in again.out for stage in STAGES)
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}


def test_another_vocabulary_makes_tokenizer_and_datasets_anew(command, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "train", lambda *arguments, **options: {})
    assert call(*command, "log.report=false").status == 0
    again = call(*command, "model.vocab_size=350", "log.report=false")
    assert again.status == 0, again.err
    assert "text: there already" in again.out and "tokenizer: there already" not in again.out
    assert "datasets: there already" not in again.out and "baselines: there already" in again.out
    manifest = json.loads((tmp_path / "data/zh/manifest.json").read_text())
    assert manifest["tokenizer"]["vocab_size"] == 350


def test_a_stage_that_fails_is_done_again(command, monkeypatch, tmp_path):
    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "make_tokenizer", fail)
        assert call(*command).status == 130
    monkeypatch.setattr(quickstart, "train", lambda *arguments, **options: {})
    printed = call(*command, "log.report=false")
    assert printed.status == 0 and "text: there already" in printed.out
    assert "tokenizer: there already" not in printed.out


@pytest.mark.parametrize("overrides", [
    ["data.sources.zh.path=elsewhere/zh"], ["data.sources.code=null"], ["data.sources.zh.path=data/chinese"],
    ["data.sources.math=data/math"]])
def test_other_sources_are_for_other_commands(command, overrides):
    printed = call(*command, *overrides)
    assert printed.status == 2 and "quickstart makes its own data" in printed.err and "launch.py prepare" in printed.err
