"""Evaluation over training: in the loop, checkpoint by checkpoint, and as the paper's tables and curves show it."""

import csv
import importlib.util
import io
import json
import re
import shutil
from typing import NamedTuple

import pytest

lm_eval = pytest.importorskip("lm_eval")

from ctllm_jax.config.statuses import INTERRUPTED, WRONG_INPUT  # noqa: E402
from ctllm_jax.report.run import read_run  # noqa: E402
from ctllm_jax.training.metrics import scalars  # noqa: E402
from tests.cli.conftest import call, text_overrides  # noqa: E402
from tests.evaluation import official_files as files  # noqa: E402
from tests.runs import assert_same_bits, read_arrays  # noqa: E402

TASKS = "cmmlu_anatomy,cmmlu_virology"


class LoopRun(NamedTuple):
    directory: object
    data: object
    out: str


@pytest.fixture(scope="module")
def loop_run(corpus, tmp_path_factory):
    """The run of three steps again, with a checkpoint of each and benchmarks behind the second and the last."""
    folder = tmp_path_factory.mktemp("loop")
    data = folder / "data"
    data.mkdir()
    files.write_cmmlu(data / "cmmlu_v1_0_1.zip", questions=6)
    printed = call("pretrain", "debug/pretrain", f"run.dir={folder / 'run'}", *text_overrides(corpus),
                   "model.init_std=0.2", "checkpoint.every=1", "checkpoint.keep_last=5", "evaluation.tasks.every=2",
                   f"evaluation.tasks.names={TASKS}", "evaluation.tasks.limit=4", f"evaluation.tasks.data={data}",
                   "log.report=true")
    assert printed.status == 0, printed.err
    return LoopRun(folder / "run", data, printed.out)


@pytest.fixture(scope="module")
def evaluated(loop_run, tmp_path_factory):
    """A copy of that run, two of whose checkpoints were evaluated before the command was interrupted."""
    from ctllm_jax.evaluation import evaluate

    directory = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(loop_run.directory, directory)
    (directory / "report.html").unlink()
    command = ["evaluate", directory, "checkpoints=all", f"tasks={TASKS},bits_per_byte", "num_fewshot=1",
               f"data={loop_run.data}", "samples=true"]
    run_tasks, count = evaluate.run_tasks, 0

    def interrupted(*args, **options):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return run_tasks(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "run_tasks", interrupted)
        printed = call(*command)
    assert printed.status == INTERRUPTED, printed.err
    return LoopRun(directory, loop_run.data, command)


def result_of(directory, step, shots="-1shot"):
    return json.loads((directory / "evaluation" / str(step) / f"cmmlu_anatomy+cmmlu_virology{shots}.json").read_text())


def test_training_is_the_same_with_benchmarks_in_the_loop_and_without(text_run, loop_run):
    assert_same_bits(read_arrays(loop_run.directory, 3), read_arrays(text_run.directory, 3))


def test_the_loop_tells_the_figures_that_evaluate_tells_of_its_checkpoint(loop_run, tmp_path):
    run = read_run(loop_run.directory)
    assert [record["step"] for record in run.benchmarks] == [2, 3] and not run.problems
    assert run.benchmarks[0]["tokens"] == 1024
    printed = call("evaluate", f"{loop_run.directory}@2", f"tasks={TASKS}", "limit=4", f"data={loop_run.data}",
                   f"output={tmp_path}")
    assert printed.status == 0, printed.err
    result = json.loads((tmp_path / "cmmlu_anatomy+cmmlu_virology-limit4.json").read_text())
    for task in TASKS.split(","):
        told, interval = run.benchmarks[0]["tasks"][task], result["ctllm_jax"]["intervals"][task]["acc,none"]
        assert told["value"] == 100 * result["results"][task]["acc,none"]
        assert (told["low"], told["high"]) == (100 * interval["low"], 100 * interval["high"])
        assert (told["questions"], told["chance"]) == (4, 25.0) and told["setting"]["asked"] == "4 of 6"
    assert re.search(r"step 2 \| benchmarks \| cmmlu_anatomy \d+\.\d% \[.*\], guessing 25\.0 \| cmmlu_virology",
                     loop_run.out)
    assert scalars(run.benchmarks[0]).keys() == {f"benchmarks/{task}" for task in TASKS.split(",")}
    assert ">cmmlu_anatomy</b>" in (loop_run.directory / "report.html").read_text()


