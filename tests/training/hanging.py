"""The debug run whose data stops coming at one data step: `hanging.py DATA_STEP [key=value …]`."""

import sys
import time

from ctllm_jax.data.synthetic import SyntheticData


class Hanging(SyntheticData):
    """Synthetic data, and at one step a disk that does not answer."""

    at = int(sys.argv[1])

    def row(self, step, row):
        """The row, or nothing for ten minutes."""
        if step == self.at:
            wait_for_a_disk()
        return super().row(step, row)


def wait_for_a_disk():
    """Named so that a stack tells it."""
    time.sleep(600)


if __name__ == "__main__":
    from ctllm_jax.cli import main
    from ctllm_jax.data import pretrain as data

    data.SyntheticData = Hanging
    sys.exit(main(["pretrain", "debug/pretrain", *sys.argv[2:]]))
