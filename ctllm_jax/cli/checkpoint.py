"""`launch.py checkpoint ls|verify|diff|prune`: list, verify, compare and remove checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.config.base import Section, key
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.statuses import DONE, FAILED
from ctllm_jax.storage import in_parallel, is_remote, open_path

if TYPE_CHECKING:
    from ctllm_jax.cli import Context


class CheckpointListConfig(Section):
    """`ls` has no keys."""


class CheckpointVerifyConfig(Section):
    """`verify` has no keys."""


class CheckpointDiffConfig(Section):
    """Options of the comparison of two checkpoints."""

    optimizer: bool = key(False, "compare the optimizer's state and the counters too, not the weights alone")


class CheckpointPruneConfig(Section):
    """The checkpoints to keep."""

    keep: int = key(3, "newest checkpoints of each kind that stay", ge=0)
    every: int | None = key(None, "each one whose step is a multiple of this stays, too", ge=1)
    milestones: bool = key(False, "prune milestones by the same rule; they all stay otherwise")
    delete: bool = key(False, "delete the listed checkpoints; otherwise only list them")


ACTIONS = {"ls": CheckpointListConfig, "verify": CheckpointVerifyConfig, "diff": CheckpointDiffConfig,
           "prune": CheckpointPruneConfig}
USAGE = """
usage: python launch.py checkpoint ls RUN …
       python launch.py checkpoint verify RUN|RUN@STEP …
       python launch.py checkpoint diff RUN@A RUN@B [optimizer=true]
       python launch.py checkpoint prune RUN … [keep=N] [every=M] [milestones=true] [delete=true]

ls      every checkpoint of a run: resumable ones hold the optimizer too, milestones weights alone. Each is a MODEL by
        the name RUN@STEP. The files' sizes are compared with what was written.
verify  reads every file, and compares its checksum with the one in the step's manifest. Exit status 1: some are bad.
diff    two steps, of one run or of two: arrays that only one has, norms, the largest difference, and whether all bits
        are equal. Exit status 1: they differ.
