"""Whole runs, as a user starts them: in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
DEBUG = "debug/pretrain"
# The tests compile thousands of small programs and run each a few times: compiling fast matters more than running fast.
FAST_COMPILATION = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
                    "--xla_cpu_use_fusion_emitters=false")


def environment(*, devices=1, **more):
    """The environment of a process with so many CPU devices."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    flags = " ".join([f"--xla_force_host_platform_device_count={devices}", *FAST_COMPILATION])
    return {**kept, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
            "PYTHONPATH": str(REPOSITORY), **more}


def cached(directory):
    """The variables under which processes share what they compile."""
    return {"JAX_COMPILATION_CACHE_DIR": str(directory), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def launch(*words, devices=1, **variables):
    """`launch.py` to its end; the finished process, with what it printed as one text in `stdout`."""
    return start(*words, devices=devices, **variables).wait_for_text()


def start(*words, devices=1, script=REPOSITORY / "launch.py", **variables):
    """`launch.py`, or another script, begun."""
    return Started([sys.executable, str(script), *map(str, words)], cwd=REPOSITORY, stdout=subprocess.PIPE,
                   stderr=subprocess.STDOUT, text=True, env=environment(devices=devices, **variables))


class Started(subprocess.Popen):
    """A process that is waited for, and killed if it does not end."""

    def wait_for_text(self, timeout=240):
        """(exit status, all that it printed)."""
        try:
            text, _ = self.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            text, _ = self.communicate()
            raise AssertionError(f"{self.args} did not end in {timeout} s:\n{text}") from None
        return subprocess.CompletedProcess(self.args, self.returncode, text)


def read_arrays(run_dir, step, folder="checkpoints"):
    """{path: numpy array} of all that a checkpoint holds, read without our code."""
    import jax
    import orbax.checkpoint as ocp

    arrays = {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for item in ("params", "trainer"):
            path = Path(run_dir).absolute() / folder / str(step) / item
            if path.exists():
                tree = checkpointer.metadata(path).item_metadata.tree
                whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                for key, leaf in jax.tree_util.tree_leaves_with_path(checkpointer.restore(path, restore_args=whole)):
                    arrays[item + jax.tree_util.keystr(key)] = leaf
    return arrays


def assert_same_bits(ours, other):
    """Two results of `read_arrays`, equal in every bit; and not empty."""
    assert ours and ours.keys() == other.keys()
    differing = [key for key, array in ours.items()
                 if (array.dtype, array.tobytes()) != (other[key].dtype, other[key].tobytes())]
    assert not differing, differing
