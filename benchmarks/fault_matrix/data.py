"""Damaged, missing and changed shards; batches that are not numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ctllm_jax.dataset.reader import Dataset
from fault_matrix.bench import Bench, Done, Lost, Outcome, events, fault, work_again
from tests.runs import REPOSITORY, assert_same_bits, read_arrays
from tests.small_text import VOCABULARY, make_corpus

PLANTED = REPOSITORY / "tests/training/planted.py"
STEPS = 10
FLIPS = 8


def _corpus(bench: Bench) -> Path:
    """A dataset directory of one shard; made once."""
    folder = bench.scratch / "corpus"
    if not folder.exists():
        folder.mkdir()
        bench.call(lambda: str(make_corpus(folder).folder))
    return folder / "zh"


def _shard(directory: Path):
    return Dataset(directory).split("train").shards[0]


class _Trained:
    """Runs over one dataset directory, in which every record is seen."""

    def __init__(self, bench: Bench, dataset: Path, *, steps: int):
        self._bench, self._steps = bench, steps
        self._words = (f"steps={steps}", f"model.vocab_size={VOCABULARY}", f"data={dataset}", "checkpoint.every=2",
                       "sample.every=0", "optimizer.schedule=constant")

    def run(self, directory: Path) -> Done:
        """To its end."""
        return self._bench.pretrain(directory, *self._words)

    def same(self, directory: Path, reference: Path) -> str:
        """What differs at the end."""
        return self._bench.differing([directory], reference, step=self._steps).get(str(directory), "")


def _steps(dataset: Path) -> int:
    """A row is a record, eight rows are a step: all are seen."""
    return -(-_shard(dataset).shard.records // 8)


@fault("records", f"{FLIPS} bits changed anywhere in an ArrayRecord shard, the run started twice")
def records(bench: Bench, outcome: Outcome) -> None:
    """Of no matter, or replaced and told, the same at both starts; or refused, with the shard named."""
    corpus = _corpus(bench)
    steps, reference = _steps(corpus), bench.directory()
    _Trained(bench, corpus, steps=steps).run(reference).expect(0)
    replaced = refused = 0
    for _ in range(min(bench.rounds, 10)):
        dataset, run = bench.directory("data"), bench.directory()
        shutil.copytree(corpus, dataset)
        path = _shard(dataset).path
        content = bytearray(path.read_bytes())
        for _ in range(FLIPS):
            content[bench.random.randrange(len(content))] ^= 1 << bench.random.randrange(8)
        path.write_bytes(content)
        trained = _Trained(bench, dataset, steps=steps)
        done = trained.run(run)
        told = [record for record in events(run) if record["event"] == "damaged"]
        replaced += len(told)
        problem = ""
        if done.status == 2 and str(path) in done.text:
            refused += 1
        elif done.status:
            problem = f"status {done.status}"
        elif not told:
            problem = trained.same(run, reference)
        else:
            outcome.message = bench.line(done.text, "stands in for it")
            whole = bench.directory()
            shutil.copytree(run, whole)
            shutil.rmtree(run / "checkpoints" / str(steps))
            problem = f"status {again.status}" if (again := trained.run(run)).status else trained.same(run, whole)
        # Rerun on purpose, from the step before: no work that the fault cost.
        outcome.add(problem)
    outcome.lost = (f"{replaced} records in all (a run has {_shard(corpus).shard.records}), each named and replaced by"
                    f" the next; {refused} runs refused, with the shard named")


@fault("missing-shard", "a shard that is not there")
def missing_shard(bench: Bench, outcome: Outcome) -> None:
    """Refused before anything is compiled; put back, the same command runs."""
    _refused(bench, outcome, lambda path: path.unlink(), "is missing")


@fault("changed-shard", "a shard that is a byte shorter; one with 512 other bytes, under `data verify`")
def changed_shard(bench: Bench, outcome: Outcome) -> None:
    """Another length is seen at the start; other bytes of the same length by who reads them all."""
    _refused(bench, outcome, lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated")
    dataset = bench.directory("data")
    shutil.copytree(_corpus(bench), dataset)
    path = _shard(dataset).path
    content = path.read_bytes()
    path.write_bytes(content[:1024] + bytes(512) + content[1536:])
    done = bench.launch("data", "verify", dataset)
    outcome.add("" if done.status == 1 and path.name in done.text else f"data verify: status {done.status}")


def _refused(bench: Bench, outcome: Outcome, damage, said: str) -> None:
    dataset, run, reference = bench.directory("data"), bench.directory(), bench.directory()
    shutil.copytree(_corpus(bench), dataset)
    path = _shard(dataset).path
    whole = path.read_bytes()
    trained = _Trained(bench, dataset, steps=_steps(dataset))
    trained.run(reference).expect(0)
    damage(path)
    refused = trained.run(run).expect(2, said)
    outcome.message = bench.line(refused.text, said)
    if events(run):
        raise Lost("it had begun")
    path.write_bytes(whole)
    trained.run(run).expect(0)
    outcome.add(trained.same(run, reference))


def _planted(bench: Bench, run: Path, planted: dict, *more: str, processes: int = 1) -> str:
    """All that is printed by the debug run over batches with a NaN in these rows."""
    command = (json.dumps(planted), f"run.dir={run}", "checkpoint.every=2", "checkpoint.keep_last=3", "mesh.data=2",
               *more)
    if processes == 1:
        return bench.launch(*command, script=PLANTED, devices=2).expect(0).text
    children = bench.start_processes(processes, *command, script=PLANTED)
    return "\n".join(child.wait().expect(0).text for child in children)


@fault("nan", "a NaN in a row that only one of two processes reads")
def nan(bench: Bench, outcome: Outcome) -> None:
    """Skipped by both; the bits of one process with two devices, which held no NaN longer than the step."""
    together, alone = bench.directory(), bench.directory()
    text = _planted(bench, together, {"4": 7}, processes=2)
    _planted(bench, alone, {"4": 7})
    outcome.message = bench.line(text, "skipped, not finite")
    held = [(together / f"weights-{index}").read_text() for index in range(2)]
    problem = "" if held[0] == held[1] else "the processes hold other weights"
    outcome.add(problem or bench.differing([together], alone, step=STEPS).get(str(together), ""))
    outcome.lost = "none but the batch with the NaN"


@fault("rollback", "three batches in a row with a NaN, bad_steps.rollback_after=3")
def rollback(bench: Bench, outcome: Outcome) -> None:
    """Ends with the bits of a run in whose data those batches, and the one before, did not exist."""
    run, without = bench.directory(), bench.directory()
    text = _planted(bench, run, {"5": 0, "6": 7, "7": 3}, "bad_steps.rollback_after=3")
    _planted(bench, without, {"leave out": [4, 4]}, "bad_steps.rollback_after=3")
    outcome.message = bench.line(text, "updates stay bad")
    problem = bench.call(_weights_differ, str(run), str(without))
    outcome.add(problem, again=work_again(run))
    outcome.lost = "none but the three batches, and the good one behind the checkpoint"


def _weights_differ(run: str, without: str) -> str:
    """Of the counters, `data_step` and `bad_steps` tell what happened, and must differ."""
    both = [{name: array for name, array in read_arrays(directory, STEPS).items()
             if not name.endswith(("['data_step']", "['bad_steps']"))} for directory in (run, without)]
    try:
        assert_same_bits(*both)
    except AssertionError as error:
        return f"other bits: {error}"
    return ""
