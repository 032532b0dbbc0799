"""`kernels`: tables, statuses, and that it needs no data library."""

import importlib
import json
import subprocess
import sys

import pytest

from ctllm_jax.kernels import registry
from ctllm_jax.kernels.dispatch import CannotRun
from tests.cli.conftest import call


def test_check_passes_here_and_says_what_did_not_run(tmp_path):
    printed = call("kernels", "check", "match=packed, GQA", f"output={tmp_path / 'check.json'}")
    assert printed.status == 0, printed.err
    assert "'pallas' cannot run on cpu: its kernels are for TPU" in printed.out.replace("\n", " ")
    rows = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert {(row["implementation"], row["good"]) for row in rows} == {("xla", True)} and len(rows) == 2
    assert set(rows[0]["errors"]) == {"y", "lse", "dq", "dk", "dv"}


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_wrong_number_fails_the_check(monkeypatch, error):
    cases = importlib.import_module("ctllm_jax.kernels.attention.cases")
    wrong = registry.Check("attention", "made wrong", lambda implementation: {"y": (error, 0.1)})
    monkeypatch.setattr(cases, "checks", lambda: [wrong])
    printed = call("kernels", "check", "op=attention")
    assert printed.status == 1 and "WRONG" in printed.out and "3 of 3 are wrong" in printed.out


def test_a_kernel_that_breaks_fails_the_check_and_what_cannot_run_does_not(monkeypatch):
    cases = importlib.import_module("ctllm_jax.kernels.attention.cases")

    def compare(implementation):
        if implementation == "cudnn":
            raise CannotRun("no GPU here; what can: xla")
        if implementation == "pallas":
            raise ValueError("a block shape that the compiler does not take")
        return {"y": (0.0, 0.1)}

    monkeypatch.setattr(cases, "checks", lambda: [registry.Check("attention", "broken", compare)])
    printed = call("kernels", "check", "op=attention")
    assert printed.status == 1 and "1 of 2 are wrong" in printed.out and "no GPU here" in printed.out
    assert "a block shape" in printed.out


@pytest.mark.parametrize(("op", "match"), [("attention", "packed, head dim 64, float32"),
                                           ("swiglu", "one token, float32")])
def test_ops_have_a_check_that_xla_passes(op, match):
    printed = call("kernels", "check", f"op={op}", f"match={match}")
    assert printed.status == 0 and "good" in printed.out and "WRONG" not in printed.out


def test_where_nothing_can_run_nothing_is_called_good():
    printed = call("kernels", "check", "op=ring")
    assert printed.status == 2 and "TPU chips in a torus" in printed.out and "none of these" in printed.err


def test_bench_times_what_runs(tmp_path):
    printed = call("kernels", "bench", "lengths=[128]", "heads=2", "kv_heads=1", "head_dim=64", "hidden=64", "ffn=96",
                   "repeats=1", f"output={tmp_path / 'bench.json'}")
    assert printed.status == 0, printed.err
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) == 7 and all(row["implementation"] == "xla" and row["tflops"] > 0 for row in rows)


def test_a_dry_run_lists_and_a_typo_is_an_error():
    printed = call("kernels", "check", "--dry-run")
    assert printed.status == 0 and "attention: packed, GQA, odd length, bfloat16" in printed.out
    assert call("kernels", "check", "match=nothing").status == 2
    assert "must be one of attention" in call("kernels", "check", "op=atention").err
    assert "chips" in call("kernels", "compile", "chips=[v9]").err


@pytest.mark.aot
def test_compile_gives_a_row_a_kernel(tmp_path):
    program = ("import sys; from ctllm_jax.cli import main; sys.exit(main(['kernels', 'compile', 'chips=[v5e]',"
               f" 'op=attention', 'match=H 64', 'output={tmp_path / 'compile.json'}']))")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "compile.json").read_text())["rows"]
    assert [row["case"].partition(",")[0] for row in rows] == ["forward", "backward"]
    assert all(row["ok"] and row["vmem_bytes"] > 2**20 for row in rows)


def test_no_data_library_is_needed():
    program = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("grain", "tensorflow_datasets", "sentencepiece", "flax", "optax", "orbax"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Blocker())
from ctllm_jax.cli import main
sys.exit(main(["kernels", "check", "match=packed, head dim 64, float32"]) or main(["kernels", "bench", "--dry-run"]))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
