"""A run that goes on with another number of devices or processes: the same batches, losses to 1e-5."""

from __future__ import annotations

from pathlib import Path

from ctllm_jax.report.run import read_run
from fault_matrix.bench import Bench, Lost, Outcome, fault
from tests.runs import DEBUG

OVERRIDES = ("optimizer.schedule=constant", "checkpoint.every=3")
STEPS = 9
TOLERANCE = 1e-5


def _compare(outcome: Outcome, run: Path, reference: Path) -> None:
    """Two changes were made: the steps behind each have the losses of the run without."""
    ours, other = read_run(run).train, read_run(reference).train
    if [record["step"] for record in ours] != list(range(1, STEPS + 1)):
        raise Lost(f"steps {[record['step'] for record in ours]}")
    apart = [abs(mine["loss"] / theirs["loss"] - 1) + (mine["tokens"] != theirs["tokens"])
             for mine, theirs in zip(ours, other, strict=True)]
    for part in (apart[3:6], apart[6:]):
        outcome.add("" if max(part) <= TOLERANCE else f"losses {max(part):.1e} apart")
    outcome.lost = f"none (losses at most {max(apart):.0e} apart)"


@fault("devices", "8 devices, then 4 x 2, then 1")
def devices(bench: Bench, outcome: Outcome) -> None:
    """A mesh of data, one of data and parameters, one device."""
    reference = bench.undisturbed(*OVERRIDES, f"steps={STEPS}", "mesh.data=8", devices=8)
    run = bench.directory()
    for steps, count, mesh in ((3, 8, ("mesh.data=8",)), (6, 8, ("mesh.data=4", "mesh.fsdp=2")),
                               (9, 1, ("mesh.data=1",))):
        done = bench.pretrain(run, *OVERRIDES, *mesh, f"steps={steps}", devices=count).expect(0)
    outcome.message = bench.line(done.text, "resuming at step")
    _compare(outcome, run, reference)


@fault("processes", "2 processes, then 1, then 4")
def processes(bench: Bench, outcome: Outcome) -> None:
    """Of one device each."""
    reference = bench.undisturbed(*OVERRIDES, f"steps={STEPS}", "mesh.data=8", devices=8)
    run = bench.directory()
    for steps, count, mesh in ((3, 2, ("mesh.data=1", "mesh.fsdp=2")), (6, 1, ("mesh.data=1",)),
                               (9, 4, ("mesh.data=2", "mesh.fsdp=2"))):
        words = "pretrain", DEBUG, f"run.dir={run}", *OVERRIDES, *mesh, f"steps={steps}"
        texts = [child.wait().expect(0).text for child in bench.start_processes(count, *words)]
    outcome.message = bench.line("\n".join(texts), "resuming at step")
    _compare(outcome, run, reference)
