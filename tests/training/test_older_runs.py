"""A run directory and a dataset that version 0.1.0 wrote are still read and resumed.

`older/0.1.0.tar.gz` holds a dataset of 60 made-up documents and a run of four steps on it, with a checkpoint of step 2
and one of step 4. That version wrote both, with this command (shortened):

    pretrain debug/pretrain steps=4 checkpoint.every=2 data=dataset model.vocab_size=360 bad_steps.spikes.deviations=6 …
"""

import shutil
import tarfile

import numpy as np
import pytest

from ctllm_jax.cli import main
from ctllm_jax.training.checkpoints.checkpoint import list_checkpoints
from tests.runs import read_arrays

CONFIG = """
extends: {debug}
steps: 4
model: {{vocab_size: 360, hidden_size: 16, num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 8, ffn_size: 32}}
batch: {{tokens: 256, sequence_length: 32}}
optimizer: {{warmup_steps: 1}}
checkpoint: {{every: 2}}
bad_steps: {{spikes: {{deviations: 6}}}}
data: {data}
"""


@pytest.fixture
def older(tmp_path, repository):
    """(run directory, config that resumes it), unpacked."""
    with tarfile.open(repository / "tests" / "training" / "older" / "0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    config = tmp_path / "older.yaml"
    config.write_text(CONFIG.format(debug=repository / "configs" / "debug" / "pretrain.yaml",
                                    data=tmp_path / "dataset"), encoding="utf-8")
    return tmp_path / "run", config


def test_a_run_of_version_0_1_0_resumes_with_its_data_and_reaches_the_same_weights(older, capsys):
    run, config = older
    expected = read_arrays(run, 4)
    shutil.rmtree(run / "checkpoints" / "4")
    assert main(["pretrain", str(config), f"run.dir={run}"]) == 0
    assert f"resuming {run} at step 2" in capsys.readouterr().out
    resumed = read_arrays(run, 4)
    assert resumed.keys() == expected.keys()
    for name, array in expected.items():  # the CPU that wrote them may round in another order
        np.testing.assert_allclose(resumed[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_files_without_a_format_are_of_format_1_and_a_newer_one_is_refused(older, capsys):
    run, config = older
    assert "format" not in list_checkpoints(run)[-1].meta and "config_format" not in (run / "config.yaml").read_text()
    described = run / "config.yaml"
    described.write_text("config_format: 2\n" + described.read_text())
    assert main(["doctor", str(run)]) == 2 and main(["generate", str(run), "prompt=a"]) == 2
    said = f"{described}: config_format=2, this version reads format 1"
    assert said in capsys.readouterr().err


def test_every_checkpoint_of_version_0_1_0_is_whole(older, capsys):
    run, _ = older
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "DAMAGED" not in capsys.readouterr().out