@pytest.mark.parametrize(("words", "message"), [
    (["evaluation.tasks.every=2"], "it takes both, or neither"),
    (["evaluation.tasks.names=cmmlu"], "it takes both, or neither"),
    (["evaluation.tasks.every=2", "evaluation.tasks.names=cmlu"], "no task cmlu; did you mean"),
    (["evaluation.tasks.every=2", "evaluation.tasks.names=cmmlu,hellaswag"], "lacks the questions of\n  hellaswag"),
    (["evaluation.tasks.every=2", "evaluation.tasks.names=agieval_gaokao_mathcloze"], "are written"),
    (["evaluation.tasks.every=2", "evaluation.tasks.names=cmmlu", "evaluation.tasks.apply_chat_template=true"],
     "pretraining teaches no template")])
@pytest.mark.parametrize("dry", [False, True])
def test_what_cannot_be_asked_in_the_loop_fails_before_anything_is_made(words, message, dry, loop_run, corpus,
                                                                            tmp_path):
    files.write_gaokao(loop_run.data)
    printed = call("pretrain", "debug/pretrain", f"run.dir={tmp_path / 'run'}", *text_overrides(corpus),
                   f"evaluation.tasks.data={loop_run.data}", *words, *["--dry-run"] * dry)
    assert printed.status == WRONG_INPUT and message in printed.err and not (tmp_path / "run").exists()


