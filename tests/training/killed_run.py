"""`killed_run.py STEP MOMENT key=value …`: the debug run, killed by SIGKILL at a moment of the checkpoint of STEP.

before: the step is taken, its checkpoint not begun. during: begun a moment ago, whatever is on disk by then. manifest:
all its files are there, but not yet the manifest. written: the manifest, too, but it has not yet its name. displacing:
it is whole, and the oldest is about to go. deleting: in the middle of taking the oldest off the disk. after: all is
done.

`killed_run.py each DIRECTORY key=value …`: one run, killed at each of its steps, at each of the moments in turn; prints
what it left each time, as JSON.

`killed_run.py rounds ROUNDS SEED DIRECTORY key=value …`: the debug run in DIRECTORY/0, begun so many times, and killed
each time at any moment behind its first step; when it came to its end all the same, DIRECTORY/1, and so on. The last
one is brought to its end. Prints how many were killed, and how many runs there are.

In both, a round is a fork of a process that has imported everything and computed nothing: an import takes three times
as long as the run.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from ctllm_jax.training.checkpoints import checkpointer
from ctllm_jax.training.checkpoints import files as checkpoint_files

MOMENTS = ("before", "during", "manifest", "written", "displacing", "deleting", "after")


def die():
    """No handler, no finally, no atexit."""
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(step, moment):
    """Set the trap."""
    save, rename, replace, rmtree = checkpointer.Checkpointer.save, os.rename, os.replace, shutil.rmtree

    def trapped_save(self, state, **options):
        if options["step"] == step and moment == "before":
            die()
        save(self, state, **options)
        if options["step"] == step:
            if moment == "during":
                die()
            self.wait()
            # With less than keep_last steps on disk nothing is displaced: those moments are past then, too.
            die()

    def trapped_rename(source, target, **options):
        if moment == "written" and os.path.basename(target) == str(step) and "checkpoint-tmp" in str(source):
            die()
        if moment == "displacing" and reached(target):
            die()
        rename(source, target, **options)

    def trapped_replace(source, target, **options):
        if moment == "displacing" and reached(target):
            die()
        if moment == "manifest" and str(target).endswith(f"/{step}.orbax-checkpoint-tmp/{checkpoint_files.MANIFEST}"):
            die()
        replace(source, target, **options)

    def reached(target):
        newest = os.path.join(os.path.dirname(target), "..", str(step))
        return checkpoint_files.TRASH in str(target) and os.path.isdir(newest)

    def trapped_rmtree(path, **options):
        if moment == "deleting" and os.path.isdir(path) and os.path.isdir(os.path.join(path, "..", str(step))):
            for folder in os.listdir(path):
                rmtree(os.path.join(path, folder, "params"))
            die()
        rmtree(path, **options)

    checkpointer.Checkpointer.save = trapped_save
    os.rename, os.replace, shutil.rmtree = trapped_rename, trapped_replace, trapped_rmtree


def train(directory, overrides, *, tell=-1, trap=None):
    """The run in a fork of this process, with a trap `(step, moment)`; its first save writes into the pipe `tell`."""
    from ctllm_jax.cli import main

    if pid := os.fork():
        return pid
    if trap:
        arrange(*trap)
    save = checkpointer.Checkpointer.save

    def told(self, state, **options):
        os.write(tell, b".")
        return save(self, state, **options)

    if tell >= 0:
        checkpointer.Checkpointer.save = told
    os._exit(main(["pretrain", "debug/pretrain", f"run.dir={directory}", *overrides]))


def kill_rounds(rounds, seed, directory, overrides):
    """(rounds that were killed, runs that came to their end)"""
    moments, killed, runs = random.Random(seed), 0, 0
    for _ in range(rounds):
        reading, writing = os.pipe()
        pid = train(f"{directory}/{runs}", overrides, tell=writing)
        os.close(writing)
        os.read(reading, 1)
        time.sleep(moments.uniform(0, 0.6))
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(reading)
        assert status in (0, -signal.SIGKILL), status
        killed += status != 0
        runs += status == 0
    assert os.waitpid(train(f"{directory}/{runs}", overrides), 0)[1] == 0
    return killed, runs + 1


def kill_each(directory, overrides, steps=10):
    """What is there when the run was killed at a step: the whole ones, and what is left of those in the trash."""
    for step in range(1, steps):
        moment = MOMENTS[step % len(MOMENTS)]
        status = os.waitstatus_to_exitcode(os.waitpid(train(directory, overrides, trap=(step, moment)), 0)[1])
        assert status == -signal.SIGKILL, status
        kept = Path(directory) / "checkpoints"
        whole = [int(path.name) for path in kept.iterdir() if path.name.isdigit()]
        trash = [sorted(path.name for path in half.iterdir()) for half in kept.glob("trash/*")]
        yield {"step": step, "moment": moment, "whole": whole, "trash": trash}
    assert os.waitpid(train(directory, overrides), 0)[1] == 0


if __name__ == "__main__":
    from ctllm_jax.cli import main

    if sys.argv[1] in ("each", "rounds"):
        import ctllm_jax.cli.pretrain
        import ctllm_jax.trainer.trainer  # noqa: F401

        if sys.argv[1] == "each":
            print(json.dumps(list(kill_each(sys.argv[2], sys.argv[3:]))))
        else:
            print(*kill_rounds(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:]))
        sys.exit()
    arrange(int(sys.argv[1]), sys.argv[2])
    sys.exit(main(["pretrain", "debug/pretrain", *sys.argv[3:]]))
