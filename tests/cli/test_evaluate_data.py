"""`evaluate list` and `evaluate fetch` as a user sees them; the hub is one on the loopback, or a client that fails."""

import io
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")

from rich.console import Console  # noqa: E402

from ctllm_jax.cli import Context, evaluate_data  # noqa: E402
from ctllm_jax.config.errors import UserError  # noqa: E402
from ctllm_jax.config.load import load  # noqa: E402
from tests.evaluation import official_files as files  # noqa: E402
from tests.hub_server import serve_hub  # noqa: E402
from tests.runs import REPOSITORY  # noqa: E402

RUN = """
import sys
from rich.console import Console
from ctllm_jax.cli import Context, evaluate_data
from ctllm_jax.config.load import load
config = load(evaluate_data.FetchConfig, overrides=sys.argv[1:])
sys.exit(evaluate_data.run_fetch(Context("evaluate", Console(soft_wrap=True), action="fetch", config=config)))
"""


def call(action, *overrides, targets=()):
    """Status, and the lines that were printed."""
    out = io.StringIO()
    context = Context("evaluate", Console(file=out, soft_wrap=True, highlight=False), action=action,
                      targets=list(targets), config=load(evaluate_data.ACTIONS[action], overrides=list(overrides)))
    status = getattr(evaluate_data, f"run_{action}")(context)
    return status, out.getvalue().splitlines()


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
    status, lines = call("list", f"suite={suite}", f"data={tmp_path}")
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
    status, lines = call("list", "tasks=cmmlu,cmmlu_china_specific,cmmlu_arts", f"data={tmp_path}")
    assert status == 0 and [line.split() for line in lines[:3]] == [
        ["cmmlu", "201", "cmmlu.zip"], ["cmmlu_china_specific", "45", "cmmlu.zip"], ["cmmlu_arts", "3", "cmmlu.zip"]]


def test_list_of_all_and_of_the_paper():
    status, lines = call("list")
    assert status == 1 and "0 of 52 have their questions in data/evaluation" in lines
    status, lines = call("list", "suite=configs/eval/paper.yaml")
    assert "0 of 39 have their questions in data/evaluation" in lines
    assert "TheoremQA: lm-eval 0.4.13 has no task of it" in lines


def test_wrong_input_is_told():
    with pytest.raises(UserError, match="no task gsm9k; did you mean gsm8k"):
        call("list", "tasks=gsm9k")
    with pytest.raises(UserError, match="give one of them"):
        call("list", "tasks=gsm8k", "suite=eval/quick")
    with pytest.raises(UserError, match="takes only keys; gsm8k is left over"):
        call("list", targets=["gsm8k"])
    with pytest.raises(UserError, match="needs tasks=NAME,… or suite=FILE"):
        call("fetch")
    with pytest.raises(UserError, match="no config eval/quik.*did you mean eval/quick"):
        call("list", "suite=eval/quik")


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
        result = subprocess.run([sys.executable, "-c", RUN, *words], env=environment, cwd=tmp_path,
                                capture_output=True, text=True, timeout=120)
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
    status, lines = call("list", "tasks=gsm8k", "data=here")
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
    status, lines = call("fetch", "tasks=humaneval", f"data={tmp_path}")
    assert status == 0 and lines[1] == f"good openai/openai_humaneval: here already: {tmp_path}/HumanEval.jsonl.gz"
    with pytest.raises(OSError, match="disk full"):
        call("fetch", "tasks=gsm8k", f"data={tmp_path}")
    assert not list((tmp_path / "openai" / "gsm8k").iterdir())


def test_fetch_without_a_network(tmp_path, monkeypatch):
    import datasets

    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 keeps the datasets client offline; fetch needs a network"):
        call("fetch", "tasks=gsm8k")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")

    def fail(*words):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="http://mirror.example cannot be reached for openai/gsm8k: Couldn't reach"):
        call("fetch", "tasks=gsm8k,hellaswag")
