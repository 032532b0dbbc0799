"""Types of the functions that other projects take."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
USER = Path(__file__).resolve().parent / "reuse_types.py"


def check(path, folder):
    return subprocess.run([sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder), str(path)],
                          cwd=USER.parent.parent, text=True, capture_output=True, timeout=500)


def test_a_small_user_file_passes_the_strict_check_and_mistakes_in_it_do_not(tmp_path):
    done = check(USER, tmp_path / "cache")
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.py"
    text = USER.read_text(encoding="utf-8")
    for right, mistake in (("causal=False", "casual=False"), ("return_lse=True", "return_lse=False"),
                           ('implementation="xla"', 'implementation="fast"'), ('kind="sigmoid"', 'kind="dpo"'),
                           ("num_segments=4, chunk_size=8", "num_segments=4, chunk=8"), ('rings="off"', 'rings="on"')):
        assert text.count(right) == 1, right
        wrong.write_text(text.replace(right, mistake), encoding="utf-8")
        done = check(wrong, tmp_path / "cache")
        assert done.returncode == 1 and "wrong.py" in done.stdout, f"{mistake}: {done.stdout}"