prune   lists what would go, and with delete=true removes it. The newest one that is whole stays in any case.
"""


def run(context: Context) -> int:
    """Run the action for each target."""
    if not context.targets:
        raise UserError(f"checkpoint {context.action} needs a run directory")
    # As wide as the names are: one that is cut cannot be given to another command.
    context.console.width = 1000
    return {"ls": show, "verify": verify, "diff": compare, "prune": prune}[context.action](context)


def show(context: Context) -> int:
    """Print a table of the checkpoints of each run."""
    from datetime import datetime

    from rich.markup import escape
    from rich.table import Table

    from ctllm_jax.training.checkpoints.checkpoint import HUGGINGFACE, list_checkpoints
    from ctllm_jax.training.checkpoints.files import quarantined, say_damage, written_at
    from ctllm_jax.training.supervision.lock import read_owner, say_owner

    for target in context.targets:
        kept = list_checkpoints(open_path(target))
        if not kept:
            context.console.print(f"{target}: no checkpoint yet")
        else:
            table = Table("model", "kind", "tokens", "size", "written", "files", title=target, title_justify="left")
            looked_at = in_parallel(lambda each: (written_at(each.path), each.size, _state(each)), kept)
            for checkpoint, (seconds, size, state) in zip(kept, looked_at, strict=True):
                written = datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
                kind = checkpoint.kind + (", adapters" if checkpoint.meta.get("lora") else "")
                name = target if checkpoint.kind == HUGGINGFACE else f"{target}@{checkpoint.step}"
                table.add_row(name, kind, f"{checkpoint.meta.get('tokens', 0):,}",
                              f"{size / 2**20:,.1f} MiB", written, escape(state))
            context.console.print(table, soft_wrap=True)
        for name, problems in quarantined(open_path(target)).items():
            context.console.print(f"in quarantine: {name} ({escape(say_damage(problems))})")
        if (owner := read_owner(open_path(target))) is not None:
            context.console.print(f"in use by {escape(say_owner(owner))}")
    return DONE


def _state(checkpoint: Any) -> str:
    from ctllm_jax.training.checkpoints.checkpoint import HUGGINGFACE
    from ctllm_jax.training.checkpoints.files import find_damage, say_damage

    if checkpoint.kind == HUGGINGFACE:
        return ""
    try:
        problems = find_damage(checkpoint.path, level="size")
    except FileNotFoundError:
        return "removed just now"
    if problems is None:
        return "no manifest"
    return f"DAMAGED: {say_damage(problems)}" if problems else "sizes as written"


def verify(context: Context) -> int:
    """Read every file of every step, and say which are bad."""
    from rich.markup import escape

    from ctllm_jax.training.checkpoints.files import find_damage, measure_size

    bad = 0
    for target in context.targets:
        folders = list(_folders(target))
        if not folders:
            context.console.print(f"{escape(target)}: no checkpoint yet")

        def look(folder: Path) -> tuple[int, list[str] | None] | None:
            with suppress(FileNotFoundError):  # the running run has removed it
                return measure_size(folder), find_damage(folder)

        # A store is asked about all of them at the same time; on a disk one step after the other is read.
        for folder, found in zip(folders, (in_parallel if is_remote(target) else map)(look, folders), strict=True):
            if found is None:
                continue
            size, problems = found
            said = f"whole ({size / 2**20:,.1f} MiB, every checksum)"
            if problems is None:
                from ctllm_jax.training.checkpoints.arrays import find_structural_damage

                problems = find_structural_damage(folder)
                said = f"no manifest; every array can be read ({size / 2**20:,.1f} MiB), changed bits are not seen"
            bad += bool(problems)
            context.console.print(f"{escape(str(folder))}: " + ("[red]DAMAGED[/]" if problems else said))
            for problem in problems:
                context.console.print(f"  {escape(problem)}")
    if bad:
        context.console.print(f"{bad} damaged: a run that goes on puts such a step into quarantine, and takes the one"
                              " before")
    return FAILED if bad else DONE


def _folders(target: str) -> Iterator[Path]:
    """The steps that a target names, whether anything can be read of them or not."""
    from ctllm_jax.training.checkpoints.files import CHECKPOINTS, MILESTONES, list_steps

    name, at, wanted = target.rpartition("@")
    one = at and wanted.isdigit() and not open_path(target).is_dir()
    run_dir = open_path(name if one else target)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    folders = [path for kind in (CHECKPOINTS, MILESTONES) for path in list_steps(run_dir, kind)]
    folders.sort(key=lambda path: (int(path.name), path.parent.name))
    found = [path for path in folders if not one or path.name == str(int(wanted))]
    if one and not found:
        raise UserError(f"{run_dir} has no step {wanted}; it has {', '.join(path.name for path in folders) or 'none'}")
    yield from found


def compare(context: Context) -> int:
    """Print a table that compares the arrays of two checkpoints."""
    from rich.table import Table

    from ctllm_jax.training.checkpoints.arrays import compare_arrays
    from ctllm_jax.training.checkpoints.checkpoint import HUGGINGFACE, find_checkpoint

    if len(context.targets) != 2:
        raise UserError(f"checkpoint diff compares two checkpoints, RUN@A and RUN@B, and was given "
                        f"{len(context.targets)}")
    sides = [find_checkpoint(target)[1] for target in context.targets]
    for target, side in zip(context.targets, sides, strict=True):
        if side.kind == HUGGINGFACE:
            raise UserError(f"{target} is a Hugging Face folder; checkpoint diff compares what runs have kept"
                            " (import-hf makes a run of it)")
    items = ["params"]
    if context.config.optimizer:
        items.append("trainer")
        for side in sides:
            if not (side.path / "trainer").is_dir():
                raise UserError(f"optimizer=true: {side.path} holds weights alone")
    first, second = (f"{side.run_dir}@{side.step}" for side in sides)
    table = Table("array", "shape", "norm there", "norm here", "largest difference", "bits",
                  title=f"{first} (there) and {second} (here)", title_justify="left")
    differing, count, largest = 0, 0, (0.0, "")
    for item in items:
        for found in compare_arrays(sides[0].path, sides[1].path, item=item):
            count += 1
            differing += not found.same
            shapes = [found.there or "absent", found.here or "absent"]
            shape = " | ".join(shapes if shapes[0] != shapes[1] else shapes[:1])
            if found.norms is None:
                table.add_row(f"{item}.{found.name}", shape, "", "", "", "not comparable")
                continue
            if not largest[0] >= found.largest:  # NaN is largest of all
                largest = found.largest, f"{item}.{found.name}"
            table.add_row(f"{item}.{found.name}", shape, *(f"{norm:.6g}" for norm in found.norms),
                          f"{found.largest:.3g}", "equal" if found.same else "differ")
    context.console.print(table, soft_wrap=True)
    where = f"; the largest difference is {largest[0]:.3g}, in {largest[1]}" if largest[1] else ""
    context.console.print(f"{count} arrays: {count - differing} equal bit for bit, {differing} not{where}")
    return FAILED if differing else DONE


def prune(context: Context) -> int:
    """List the checkpoints to remove, and with delete=true remove them."""
    from rich.markup import escape

    from ctllm_jax.config.pretrain import RunConfig
    from ctllm_jax.huggingface.model import is_huggingface
    from ctllm_jax.training.checkpoints.checkpoint import list_checkpoints
    from ctllm_jax.training.checkpoints.files import discard
    from ctllm_jax.training.supervision.lock import own

    config, console = context.config, context.console
    delete = config.delete and not context.dry_run
    for target in context.targets:
        if is_huggingface(open_path(target)):
            raise UserError(f"{target} is a Hugging Face folder, and no run")
        list_checkpoints(open_path(target))  # a run directory?
        with own(RunConfig(dir=target), what="checkpoint prune", free=not delete):
            kept = list_checkpoints(open_path(target))
            gone = [checkpoint for kind in ["resumable", *["milestone"] * config.milestones] for checkpoint in
                    choose_pruned([each for each in kept if each.kind == kind], keep=config.keep, every=config.every)]
            in_parallel(lambda each: each.size, gone)  # before they are gone
            for checkpoint in gone if delete else ():
                discard(checkpoint.path)
        if not gone:
            console.print(f"{escape(target)}: nothing to delete; {len(kept)} kept")
            continue
        for checkpoint in gone:
            console.print(f"{'deleted' if delete else 'would delete'} {escape(str(checkpoint.path))} "
                          f"({checkpoint.kind}, {checkpoint.size / 2**20:,.1f} MiB)")
        stay = ", ".join(f"{each.step} ({each.kind})" for each in kept if each not in gone)
        total = sum(checkpoint.size for checkpoint in gone)
        console.print(f"{escape(target)}: {len(gone)} of {len(kept)}, {total / 2**20:,.1f} MiB; what stays: {stay}")
        if not delete:
            console.print("nothing was deleted: give delete=true for that")
    return DONE


def choose_pruned(kept: Sequence[Any], *, keep: int, every: int | None) -> list[Any]:
    """Those that go of the checkpoints of one kind: all but the newest `keep`, multiples of `every`, and the newest one
    whose files are whole."""
    from ctllm_jax.training.checkpoints.arrays import find_structural_damage
    from ctllm_jax.training.checkpoints.files import find_damage

    newest = sorted(kept, key=lambda checkpoint: -checkpoint.step)
    stay = {checkpoint.step for checkpoint in newest[:keep]}
    stay |= {checkpoint.step for checkpoint in newest if every is not None and checkpoint.step % every == 0}
    for checkpoint in newest:
        try:
            problems = find_damage(checkpoint.path)
        except FileNotFoundError:
            continue  # the run goes on, and did not keep it
        if not (find_structural_damage(checkpoint.path) if problems is None else problems):
            stay.add(checkpoint.step)
            break
    return [checkpoint for checkpoint in kept if checkpoint.step not in stay]
