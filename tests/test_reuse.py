"""The examples for other projects, each in a process of its own that can import nothing but what they need."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ctllm_jax.report.run import read_run
from tests.runs import environment

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reuse.md"
EXAMPLES = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?<!-- run -->\n```python\n(.*?)^```$",
                      PAGE.read_text(encoding="utf-8"), re.M | re.S)
# What a project that takes single functions need not have.
ABSENT = ("grain", "tensorflow_datasets", "sentencepiece", "orbax", "pydantic", "omegaconf", "rich", "optax")


def test_there_are_six():
    assert [name for name, _ in EXAMPLES] == ["A plain pytree", "Flax Linen", "Flax NNX", "shard_map", "Packed DPO",
                                              "Losses of single examples"]


@pytest.mark.parametrize(("name", "source"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_an_example_runs_as_it_stands(name, source, tmp_path):
    absent = ABSENT if "flax" not in source else tuple(set(ABSENT) - {"orbax", "optax", "rich"})  # flax imports these
    script = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n{source}"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True, capture_output=True, timeout=300,
                          env=environment(devices=8 if name == "shard_map" else 1))
    assert done.returncode == 0, done.stderr
    assert not done.stdout, "an import or a function prints"


def test_a_whole_run_from_python(tmp_path):
    """The example of `train` continues its own run, whose steps are those of the command."""
    source, = re.findall(r"<!-- train -->\n```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, text=True, capture_output=True, timeout=300,
                          env=environment())
    assert done.returncode == 0, done.stderr
    assert "resuming at step 4" in done.stdout
    assert [step["step"] for step in read_run(tmp_path / "runs/from-python").train] == [1, 2, 3, 4, 5, 6]
