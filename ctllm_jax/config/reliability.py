"""Handling of bad steps, hangs and lost processes."""

from __future__ import annotations

from pydantic import model_validator

from ctllm_jax.config.base import Section, key, section


class SpikesConfig(Section):
    """Steps that are finite, and yet far above what the run is used to. A bare value is `deviations`."""

    shorthand = "deviations"

    deviations: float | None = key(None, "skip the update of a step whose loss or gradient norm is more than this many standard deviations above its running mean; null: never", gt=0, changeable=True)
    window: int = key(100, "steps that the running mean and deviation remember, weighted exponentially", ge=2, changeable=True)
    warmup: int = key(100, "steps that they learn from before any is skipped", ge=2, changeable=True)


class BadStepsConfig(Section):
    """Steps whose update is skipped: those that are not finite, and with `spikes` those that are far off."""

    spikes: SpikesConfig = section(SpikesConfig, "finite steps that are far off", changeable=True)
    rollback_after: int | None = key(None, "consecutive skipped steps after which the run returns to the checkpoint before them and skips their data; null: never", ge=1, changeable=True)
    max_rollbacks: int = key(3, "rollbacks of a run before it stops as diverged", ge=0, changeable=True)


class WatchdogConfig(Section):
    """Ends a run that hangs, with every thread's stack, so that it can be started again. A bare value is `seconds`."""

    shorthand = "seconds"

    seconds: float | None = key(None, "longest time without a finished step; null: ten times the median step, and at least 300 s; 0: no watchdog", ge=0, changeable=True)
    slow_seconds: float = key(3600.0, "the same while no steps are made: start, compilation, the first step, saving, evaluation, samples; each evaluation batch counts as a sign of life", gt=0, changeable=True)

    @model_validator(mode="after")
    def _check(self):
        if self.seconds and self.slow_seconds < self.seconds:
            raise ValueError(f"slow_seconds={self.slow_seconds:g} is below seconds={self.seconds:g}: compiling and saving take longer than a step")
        return self


class DistributedConfig(Section):
    """Several processes as one program."""

    heartbeat_seconds: int = key(100, "seconds without a heartbeat after which a process counts as dead; the others name it, and end", ge=5, changeable=True)
