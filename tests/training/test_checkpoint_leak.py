"""A process that saves on and on keeps nothing of what it has saved."""

import gc
import sys

import jax.numpy as jnp
import optax
import tensorstore as ts

from ctllm_jax.config.pretrain import CheckpointConfig
from ctllm_jax.training.checkpoints.checkpointer import Checkpointer
from ctllm_jax.training.checkpoints.tensorstore_leak import _spec
from ctllm_jax.training.state import init_state

SAVES = 15


def test_saves_leave_no_objects_behind(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(every=1, keep_last=1), tokens_per_step=1, meta={})
    state = init_state({f"w{number}": jnp.ones(2) for number in range(20)}, optax.adam(1e-3))

    def objects_after(steps):
        for step in steps:
            checkpointer.save(state, step=step)
        checkpointer.wait()
        gc.collect()
        return sys.getallocatedblocks()

    counts = [objects_after(range(1 + SAVES * part, 1 + SAVES * (part + 1))) for part in range(4)]
    checkpointer.close()
    # Some 15 a save are mostly Python's own caches (of patterns), which have an end. TensorStore's counters would be
    # some 510 more, and the specs of 60 arrays and more 270.
    assert min(after - before for before, after in zip(counts, counts[1:], strict=False)) < 100 * SAVES, counts


def test_the_spec_of_a_folder_is_what_tensorstore_makes_of_it(tmp_path):
    for path in (tmp_path / "7.orbax-checkpoint-tmp", tmp_path / "a folder", tmp_path / "ä%20&?#"):
        given = {"driver": "file", "path": f"{path}/"}
        assert _spec(given).to_json() == ts.KvStore.Spec(given).to_json()
    assert isinstance(_spec({"driver": "memory"}), ts.KvStore.Spec)
