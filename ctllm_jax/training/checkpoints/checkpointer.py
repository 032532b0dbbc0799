"""Save and restore the state of a run, with Orbax.

A step is written in the background into a temporary folder, gets its manifest there, and is renamed into place. So a
numbered step is complete and can be verified. `files` handles the files of a step.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ctllm_jax import storage
from ctllm_jax.cluster.distributed import tell_all, tell_all_of
from ctllm_jax.config.errors import UserError, check_format
from ctllm_jax.config.pretrain import CheckpointConfig
from ctllm_jax.config.statuses import REQUEUE
from ctllm_jax.training.checkpoints import files, objects
from ctllm_jax.training.checkpoints.arrays import find_structural_damage, refuse_other_arrays
from ctllm_jax.training.checkpoints.files import CHECKPOINTS, FORMAT, MILESTONES
from ctllm_jax.training.checkpoints.manager import Manager
from ctllm_jax.training.state import State

log = logging.getLogger(__name__)
_NONE, _FAILED = -1, -2


class NotWritten(UserError):
    """A checkpoint was not written; earlier ones are intact. `agreed`: every process knows this."""

    def __init__(self, message: str, *, agreed: bool):
        super().__init__(message)
        self.agreed = agreed


class Checkpointer:
    """Saves and restores the states of one run, asynchronously.

    Args:
      run_dir: the run directory.
      config: which steps are kept.
      tokens_per_step: used to find the steps of the milestones.
      tokens_at: steps -> tokens trained, if steps have different numbers; None: `tokens_per_step` each.
      meta: the JSON of a checkpoint: the fingerprint, and everything that loading it as a MODEL needs.

    Raises:
      UserError: the run directory cannot be written.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, *, tokens_per_step: int, meta: dict[str, Any],
                 tokens_at: Callable[[int], int] | None = None):
        self.run_dir, self.config, self.meta, self.tokens_per_step = run_dir, config, meta, tokens_per_step
        self.tokens_at = tokens_at or (lambda step: step * self.tokens_per_step)
        self._remote = storage.is_remote(run_dir)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="retention") if self._remote else None
        keep = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        if jax.process_index() == 0 and self._remote:
            for directory in (CHECKPOINTS, MILESTONES):
                objects.sweep(run_dir / directory)
        elif jax.process_index() == 0:
            # Remove what a killed process left; this process owns the directory. Orbax removes only some of it.
            for path in run_dir.glob("*/*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            files.empty_trash(run_dir / CHECKPOINTS)
        with self._disk_errors_told():
            self._steps = Manager(run_dir / CHECKPOINTS, policies.AnyPreservationPolicy(keep),
                                  steps=self._look(CHECKPOINTS))
            self._milestones = (Manager(run_dir / MILESTONES, None, steps=self._look(MILESTONES))
                                if config.milestones else None)
        self._managers = [manager for manager in (self._steps, self._milestones) if manager is not None]
        self._kept = set(self._steps.all_steps())
        self._begun = self._closed = False
        self._failures = 0
        self._error: NotWritten | None = None
        self._warnings: list[str] = []
        self._tell: Callable[[str], None] = self.warn

    def listen(self, tell: Callable[[str], None], *, record: Callable[[str], None]) -> None:
        """From now on `tell` receives tolerated failures, and `record` also earlier warnings."""
        for warning in self._warnings:
            record(warning)

        def both(text: str) -> None:
            record(text)
            tell(text)

        self._tell = both

    def is_due(self, step: int, *, last: bool = False) -> bool:
        """Whether the config requires a save at this step."""
        return last or step % self.config.every == 0 or self.is_milestone(step)

    def save(self, state: State, *, step: int, last: bool = False) -> bool:
        """Start the saves that the config requires at this step, and with `last` also a resumable step unless it is
        saved already. Returns whether a save was started.

        Raises:
          UserError: there is no space, or the previous save failed, and more saves in a row failed than
            `checkpoint.tolerate_failures` allows. Earlier checkpoints stay intact.
        """
        try:
            self._settle()
        except NotWritten as error:
            self._tolerate(error)
        resumable = (last or step % self.config.every == 0) and step not in self._steps.all_steps()
        milestone = self.is_milestone(step) and step not in self._milestones.all_steps()
        meta = {**self.meta, "format": FORMAT, "step": step, "tokens": self.tokens_at(step)}
        saves = []
        if resumable:
            saves.append((self._steps, _items(state, meta, trainer=True)))
        if milestone:
            saves.append((self._milestones, _items(state, meta, trainer=self.config.milestone_optimizer)))
        if not saves:
            return False
        try:
            self._check_room(step, [items for _, items in saves])
            with self._disk_errors_told():
                for manager, items in saves:
                    self._begun = True
                    manager.save(step, items)
        except NotWritten as error:
            self._tolerate(error)
            return False
        return True

    def is_milestone(self, step: int) -> bool:
        """Whether `step` is the first at which one of the milestones is reached."""
        if not self.config.milestones:
            return False
        before, after = self.tokens_at(step - 1), self.tokens_at(step)
        # Rounded, because 0.067 billion is 67,000,000.00000001 in floating point, and would be reached one step late.
        return any(before < round(milestone * 1e9) <= after for milestone in self.config.milestones)

    def latest(self) -> int | None:
        """Return the newest intact resumable step. Newer damaged steps are moved to quarantine and reported.

        The first process checks what `checkpoint.verify` selects; every process gets its result.

        Raises:
          UserError: there are or were steps, but none of them is intact.
        """
        answer, problem, left = _NONE, None, []
        if jax.process_index() == 0:
            try:
                answer, left = self._find_whole()
            except (UserError, OSError) as error:
                answer, problem = _FAILED, error
        answer = tell_all(answer)
        if isinstance(problem, OSError):
            raise UserError(f"the checkpoints of {self.run_dir} cannot be checked: {problem}") from problem
        if problem is not None:
            raise problem
        if answer == _FAILED:
            raise UserError(f"no checkpoint of {self.run_dir} to resume from; see the first process for the reason")
        self._kept = set(tell_all_of(left))
        self._steps.know(sorted(self._kept))
        return None if answer == _NONE else answer

    def read_meta(self, step: int) -> dict[str, Any]:
        """The meta of a resumable step."""
        meta = self._steps.restore(step, meta=ocp.args.JsonRestore())["meta"]
        check_format(meta.get("format", 1), newest=FORMAT, where=self.run_dir / CHECKPOINTS / str(step))
        return meta

    def restore(self, abstract: State, *, step: int) -> State:
        """Restore the state of a step with the shardings of `abstract`, from any mesh.

        Raises:
          UserError: it has other arrays, or other shapes or dtypes; the message names each.
        """
        wanted = {"params": abstract.params, "trainer": _trainer(abstract)}
        refuse_other_arrays(self._steps.directory / str(step), wanted)
        restored = self._steps.restore(step, **{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()})
        return State(params=restored["params"], **restored["trainer"])

    def wait(self) -> None:
        """Block until started saves are on disk with their manifest, and replaced steps are removed.

        Raises:
          UserError: it could not be written; the message says where and why.
        """
        self._settle()

    def close(self) -> None:
        """Finish started saves.

        Raises:
          UserError: the last save of this run failed, which is never tolerated.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._settle()
        finally:
            try:
                with self._disk_errors_told():  # what failed is raised again
                    for manager in self._managers:
                        manager.close()
            finally:
                if self._background is not None:
                    self._background.shutdown()
        if self._error is not None:
            raise self._error

    def _settle(self) -> None:
        """Check the result of the started save."""
        begun, self._begun = self._begun, False
        with self._disk_errors_told():
            errors = []
            for manager in self._managers:
                try:
                    manager.wait()
                except Exception as error:
                    if not isinstance(error, OSError | ValueError) and not self._remote:
                        raise
                    errors.append(error)
            # Only now, because the saving thread also moves replaced steps into the trash.
            self._empty_trash()
            if errors:
                if jax.process_count() == 1:
                    for manager in self._managers:  # Orbax lists the failed step from its start
                        manager.know(self._look(manager.directory.name))
                raise errors[0]
        if begun:
            self._failures, self._error = 0, None

    def _tolerate(self, error: NotWritten) -> None:
        """Count a consecutive failure. Raises one too many, and one that other processes may not know about."""
        self._failures += 1
        allowed = self.config.tolerate_failures
        if self._failures > allowed or not error.agreed:
            raise error
        self._error = error
        if jax.process_index() == 0:
            self._tell(f"{error} (failed save {self._failures} of {allowed} in a row that checkpoint.tolerate_failures"
                       " allows: the run goes on)")

    def _look(self, kind: str) -> list[int]:
        """The existing steps. Only the first process lists them."""
        found: list[int] = []
        problem = None
        if jax.process_index() == 0:
            try:
                found = [int(path.name) for path in files.list_steps(self.run_dir, kind)]
            except OSError as error:
                problem = error
        if tell_all(int(problem is not None)):
            raise problem or UserError(f"{self.run_dir / kind} cannot be listed; the first process says why")
        return tell_all_of(found)

    def _find_whole(self) -> tuple[int, list[int]]:
        """The newest intact step, and all steps that remain when newer damaged ones are in quarantine."""
        if self.config.verify == "off":
            return max(self._steps.all_steps(), default=_NONE), self._steps.all_steps()
        damaged: dict[int, list[str]] = {}
        for step in sorted(self._steps.all_steps(), reverse=True):
            folder = self._steps.directory / str(step)
            problems = files.find_damage(folder, level=self.config.verify)
            if problems is None:
                problems = find_structural_damage(folder, read=self.config.verify == "full")
                if not problems:
                    seen = "can be read" if self.config.verify == "full" else "are listed"
                    self.warn(f"{folder} has no manifest (an older version wrote it): its arrays {seen}; whether a bit"
                               " of them was changed cannot be seen")
            if not problems:
                for number, found in damaged.items():
                    place = files.quarantine(self._steps.directory / str(number), found)
                    self.warn(f"the checkpoint of step {number} is damaged, and is in {place} now:"
                               f" {files.say_damage(found)}; continuing from step {step}")
                return step, [number for number in self._steps.all_steps() if number not in damaged]
            damaged[step] = problems
        if damaged:
            raise UserError(self._say_none_whole(damaged))
        if shelf := files.quarantined(self.run_dir):
            raise UserError(f"no checkpoint of {self.run_dir} is whole: {', '.join(shelf)} in {self.run_dir}/"
                            f"{files.QUARANTINE}, each with the reason beside it; a step that you move back to"
                            f" {self._steps.directory} is looked at again; to begin again, remove the quarantine or"
                            " give another run.dir (init=RUN@STEP takes the weights of a milestone)")
        return _NONE, []

    def _say_none_whole(self, damaged: dict[int, list[str]]) -> str:
        """Every step is damaged: the last copies are not moved, and the user decides."""
        lines = [f"no checkpoint of {self.run_dir} is whole; none was moved or removed:",
                 *(f"  step {step}: {files.say_damage(problems)}" for step, problems in damaged.items())]
        same = {problem.partition(": ")[0] for problems in damaged.values() for problem in problems}
        if len(damaged) > 1 and len(same) == 1:
            lines.append(f"Only {same.pop()} is damaged, and in every step. A disk fault is unlikely: look for a"
                         " program that writes into these folders, or for a copy that is not complete.")
        lines.append(f"checkpoint.verify=off resumes from step {max(damaged)} without looking at its files. A copy of a"
                     " step can take its place. To begin again, give another run.dir (init=RUN@STEP takes the weights"
                     " of a milestone), or remove the steps.")
        return "\n".join(lines)

    def warn(self, text: str) -> None:
        """Log a warning before the run has its console; `listen` records it later."""
        self._warnings.append(text)
        log.warning(text)

    def _empty_trash(self) -> None:
        if jax.process_index() != 0:
            return
        if self._background is None:
            files.empty_trash(self._steps.directory)
        else:
            newest = self._steps.all_steps()[-1:]

            def retain() -> None:
                self._kept.update(newest)
                objects.retain(self._steps.directory, self._kept, keep_last=self.config.keep_last,
                               keep_every=self.config.keep_every)

            self._background.submit(objects.quietly, retain, what="removing old checkpoints")

    def _check_room(self, step: int, saves: list[ocp.args.Composite]) -> None:
        """Check before writing starts; all processes write to the same disk."""
        if self._remote:
            return
        arrays = [item.item for items in saves for name, item in items.items() if name != "meta"]
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self.run_dir).free
        if tell_all(int(free < needed)):
            raise NotWritten(f"no room for the checkpoint of step {step}: it takes {needed / 2**20:,.1f} MiB, and"
                             f" {self.run_dir} has {free / 2**20:,.1f} MiB free; {self._advice()}", agreed=True)

    @contextmanager
    def _disk_errors_told(self) -> Iterator[None]:
        """Convert disk errors to user errors. Incomplete files are removed at once, because they would keep the disk
        full."""
        try:
            yield
        except Exception as error:
            failure = storage.describe_failure(error) if self._remote else None
            if failure is not None:
                files.remove_half_written(self.run_dir)
                raise self._store_failed(*failure) from error
            if not isinstance(error, OSError | ValueError):
                raise
            reason = _disk_reason(error)
            if reason is None:
                raise
            files.remove_half_written(self.run_dir)
            refused = reason in (os.strerror(errno.EACCES), os.strerror(errno.EPERM), os.strerror(errno.EROFS))
            advice = self._advice("make it writable" if refused else "make room there")
            raise NotWritten(f"a checkpoint could not be written below {self.run_dir}: {reason}; {advice}",
                             agreed=jax.process_count() == 1) from error

    def _store_failed(self, reason: str, lasting: bool) -> NotWritten:
        error = NotWritten(f"a checkpoint could not be written below {self.run_dir}: {reason}; what is kept there is"
                           " whole, and the same command goes on from it", agreed=jax.process_count() == 1)
        if not lasting:
            error.status = REQUEUE
        return error

    def _advice(self, what: str = "make room there") -> str:
        steps = [int(path.name) for path in (self.run_dir / CHECKPOINTS).glob("[0-9]*") if path.name.isdigit()]
        goes_on = f"it goes on from step {max(steps)}" if steps else "nothing of this run is kept yet"
        return f"{what} and give the same command again: {goes_on}"


def _disk_reason(error: BaseException) -> str | None:
    """The system's description of a disk error, None for other errors; TensorStore puts the number into a ValueError's
    text."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else getattr(error, "strerror", None)


def write_weights(run_dir: Path, params: Any, *, meta: dict[str, Any]) -> None:
    """Save weights permanently, as a milestone at `meta["step"]`."""
    manager = Manager(run_dir / MILESTONES, None)
    manager.save(meta["step"], ocp.args.Composite(params=ocp.args.StandardSave(params),
                                                  meta=ocp.args.JsonSave({**meta, "format": FORMAT})))
    manager.wait()
    manager.close()


def _items(state: State, meta: dict[str, Any], *, trainer: bool) -> ocp.args.Composite:
    items = {"params": ocp.args.StandardSave(state.params), "meta": ocp.args.JsonSave(meta)}
    if trainer:
        items["trainer"] = ocp.args.StandardSave(_trainer(state))
    return ocp.args.Composite(**items)


def _trainer(state: State) -> dict[str, Any]:
    """The state without its trained parameters."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "params"}
