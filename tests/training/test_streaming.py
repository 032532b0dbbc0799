"""Conversions hold a parameter at a time, and what is streamed is what is saved at once."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from ctllm_jax.training.checkpoints.checkpoint import Kept
from ctllm_jax.training.checkpoints.checkpointer import write_weights
from ctllm_jax.training.checkpoints.streaming import Lazy, parameter_dtypes, stream_parameters, write_streamed
from tests.runs import REPOSITORY, assert_same_bits, environment, read_arrays


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_conversions_hold_a_parameter_and_not_the_model(tmp_path, tokenizer_file):
    """With the C library told to give back at once what is freed: else the peak is that of its pools."""
    script, variables = REPOSITORY / "tests/training/streamed_memory.py", {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run([sys.executable, str(script), str(tmp_path), str(tokenizer_file)], capture_output=True,
                          env=environment(**variables), text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model"] > 6.9 * found["largest"]
    for direction in ("import", "export"):
        assert 0.5 * found["largest"] < found[direction] < 3.5 * found["largest"], found


@pytest.fixture
def tokenizer_file(tmp_path):
    from data_prep.train_tokenizer import fit

    path = tmp_path / "any.model"
    path.write_bytes(fit([f"{index} the model reads 今天天气不错" for index in range(200)], vocab_size=300,
                         character_coverage=1.0))
    return path


def test_streamed_is_what_is_saved_at_once(tmp_path):
    """Arrays of several chunks, in two dtypes; and read back a parameter at a time."""
    draw = np.random.default_rng(0)
    params = {"embedding": draw.standard_normal((700, 64)).astype(np.float32),
              "blocks": {"query": draw.standard_normal((3, 64, 4, 16)).astype("bfloat16"),
                         "norm": np.ones((3, 64), np.float32)}}
    write_weights(tmp_path / "whole", params, meta={"step": 7, "a": [1]})
    write_streamed(tmp_path / "streamed", jax.tree.map(lambda x: Lazy(x.shape, x.dtype, lambda: x), params),
                   meta={"step": 7, "a": [1]})
    whole, streamed = (read_arrays(tmp_path / name, 7, "milestones") for name in ("whole", "streamed"))
    assert_same_bits(whole, streamed)
    metas = [(tmp_path / name / "milestones/7/meta/metadata").read_text() for name in ("whole", "streamed")]
    assert json.loads(metas[0]) == json.loads(metas[1])
    for name in ("whole", "streamed"):
        kept = Kept(7, "milestone", tmp_path / name / "milestones" / "7", {})
        found = dict(stream_parameters(kept))
        assert parameter_dtypes(kept) == {path: array.dtype for path, array in found.items()}
        assert sorted(found) == ["blocks/norm", "blocks/query", "embedding"]
        assert all(np.array_equal(found[f"blocks/{name}"], params["blocks"][name]) for name in params["blocks"])
        assert np.array_equal(found["embedding"], params["embedding"])
