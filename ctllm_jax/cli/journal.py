"""The records that a training command writes and shows during its run, from any source."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctllm_jax.dataset.damage import DamageLog
    from ctllm_jax.training.console import TrainingConsole
    from ctllm_jax.training.metrics import MetricsWriter
    from ctllm_jax.training.supervision.goodput import Ledger
    from ctllm_jax.training.supervision.recovery import Rollback

_KINDS = {"bad_steps": "not finite", "spikes": "far above the running mean"}


class Journal:
    """Metrics and console of a run, from `open` on; what comes before is not written down."""

    def __init__(self) -> None:
        self.step = 0
        self._writer: MetricsWriter | None = None
        self._counts = dict.fromkeys(_KINDS, 0)

    def open(self, writer: MetricsWriter, shown: TrainingConsole, *, ledger: Ledger,
             make: Callable[..., dict[str, Any]], step: int, skipped: dict[str, int],
             damage: DamageLog | None = None) -> None:
        """Begin, at `step`, before which `skipped` updates were. `make` is from `make_record`, `damage` of the data."""
        self._writer, self._shown, self._ledger, self._make, self.step = writer, shown, ledger, make, step
        self._counts |= skipped
        self._damage = damage
        known = damage.read() if damage else []
        self._told = {(entry["shard"], entry["record"]) for entry in known}
        self._damaged = len(known)
        if self._damaged:
            shown.message(f"{self._damaged:,} damaged records are replaced since an earlier start: {damage.folder}")
        self.goodput()

    def train(self, step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        """The metrics of a step; with a word where updates were skipped since the last ones."""
        self.step = step
        values = self._make(step, metrics, timing)
        self._writer.event("train", **values)
        self._shown.train(values)
        for kind, why in _KINDS.items():
            count = values.get(kind, 0)
            if new := count - self._counts[kind]:
                some = "an update was" if new == 1 else f"{new:,} updates were"
                self._shown.message(f"step {step:,}: {some} skipped, {why} ({count:,} in all)")
            self._counts[kind] = count
        self.damage()
        if self._ledger.due():
            self.goodput()

    def request(self, step: int, what: str) -> None:
        """Something that was asked of the run, and is obeyed."""
        self._writer.event("request", step=step, what=what)
        self._shown.message(what)

    def rolled_back(self, rollback: Rollback) -> None:
        """A return to a checkpoint, which has just happened."""
        self.step = rollback.step
        self.goodput()
        self._writer.event("rollback", **rollback._asdict())
        self._shown.message(f"step {rollback.step:,}: updates stay bad; back to the checkpoint of step {rollback.to:,},"
                            f" and on at data step {rollback.data_step:,} (rollback {rollback.rollbacks})")
        self.step = rollback.to

    def damage(self) -> None:
        """Unreadable data records of any process that were not reported yet."""
        if self._damage is None:
            return
        found = self._damage.poll()
        if len(found) == self._damaged:
            return
        for entry in found:
            key = entry["shard"], entry["record"]
            if key in self._told:
                continue
            self._told.add(key)
            self._writer.event("damaged", step=self.step, **entry)
            self._shown.message(f"step {self.step:,}: record {entry['record']:,} of {entry['shard']} cannot be read"
                                f" ({entry['why']}); record {entry['replaced_by']:,} stands in for it"
                                f" ({len(found)} of at most {self._damage.budget})")
        self._damaged = len(found)

    def goodput(self) -> None:
        """The time of this attempt so far, by phase."""
        self._writer.event("goodput", step=self.step, skipped=sum(self._counts.values()), seconds=self._ledger.told())

    def end(self, reason: str, message: str = "", *, step: int | None = None) -> None:
        """The end of this attempt, and why; from any thread."""
        if self._writer is None:
            return
        self.step = self.step if step is None else step
        self.damage()
        self.goodput()
        self._writer.event("end", step=self.step, reason=reason, **({"message": message} if message else {}))
        if message:
            self._shown.message(message)
