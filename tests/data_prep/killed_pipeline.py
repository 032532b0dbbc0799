"""The pipeline over FOLDER, for tests that kill it: `python -m tests.data_prep.killed_pipeline FOLDER KEY=VALUE`."""

import sys
from pathlib import Path

from data_prep.pipeline import prepare
from tests.data_prep.corpus import config

if __name__ == "__main__":
    changes = dict(change.split("=") for change in sys.argv[2:])
    prepare(config(Path(sys.argv[1]), **{name: int(value) if value.isdigit() else value
                                         for name, value in changes.items()}))
