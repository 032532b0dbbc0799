"""Orbax's manager of one folder of steps; a step gets its manifest after the last write and before its final name."""

from __future__ import annotations

import asyncio
import datetime
import errno
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ctllm_jax import storage
from ctllm_jax.training.checkpoints import files
from ctllm_jax.training.checkpoints.tensorstore_leak import leave_out


class Manager:
    """Orbax's manager of one folder of steps, whose steps get their manifest before their final name.

    `steps` are the existing steps. If the manager searched for them itself, it would make eighteen requests per step in
    every process.
    """

    def __init__(self, directory: Path, preservation: Any, *, steps: Sequence[int] = ()):
        leave_out()
        logging.getLogger("absl").addFilter(_is_news)
        self.directory, self._step = storage.absolute(directory), None
        remote = storage.is_remote(directory)
        self._barrier, self._names = ocp.multihost.get_barrier_sync_fn(), _Names(steps)
        self._orbax = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
            # A killed deletion in place leaves an incomplete step that looks complete; a rename to the trash does not.
            # On an object store nothing is renamed; `objects` removes steps there.
            todelete_subdir=None if remote else files.TRASH, preservation_policy=None if remote else preservation,
            create=True, cleanup_tmp_directories=not remote,
            enable_async_checkpointing=True, lightweight_initialize=True, step_name_format=self._names,
            temporary_path_class=_RemoteStep if remote else _Step,
            # If a thread that creates folders fails, others wait for it, and the process ends 20 minutes late.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False,
                                           barrier_sync_fn=None if remote else self._meet)))
        self.all_steps = self._orbax.all_steps
        self.wait, self.close = self._orbax.wait_until_finished, self._orbax.close

    def know(self, steps: Sequence[int]) -> None:
        """Set the finished steps of the folder; the manager does not search for them."""
        if list(steps) != list(self.all_steps()):
            self._names.steps = steps
            self._orbax.reload()

    def save(self, step: int, items: ocp.args.Composite) -> None:
        """Start to save a step."""
        self._step = step
        self._orbax.save(step, args=items)

    def restore(self, step: int, **items: Any) -> Any:
        """Restore items of a step."""
        return self._orbax.restore(step, args=ocp.args.Composite(**items))

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Wait for all processes. The saving thread calls this after the writes of this process."""
        if "async_write_complete" in key:
            for unnamed in self.directory.glob(f"{self._step}.orbax-checkpoint-tmp*"):
                files.write_sums(unnamed, process=jax.process_index())
        self._barrier(key=key, timeout_ms=timeout_ms)


def _is_news(record: logging.LogRecord) -> bool:
    """Filter out Orbax's log lines about an error that it also raises: each of its threads logs about a hundred lines
    of stack around our single line."""
    return not (record.exc_info and "orbax" in record.pathname)


class _Found(ocp.path.step.Metadata):
    """A step without its timestamp, which we do not use and which would need a file read."""

    commit_timestamp = datetime.datetime.min.replace(tzinfo=datetime.UTC)


class _Names(ocp.path.step.NameFormat):
    """Steps are named by their numbers; only those set in the manager exist."""

    def __init__(self, steps: Sequence[int]):
        self.steps = steps

    def build_name(self, step: int) -> str:
        """The name of a step's folder."""
        return str(step)

    def find_all(self, base_path: Path) -> Iterator[_Found]:
        """All steps."""
        return (_Found(step, base_path / str(step)) for step in self.steps)

    def find_step(self, base_path: Path, step: int) -> _Found:
        """One of them. Raises ValueError if it was removed."""
        if not (base_path / str(step)).exists():
            raise ValueError(f"{base_path / str(step)} is not there")
        return _Found(step, base_path / str(step))


class _Sealed:
    """The folder that Orbax writes a step or an item of it into. A step gets its manifest when nothing writes into it
    any more, and then its final name.

    Orbax updates `_CHECKPOINT_METADATA` in a thread until the step has its name. Here we wait for the last update
    before the manifest.
    """

    _metadata: Any = None

    @classmethod
    def from_final(cls, final_path: Path, *, checkpoint_metadata_store: Any = None, **options: Any) -> _Sealed:
        """As in Orbax; only a step has a metadata store, an item has none."""
        made = super().from_final(final_path, **options)
        made._metadata = checkpoint_metadata_store
        return made

    async def create(self) -> Path:
        """Make the folder."""
        path = await super().create()
        if self._metadata is not None:
            self._metadata.write(file_path=path / files.STEP_METADATA,
                                 metadata={"init_timestamp_nsecs": time.time_ns()})
        return path

    async def finalize(self) -> None:
        """Give the folder its final name, in the first process, after all processes have written."""
        if self._metadata is not None:
            await asyncio.to_thread(self._seal)
        await super().finalize()

    def _seal(self) -> None:
        path = self.get() / files.STEP_METADATA
        self._metadata.wait_until_finished()
        self._metadata.update(file_path=path, commit_timestamp_nsecs=time.time_ns())
        self._metadata.wait_until_finished()
        if not (self._metadata.read(path) or {}).get("item_handlers"):
            raise OSError(errno.EIO, "the list of the parts of the checkpoint was not written", str(path))
        files.write_manifest(self.get())


class _Step(_Sealed, ocp.path.atomicity.AtomicRenameTemporaryPath):
    """On a disk: written under another name, and renamed."""


class _RemoteStep(_Sealed, ocp.path.atomicity.CommitFileTemporaryPath):
    """On an object store: written under its final name, and complete when a marker object exists."""
