"""`killed_run.py STEP MOMENT key=value …`: the debug run, killed by SIGKILL at a moment of the checkpoint of STEP.

before: the step is taken, its checkpoint not begun. during: begun a moment ago, whatever is on disk by then. written:
all its files are there, but not yet under its name. displacing: it is whole, and the oldest is about to go.
deleting: in the middle of taking the oldest off the disk. after: all is done.
"""

import os
import shutil
import signal
import sys

from ctllm_jax.training import checkpoint_files, checkpointer

MOMENTS = ("before", "during", "written", "displacing", "deleting", "after")


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


if __name__ == "__main__":
    from ctllm_jax.cli import main

    arrange(int(sys.argv[1]), sys.argv[2])
    sys.exit(main(["pretrain", "debug/pretrain", *sys.argv[3:]]))
