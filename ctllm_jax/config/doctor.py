"""`launch.py doctor [CONFIG]`: check for problems that would stop a run on this machine."""

from __future__ import annotations

from ctllm_jax.config.base import Section, key
from ctllm_jax.config.stages import StageName


class DoctorConfig(Section):
    """Keys of the doctor itself; all others are those of the run."""

    stage: StageName = key("pretrain", "the command that CONFIG is for")
    timeout: float = key(60, "seconds that a check may take", gt=0)
    output: str | None = key(None, "JSON file to write the findings into", output="file")
