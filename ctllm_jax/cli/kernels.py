"""`launch.py kernels`: the kernels' numerics, speed and compiles, without a model or data."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.kernels import KernelsBenchConfig, KernelsCheckConfig, KernelsCompileConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

ACTIONS = {"check": KernelsCheckConfig, "bench": KernelsBenchConfig, "compile": KernelsCompileConfig}
USAGE = """
usage: python launch.py kernels check|bench|compile [key=value …]

check compares every implementation that runs here with float64 on the host, forward and backward, on packed batches;
its status is 1 if one is too far off. bench times them. compile asks TPU's own compiler (pip extra tpu) for chips that
need not be here; its status is 1 if one does not compile:
  python launch.py kernels check
  python launch.py kernels bench lengths=[4096] heads=8
  python launch.py kernels compile chips=[v5p]
"""
IMPLEMENTATIONS = ("pallas", "cudnn", "xla")


def run(context: Context) -> int:
    """Check, time or compile."""
    if context.targets:
        raise UserError(f"kernels {context.action} takes keys only; {' '.join(context.targets)} is left over")
    if context.action == "compile":
        # No device is opened, so that a compilation can run while another job uses the devices.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    from ctllm_jax.kernels.registry import OPS

    if context.config.op not in (None, *OPS):
        raise UserError(f"op={context.config.op}: must be one of {', '.join(OPS)}")
    ops = OPS if context.config.op is None else (context.config.op,)
    rows, status = {"check": _check, "bench": _bench, "compile": _compile}[context.action](context, ops)
    if context.config.output and not context.dry_run:
        _write(context, rows)
    return status


def _check(context: Context, ops: tuple[str, ...]) -> tuple[list[dict[str, Any]], int]:
    from ctllm_jax.kernels.dispatch import CannotRun
    from ctllm_jax.kernels.registry import gather

    cases = [case for case in gather("checks", ops) if context.config.match in f"{case.op} {case.case}"]
    table = _table("op", "case", "implementation", "result", "largest error, in tolerances")
    rows, refused, failed = [], {}, 0
    for case in [] if context.dry_run else cases:
        for implementation in IMPLEMENTATIONS:
            problem = ""
            try:
                errors = case.compare(implementation)
            except CannotRun as error:
                refused[_reason(error)] = None
                continue
            except Exception as error:  # A compiler raises many kinds, and each is a row of the table.
                errors, problem = {}, str(error).strip().partition("\n")[0] or type(error).__name__
            good = not problem and all(error <= tolerance for error, tolerance in errors.values())
            failed += not good
            rows.append({"op": case.op, "case": case.case, "implementation": implementation, "good": good,
                         "problem": problem or None, "errors": {what: error for what, (error, _) in errors.items()}})
            shown = problem or ", ".join(f"{what} {error / tolerance:.2f}"
                                         for what, (error, tolerance) in errors.items())
            table.add_row(case.op, case.case, implementation, _verdict(good, "good", "WRONG"), shown)
    _finish(context, table, cases, list(refused))
    if not cases:
        raise UserError(f"match={context.config.match}: no case of that name")
    if not context.dry_run and not rows:
        raise UserError("none of these cases can run here")
    if failed:
        context.console.print(Text(f"{failed} of {len(rows)} are wrong", style="bold red"))
    return rows, int(failed > 0)


def _bench(context: Context, ops: tuple[str, ...]) -> tuple[list[dict[str, Any]], int]:
    import jax

    from ctllm_jax.cli.kernel_peers import find_peers
    from ctllm_jax.kernels.dispatch import CannotRun
    from ctllm_jax.kernels.registry import gather

    config = context.config
    names = ("lengths", "heads", "kv_heads", "head_dim", "hidden", "ffn", "rows", "dtype")
    sizes = {name: getattr(config, name) for name in names}
    cases = gather("benches", ops, **sizes)
    table = _table("op", "case", "implementation", "milliseconds", "TFLOP/s")
    rows, refused = [], {}

    def add(case, implementation: str, seconds: float) -> None:
        speed = case.flops / seconds / 1e12
        rows.append({"op": case.op, "case": case.case, "implementation": implementation, "seconds": seconds,
                     "tflops": speed})
        table.add_row(case.op, case.case, implementation, f"{seconds * 1e3:,.3f}", f"{speed:,.1f}")

    for case in [] if context.dry_run else cases:
        for implementation in case.implementations:
            try:
                function, arguments = case.prepare(implementation)
                jax.block_until_ready(function(*arguments))
            except CannotRun as error:
                refused[_reason(error)] = None
                continue
            except Exception as error:
                refused[f"{case.op} {case.case}, {implementation}: {str(error).strip().partition(chr(10))[0]}"] = None
                continue
            add(case, implementation, min(_seconds(function, arguments) for _ in range(config.repeats)))
        for name, measure in find_peers(case).items():
            add(case, name, measure())
    _finish(context, table, cases, list(refused))
    return rows, 0


def _compile(context: Context, ops: tuple[str, ...]) -> tuple[list[dict[str, Any]], int]:
    import importlib.util

    from ctllm_jax.kernels.registry import gather

    if importlib.util.find_spec("libtpu") is None:
        raise UserError("kernels compile needs TPU's compiler, which is not installed: pip install -e '.[tpu]'")
    cases = [case for case in gather("compiles", ops, chips=context.config.chips)
             if context.config.match in f"{case.op} {case.case}"]
    table = _table("chip", "op", "case", "result", "VMEM", "temporaries", "seconds")
    rows, problems = [], []
    for case in [] if context.dry_run else cases:
        began, temporaries, problem = time.perf_counter(), None, None
        try:
            temporaries = case.lower().compile().memory_analysis().temp_size_in_bytes
        except Exception as error:  # Mosaic and XLA raise many kinds, and each is a row of the table.
            problem = str(error).strip().partition("\n")[0]
            problems.append(f"{case.chip} {case.op} {case.case}: {problem}")
        seconds = time.perf_counter() - began
        rows.append({"chip": case.chip, "op": case.op, "case": case.case, "ok": problem is None, "problem": problem,
                     "vmem_bytes": case.vmem, "temporary_bytes": temporaries, "seconds": seconds})
        table.add_row(case.chip, case.op, case.case, _verdict(problem is None, "ok", "FAILS"), _mib(case.vmem),
                      _mib(temporaries), f"{seconds:.1f}")
    _finish(context, table, cases, problems)
    return rows, int(bool(problems))


def _seconds(function, arguments) -> float:
    import jax

    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right" if column in ("milliseconds", "TFLOP/s", "VMEM", "temporaries",
                                                               "seconds") else "left")
    return table


def _finish(context: Context, table: Table, cases: list[Any], notes: list[str]) -> None:
    """Show the table, and below it the cases that did not run, with reasons; in a dry run, the planned cases."""
    if context.dry_run:
        for case in cases:
            context.console.print(Text(f"{getattr(case, 'chip', '')} {case.op}: {case.case}".strip()))
        return
    if table.row_count:
        context.console.print(table)
    for note in notes:
        context.console.print(Text(note, style="dim"))


def _verdict(good: bool, yes: str, no: str) -> Text:
    return Text(yes, style="green") if good else Text(no, style="bold red")


def _reason(error: ValueError) -> str:
    """The reason why an implementation does not run, without the alternatives."""
    return str(error).partition("; what can:")[0]


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.1f} MiB"


def _write(context: Context, rows: list[dict[str, Any]]) -> None:
    import importlib.metadata

    import jax

    device = "ahead of time" if context.action == "compile" else jax.devices()[0].device_kind
    result = {"command": context.command_line, "device": device,
              "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}, "rows": rows}
    path = Path(context.config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(result), indent=1) + "\n", encoding="utf-8")
    context.console.print(Text(f"written: {path}"))


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