def test_a_missing_extra_is_named_before_training_starts(loop_run, corpus, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    printed = call("pretrain", "debug/pretrain", f"run.dir={tmp_path / 'run'}", *text_overrides(corpus),
                   "evaluation.tasks.every=1", "evaluation.tasks.names=cmmlu")
    assert printed.status == WRONG_INPUT
    assert "evaluation.tasks needs lm-eval: pip install 'ctllm-jax[eval]'" in printed.err
    assert not (tmp_path / "run").exists()


def test_an_evaluation_of_checkpoints_goes_on_where_it_was_interrupted(evaluated):
    folder = evaluated.directory / "evaluation"
    there = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert sorted({path.parent.name for path in there}) == ["1", "2", "3"] and len(there) == 5
    printed = call(*evaluated.out)
    assert printed.status == 0, printed.err
    assert re.findall(r"@(\d) has these results already", printed.out) == ["1", "2"]
    assert [result_of(evaluated.directory, step)["ctllm_jax"]["checkpoint"]["step"] for step in (1, 2, 3)] == [1, 2, 3]
    kept = {path: path.stat().st_mtime_ns for path in there if path.parent.name != "3"}
    assert kept == {path: there[path] for path in kept}
    again = call(*evaluated.out)
    assert len(re.findall("has these results already", again.out)) == 3 and "loglikelihoods" not in again.out


def test_a_checkpoint_among_others_is_asked_what_it_is_asked_alone(evaluated, tmp_path):
    if not (evaluated.directory / "evaluation" / "3" / "cmmlu_anatomy+cmmlu_virology-1shot.json").exists():
        assert call(*evaluated.out).status == 0
    assert call("evaluate", f"{evaluated.directory}@3", f"tasks={TASKS}", "num_fewshot=1", f"data={evaluated.data}",
                f"output={tmp_path}", "samples=true").status == 0
    name = "cmmlu_anatomy+cmmlu_virology-1shot.samples.jsonl"
    alone = (tmp_path / name).read_text()
    assert alone == (evaluated.directory / "evaluation" / "3" / name).read_text()
    # Drawn examples too: those of the first checkpoint are those of the last.
    arguments = [[json.loads(line)["arguments"] for line in text.splitlines()] for text in
                 (alone, (evaluated.directory / "evaluation" / "1" / name).read_text())]
    assert arguments[0] == arguments[1]


def test_other_questions_are_asked_again(evaluated):
    printed = call(*[*evaluated.out[:2], "checkpoints=1", *evaluated.out[3:], "seed=5"])
    assert printed.status == 0 and "already" not in printed.out
    assert call(*[*evaluated.out[:2], "checkpoints=1", *evaluated.out[3:]]).status == 0


@pytest.mark.parametrize(("words", "message"), [
    (["checkpoints=7"], "has no step 7; it has 1, 2, 3"), (["checkpoints=milestones"], "has no milestones"),
    (["checkpoints=some"], "must be all, milestones, or steps"), (["checkpoints=all", "output=x"], "leave it out"),
    (["held_out.sources.zh=nowhere.jsonl"], "only read with tasks=bits_per_byte")])
def test_checkpoints_that_are_not_there(words, message, evaluated):
    printed = call("evaluate", evaluated.directory, f"tasks={TASKS}", f"data={evaluated.data}", *words)
    assert printed.status == WRONG_INPUT and message in printed.err, printed.err


def test_the_tables_of_a_run(evaluated, tmp_path):
    printed = call("tables", evaluated.directory, "rows=measured")
    assert printed.status == 0, printed.err
    base, course = printed.out.split("Over training: run")
    assert re.search(r"cmmlu_anatomy +– +– +\d+\.\d \[.*\]ᵃ +1 +6 +25\.0", base)
    assert "step 1 " in course and "CT-LLM 13.3B" in course and "the model sees 64 tokens at once" in course
    assert call("tables", evaluated.directory, f"output={tmp_path / 'made' / 'tables.md'}").out.startswith("tables: ")
    assert "| BoolQ | 51.74 | 42.17 | – | – | – | – |" in (tmp_path / "made" / "tables.md").read_text()
    assert call("tables", evaluated.directory, f"output={tmp_path / 'tables.txt'}").status == 0
    assert "BoolQ" in (tmp_path / "tables.txt").read_text()
    rows = list(csv.DictReader(io.StringIO(call("tables", evaluated.directory, "format=csv").out)))
    ours = [row for row in rows if row["origin"] == "ours" and row["row"] == "cmmlu_virology"]
    assert {row["step"] for row in ours} == {"1", "2", "3"} and all(0 <= float(row["value"]) <= 100 for row in ours)


@pytest.mark.parametrize(("words", "message"), [
    ([], "tables needs a run directory"), (["output=tables.html"], "must end in .md, .csv, .txt"),
    (["sute=x"], "did you mean suite")])
def test_tables_that_cannot_be_made(words, message):
    printed = call("tables", *words)
    assert printed.status == WRONG_INPUT and message in printed.err


def test_a_run_that_was_not_asked_is_told_what_asks_it(loop_run, tmp_path):
    shutil.copytree(loop_run.directory, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    printed = call("tables", tmp_path / "run")
    assert printed.status == WRONG_INPUT and f"launch.py evaluate {tmp_path / 'run'} suite=" in printed.err


def test_the_report_has_a_curve_of_each_benchmark(evaluated):
    assert call("report", evaluated.directory).status == 0
    page = (evaluated.directory / "report.html").read_text()
    section = page[page.index('id="benchmarks"'):page.index('<section id="', page.index('id="benchmarks"') + 1)] \
        if '<section id="' in page[page.index('id="benchmarks"') + 1:] else page[page.index('id="benchmarks"'):]
    figures = re.findall(r"<figure.*?</figure>", section, re.S)
    titles = [re.search(r"<b>(.*?)</b>", each)[1] for each in figures]
    assert titles == ["cmmlu_anatomy", "cmmlu_virology", "bits per byte · zh", "bits per byte · en"]
    assert figures[0].count('class="span') == 4 and "guessing 25.0%" in figures[0]  # two settings on two scales
    assert 'data-scale="log"' in figures[0] and 'data-scale="linear"' in figures[0]


def test_bits_per_byte_of_held_out_data_are_those_of_training(evaluated, text_run):
    told = {record["step"]: record["sources"] for record in read_run(text_run.directory).evaluation}[3]
    if not (evaluated.directory / "evaluation" / "3" / "bits_per_byte.json").exists():
        assert call(*evaluated.out).status == 0
    found = json.loads((evaluated.directory / "evaluation" / "3" / "bits_per_byte.json").read_text())
    for source in ("zh", "en"):
        measured = found["ctllm_jax"]["held_out"][source]
        assert measured["bits_per_byte"] == pytest.approx(told[source]["bits_per_byte"], rel=1e-5)
        assert (measured["tokens"], measured["bytes"]) == (told[source]["tokens"], told[source]["bytes"])
        assert found["results"][f"bits_per_byte_{source}"]["bits_per_byte,none"] == measured["bits_per_byte"]
