"""Orbax's manager of one folder of steps, and when a step gets its manifest: after the last write, before its name."""

from __future__ import annotations

import asyncio
import errno
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ctllm_jax import storage
from ctllm_jax.training import checkpoint_files as files
from ctllm_jax.training.checkpoint_leak import leave_out


class Manager:
    """Orbax's manager of one folder of steps, whose steps get their manifest before they get their name."""

    def __init__(self, directory: Path, preservation: Any):
        leave_out()
        self.directory, self._step = storage.absolute(directory), None
        remote = storage.is_remote(directory)
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._orbax = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
            # Retention in place leaves half-deleted steps that look whole when killed; renamed to the trash, none does.
            # On an object store nothing is renamed: what goes away there, `checkpoint_objects` decides.
            todelete_subdir=None if remote else files.TRASH, preservation_policy=None if remote else preservation,
            create=True, cleanup_tmp_directories=not remote,
            enable_async_checkpointing=True, temporary_path_class=_RemoteStep if remote else _Step,
            # Folders made by a thread that fails leave others waiting for them, and the process ends 20 minutes late.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False,
                                           barrier_sync_fn=None if remote else self._meet)))
        self.all_steps, self.reload = self._orbax.all_steps, self._orbax.reload
        self.wait, self.close = self._orbax.wait_until_finished, self._orbax.close

    def save(self, step: int, items: ocp.args.Composite) -> None:
        """Begin to save a step."""
        self._step = step
        self._orbax.save(step, args=items)

    def restore(self, step: int, **items: Any) -> Any:
        """Items of a step."""
        return self._orbax.restore(step, args=ocp.args.Composite(**items))

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Wait for all processes. The thread that saves comes here, when what this process writes is written."""
        if "async_write_complete" in key:
            for unnamed in self.directory.glob(f"{self._step}.orbax-checkpoint-tmp*"):
                files.write_sums(unnamed, process=jax.process_index())
        self._barrier(key=key, timeout_ms=timeout_ms)


class _Sealed:
    """The folder that Orbax writes a step into, or an item of it. A step gets its manifest when nothing writes into it
    any more, and its name after that.

    Orbax updates `_CHECKPOINT_METADATA` in a thread, until the step has its name. Here the last update comes, and is
    waited for, before the manifest.
    """

    _metadata: Any = None

    @classmethod
    def from_final(cls, final_path: Path, *, checkpoint_metadata_store: Any = None, **options: Any) -> _Sealed:
        """As Orbax; only a step has a metadata store, an item of it has none."""
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
        """Give the folder its name; in the first process, when all processes have written."""
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
    """On an object store: written under its own name, and whole when an object says so."""
