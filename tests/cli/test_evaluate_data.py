"""`evaluate list` and `evaluate fetch` as a user sees them; the hub is one on the loopback, or a client that fails."""

import io
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")

from tests.cli.conftest import call  # noqa: E402
from tests.evaluation import official_files as files  # noqa: E402
from tests.hub_server import serve_hub  # noqa: E402
from tests.runs import REPOSITORY  # noqa: E402


def evaluate(*words):
    """Status, and the lines that were printed; a complaint as one line."""
    printed = call("evaluate", *words)
    return printed.status, (printed.out + printed.err).splitlines()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Converted files go to the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "client"))


def test_list_says_what_is_here_and_what_is_not(tmp_path):
    files.write_gaokao(tmp_path)
    (tmp_path / "HumanEval.jsonl").write_text("{")
    suite = tmp_path / "mine.yaml"
    suite.write_text("benchmarks:\n  History: agieval_gaokao_history\n  Code: humaneval\n  Safety: "
                     "cvalues_responsibility\n  GSM8K: gsm8k\n  TheoremQA: {absent: there is none}\n")
    status, lines = evaluate("list", f"suite={suite}", f"data={tmp_path}")
    assert status == 1 and lines == [
        "agieval_gaokao_history        3  gaokao-history.jsonl",
        f"humaneval               missing  {tmp_path}/HumanEval.jsonl is not in its official layout; download it "
        "again, or mend these rows:",
        "  HumanEval.jsonl:1: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "cvalues_responsibility  missing  cvalues_responsibility_mc.jsonl (X-PLUG/CValues: "
        "dataset/cvalues_responsibility_mc.jsonl)",
        "gsm8k                   missing  folder openai/gsm8k",
        "TheoremQA: there is none",
        f"1 of 4 have their questions in {tmp_path}",
        "of the missing: put them there as they were downloaded, or fetch what the hub has: python launch.py evaluate "
        f"fetch suite={suite} data={tmp_path}"]


def test_list_counts_the_questions_that_are_asked(tmp_path):
    files.write_cmmlu(tmp_path / "cmmlu.zip", questions=3)
    status, lines = evaluate("list", "tasks=cmmlu,cmmlu_china_specific,cmmlu_arts", f"data={tmp_path}")
    assert status == 0 and [line.split() for line in lines[:3]] == [
        ["cmmlu", "201", "cmmlu.zip"], ["cmmlu_china_specific", "45", "cmmlu.zip"], ["cmmlu_arts", "3", "cmmlu.zip"]]


def test_list_of_all_and_of_the_paper():
    status, lines = evaluate("list")
    assert status == 1 and "0 of 52 have their questions in data/evaluation" in lines
    status, lines = evaluate("list", "suite=configs/eval/paper.yaml")
    assert "0 of 39 have their questions in data/evaluation" in lines
    assert "TheoremQA: lm-eval 0.4.13 has no task of it" in lines


@pytest.mark.parametrize(("words", "complaint"), [
    (["list", "tasks=gsm9k"], "no task gsm9k; did you mean gsm8k?"),
    (["list", "tasks=gsm8k", "suite=eval/quick"], "tasks=gsm8k and suite=eval/quick: give one of them"),
    (["list", "gsm8k"], "evaluate list takes only keys; gsm8k is left over"),
    (["fetch"], "needs tasks=NAME,… or suite=FILE"),
    (["list", "suite=eval/quik"], "did you mean eval/quick"),
    (["list", "limit=3"], "limit (command line)"),
    (["runs/none", "suite=eval/quick", "tasks=mmlu"], "needs tasks=NAME,… or suite=FILE, not both"),
    (["runs/none"], "needs tasks=NAME,… or suite=FILE"),
    (["runs/none", "suite=eval/quick"], "no model runs/none"),
])
def test_wrong_input_is_told(words, complaint):
    status, lines = evaluate(*words)
    assert status == 2 and complaint.replace(" (command line)", "") in "\n".join(lines), lines


def test_a_suite_brings_its_examples(tmp_path):
    files.write_gaokao(tmp_path)
    files.write_cmmlu(tmp_path / "cmmlu.zip")
    suite = tmp_path / "mine.yaml"
    suite.write_text("benchmarks: {A: {task: cmmlu_arts, shots: 5}, B: agieval_gaokao_history}")
    status, lines = evaluate(tmp_path, f"suite={suite}", f"data={tmp_path}", "--dry-run")
    assert status == 0 and lines == ["cmmlu_arts: 2 questions, 5 examples", "agieval_gaokao_history: 3 questions, 0 "
                                     "examples", "2 tasks, 5 questions"]
    status, lines = evaluate(tmp_path, f"suite={suite}", f"data={tmp_path}", "num_fewshot=1", "--dry-run")
    assert lines[0] == "cmmlu_arts: 2 questions, 1 examples"


def test_fetch_takes_a_dataset_from_the_hub(tmp_path):
    import pyarrow
    from pyarrow import parquet

    written = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "1+1?", "answer": "2 #### 2"}] * 3), written)
    card = ("---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
            "  - split: test\n    path: main/test-*\n---\n")
    repository = {"README.md": card.encode(), **{f"main/{split}-00000-of-00001.parquet": written.getvalue()
                                                 for split in ("train", "test")}}
    with serve_hub({"openai/gsm8k": repository}) as (address, asked):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                       "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"), "PYTHONPATH": str(REPOSITORY),
                       "HF_HUB_DISABLE_TELEMETRY": "1"}
        words = ["tasks=gsm8k,hellaswag,cvalues_responsibility", "data=here"]
        result = subprocess.run([sys.executable, REPOSITORY / "launch.py", "evaluate", "fetch", *words],
                                env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = result.stdout.splitlines()
    assert result.returncode == 1, result.stderr
    assert lines[0] == f"asking {address} for gsm8k, hellaswag, cvalues_responsibility"
    assert lines[1] == "good openai/gsm8k (main): 6 rows in here/openai/gsm8k/main"
    assert lines[2].startswith("failed Rowan/hellaswag: DatasetNotFoundError: Dataset 'Rowan/hellaswag' doesn't exist")
    assert lines[3] == ("failed X-PLUG/cvalues_responsibility_mc: the hub does not have it; put "
                        "cvalues_responsibility_mc.jsonl (X-PLUG/CValues: dataset/cvalues_responsibility_mc.jsonl) "
                        "into here")
    assert any("openai/gsm8k" in path for path in asked)
    # And then it is here, without the client and its cache.
    assert sorted(path.name for path in (tmp_path / "here" / "openai" / "gsm8k").iterdir()) == ["main"]
    status, lines = evaluate("list", "tasks=gsm8k", "data=here")
    assert status == 0 and lines[0].split() == ["gsm8k", "3", "openai/gsm8k"]


def test_fetch_leaves_what_is_here_and_nothing_half(tmp_path, monkeypatch):
    import datasets

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    files.write_humaneval(tmp_path / "HumanEval.jsonl.gz")

    class Broken(dict):
        def items(self):
            rows = datasets.Dataset.from_list([{"question": "?"}])
            yield "train", rows
            raise OSError("disk full")

    monkeypatch.setattr(datasets, "load_dataset", lambda *words: Broken())
    status, lines = evaluate("fetch", "tasks=humaneval", f"data={tmp_path}")
    assert status == 0 and lines[1] == f"good openai/openai_humaneval: here already: {tmp_path}/HumanEval.jsonl.gz"
    status, lines = evaluate("fetch", "tasks=gsm8k", f"data={tmp_path}")
    assert status and "disk full" in "\n".join(lines)
    assert not list((tmp_path / "openai" / "gsm8k").iterdir())


def test_fetch_without_a_network(monkeypatch):
    import datasets

    status, lines = evaluate("fetch", "tasks=gsm8k")
    assert status == 2 and "HF_HUB_OFFLINE=1 keeps the datasets client offline; fetch needs a network" in lines[-1]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")

    def fail(*words):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    status, lines = evaluate("fetch", "tasks=gsm8k,hellaswag")
    assert status == 2 and "http://mirror.example cannot be reached for openai/gsm8k: Couldn't reach" in lines[-1]
