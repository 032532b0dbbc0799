"""`evaluate` as a user sees it: results where they belong, in lm-eval's layout; mistakes before anything is loaded."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")

from ctllm_jax.config.errors import UserError  # noqa: E402
from ctllm_jax.evaluation import results  # noqa: E402
from tests.cli.conftest import call  # noqa: E402
from tests.evaluation import official_files as files  # noqa: E402
from tests.runs import REPOSITORY  # noqa: E402

TASKS = "tasks=cmmlu_arts,cmmlu_anatomy"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    files.write_cmmlu(folder / "cmmlu.zip", questions=3)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Converted files go to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def evaluated(text_run, data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        printed = call("evaluate", text_run.directory, TASKS, f"data={data}", "num_fewshot=1", "limit=2",
                       "samples=true", "max_length=512")
    assert printed.status == 0, printed.err
    return printed


def test_results_lie_with_the_run_and_say_what_decided_them(evaluated, text_run):
    folder = text_run.directory / "evaluation" / "3"
    name = "cmmlu_anatomy+cmmlu_arts-1shot-limit2"
    assert {path.name for path in folder.iterdir()} == {f"{name}.json", f"{name}.samples.jsonl", "answers.jsonl"}
    result, = results.read_results(text_run.directory)
    assert result["path"] == str(folder / f"{name}.json")
    assert result["n-shot"] == {"cmmlu_arts": 1, "cmmlu_anatomy": 1}
    assert result["n-samples"]["cmmlu_arts"] == {"original": 3, "effective": 2} and result["config"]["limit"] == 2
    assert {"results", "configs", "versions", "higher_is_better", "lm_eval_version", "date"} <= result.keys()
    assert "samples" not in result and "git_hash" not in result
    own = result[results.OURS]
    assert own["checkpoint"]["step"] == 3 and own["checkpoint"]["tokens"] > 0
    assert (own["wording"], own["dtype"], own["max_length"], own["limit"]) == ("lm-eval", "float32", 512, 2)
    assert own["chance"] == {"cmmlu_arts": 0.25, "cmmlu_anatomy": 0.25}
    interval = own["intervals"]["cmmlu_arts"]["acc,none"]
    assert interval["low"] <= result["results"]["cmmlu_arts"]["acc,none"] <= interval["high"]
    assert own["command"].startswith("python launch.py evaluate ")
    rows = [json.loads(line) for line in (folder / f"{name}.samples.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["cmmlu_arts"] * 2 + ["cmmlu_anatomy"] * 2
    assert all(len(row["arguments"]) == 4 for row in rows)


def test_the_table_has_intervals_and_chance(evaluated):
    rows = [line.split() for line in evaluated.out.splitlines()]
    assert ["task", "examples", "questions", "metric", "value", "95", "%", "chance"] in rows
    arts = next(row for row in rows if row[:1] == ["cmmlu_arts"])
    assert arts[1:4] == ["1", "2", "acc"] and arts[6] == "–" and arts[-1] == "0.2500"


def test_the_same_command_asks_nothing_again(evaluated, text_run, data):
    answers = text_run.directory / "evaluation" / "3" / "answers.jsonl"
    before = answers.read_bytes()
    first, = results.read_results(text_run.directory)
    printed = call("evaluate", text_run.directory, TASKS, f"data={data}", "num_fewshot=1", "limit=2", "max_length=512")
    assert printed.status == 0 and answers.read_bytes() == before
    again, = results.read_results(text_run.directory)
    assert again["results"] == first["results"] and again[results.OURS]["counts"] == {}


def test_a_dry_run_counts_the_questions(text_run, data):
    printed = call("evaluate", text_run.directory, TASKS, f"data={data}", "limit=0.5", "--dry-run")
    assert printed.out.splitlines() == ["cmmlu_arts: 2 questions, 0 examples", "cmmlu_anatomy: 2 questions, 0 examples",
                                        "2 tasks, 4 questions"]


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere", "tasks=mmlu"], "no model nowhere: nowhere is no directory"),
    (["hf", "tasks=mmlu"], "hf is a Hugging Face folder, and results do not belong in it: give output=FOLDER"),
    (["hf", "tasks=mmlu", "output=out", "template=plain"], "apply_chat_template=false would not use it"),
    (["hf", "tasks=mmmlu,cmlu", "output=out"], "no task mmmlu; did you mean mmlu"),
    (["hf", "tasks=mmlu", "output=out", "limit=2.5"], "limit=2.5 must be a whole number"),
    (["hf", "tasks=mmlu,mmlu", "output=out"], "each once"), (["tasks=mmlu"], "needs one MODEL")])
def test_mistakes_are_told(tmp_path, words, message):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    printed = call("evaluate", *words)
    assert printed.status == 2 and message in printed.err


def test_help_and_a_wrong_name_need_no_model_library():
    script = ("import sys; from ctllm_jax.cli import main; main(['evaluate', '--help']); "
              "main(['evaluate', 'ctllm_jax', 'tasks=mmmlu']); "
              "print([name for name in ('jax', 'torch', 'transformers', 'lm_eval') if name in sys.modules])")
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert shown.stdout.splitlines()[-1] == "[]" and "no task mmmlu; did you mean mmlu" in shown.stderr


def test_names_of_results():
    assert results.result_name(["mmlu", "cmmlu"], num_fewshot=5, limit=None, chat=False) == "cmmlu+mmlu-5shot"
    assert results.result_name(["gsm8k"], num_fewshot=None, limit=0.5, chat=True) == "gsm8k-limit0.5-chat"
    many = results.result_name([f"task_number_{place}" for place in range(30)], num_fewshot=0, limit=None, chat=False)
    assert many.startswith("30-tasks-") and many.endswith("-0shot") and len(many) < 40


def test_results_of_all_steps_in_order_and_nothing_else(tmp_path):
    for step in (1000, 20):
        results.write_result(results.result_folder(tmp_path, step) / "a.json", {
            "results": {}, results.OURS: {"step": step}})
    results.write_result(results.result_folder(tmp_path, 20) / "other.json", {"scores": 1})
    (tmp_path / "evaluation" / "judge").mkdir()
    assert [each[results.OURS]["step"] for each in results.read_results(tmp_path)] == [20, 1000]
    assert [each[results.OURS]["step"] for each in results.read_results(tmp_path, step=20)] == [20]
    (results.result_folder(tmp_path, 20) / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b\.json is malformed"):
        results.read_results(tmp_path)
