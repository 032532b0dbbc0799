"""Batches that hurt: a source whose loss weights are not a number at some data steps. No option of a run does this.

As a script: the debug run with such a source, `planted.py '{"DATA STEP": ROW, …}' [key=value …]`; each process leaves a
hash of the weights that it holds in RUN/weights-PROCESS. With "leave out": [FROM, COUNT] so many batches do not exist.
"""

import hashlib
import json
import sys

import numpy as np

from ctllm_jax.data.synthetic import SyntheticData


class Planted(SyntheticData):
    """Synthetic data with a NaN in one row of some steps. `skip` maps a data step to the one that is read."""

    planted: dict[int, int] = {}
    skip = staticmethod(lambda step: step)

    def row(self, step, row):
        """The row, spoiled where it is to be."""
        step = self.skip(step)
        batch = super().row(step, row)
        if self.planted.get(step) == row:
            weights = np.array(batch.loss_weights)
            weights[3] = np.nan
            batch = batch._replace(loss_weights=weights)
        return batch


if __name__ == "__main__":
    import jax

    from ctllm_jax.cli import main
    from ctllm_jax.data import pretrain as data
    from ctllm_jax.training import run

    planted = json.loads(sys.argv[1])
    first, count = planted.pop("leave out", (0, 0))
    Planted.skip = staticmethod(lambda step: step + count * (step >= first))
    Planted.planted = {int(step): row for step, row in planted.items()}
    data.SyntheticData = Planted
    train = run.Run.train

    def train_and_tell(self, **options):
        """Behind the last step, the weights of this process."""
        step = train(self, **options)
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves((self.state.params, self.state.opt_state)):
            for shard in leaf.addressable_shards[:1]:
                digest.update(np.asarray(shard.data).tobytes())
        (self.directory / f"weights-{jax.process_index()}").write_text(digest.hexdigest())
        return step

    run.Run.train = train_and_tell
    sys.exit(main(["pretrain", "debug/pretrain", *sys.argv[2:]]))
