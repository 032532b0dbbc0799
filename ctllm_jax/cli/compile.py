"""`launch.py compile CONFIG topology=NAME`: a run's real step, compiled for hardware that is not here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ctllm_jax.config.axes import TENSOR
from ctllm_jax.config.compile import CompileConfig

if TYPE_CHECKING:
    from ctllm_jax.cli import Context
    from ctllm_jax.preflight.aot import Report

SCHEMA = CompileConfig
TAKES_CONFIG = True
EXAMPLE = "configs/ct_llm_2b/pretrain.yaml"
USAGE = """
usage: python launch.py compile CONFIG topology=NAME[,NAME …] [key=value …]

CONFIG and keys are those of `pretrain`. The step is compiled by the hardware's own compiler, on this machine: does it
fit, memory by kind, FLOPs, what is sent and whether something is computed meanwhile, how fast it can be at most. Needs
the extra tpu for TPUs and cuda13 for GPUs, but neither a TPU nor a GPU. Exit status 1 if it does not fit; then what
takes the room, and a change that fits, are named:
  python launch.py compile configs/ct_llm_2b/pretrain.yaml topology=v5p-256
  python launch.py compile configs/ct_llm_2b/pretrain.yaml topology=v5litepod-256 batch.rows_per_device=8 search=true
  python launch.py compile configs/small/1b.yaml topology=h100:8,v6e:4x4 output=compile.json
"""
_SHOWN = 8  # collectives and arrays of a table
_LEAST = 2**20  # smallest size in bytes at which a synchronous collective is always shown


def run(context: Context) -> int:
    """Compile for each topology; print and write the results."""
    # libtpu queries a metadata server, and takes a lock, unless it is configured for a machine without TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ctllm_jax.cluster.topology import parse_topology

    config, console = context.config, context.console
    topologies = [parse_topology(name) for name in config.topology]
    if context.dry_run:
        for topology in topologies:
            console.print(f"would compile for {topology.describe()}")
        return 0
    chosen: list[Report] = []
    written = []
    for topology in topologies:
        console.print(f"[bold]{topology.name}[/] = {topology.describe()}")
        reports = find(config, topology, tell=lambda text: console.print(f"[dim]{text}[/]"))
        best = pick(reports)
        chosen.append(best)
        show(best, console)
        if len(reports) > 1:
            show_attempts(reports, best, console, settings=config.search)
        written.append({"topology": describe(topology), "chosen": as_json(best),
                        "tried": [as_json(report) for _, report in reports]})
    if len(chosen) > 1:
        show_summary(chosen, console)
    if config.output:
        write(config.output, written, context)
        console.print(f"written: {config.output}")
    return 0 if all(reports_fit(report, config) for report in chosen) else 1


def reports_fit(report: Report, config: CompileConfig) -> bool:
    """Whether the result fits: the config itself, or the best one of a search."""
    return report.fits and (config.search or settings(report.config) == settings(config))


def settings(config: Any) -> tuple:
    """The keys that a search or a change varies."""
    return config.batch.rows_per_device, config.compute.remat, config.compute.loss_chunk


def find(config: CompileConfig, topology: Any, *, tell: Callable[[str], None]) -> list[tuple[str, Report]]:
    """(settings, result) of each compilation: first the config itself, then those of a search or a change."""
    from ctllm_jax.preflight import aot
    from ctllm_jax.preflight.roofline import roofline

    devices = aot.open_devices(topology)
    if not config.search:
        tell("compiling the step …")
        tried = [("as it is", aot.compile_step(config, topology, devices))]
        ladder = [] if tried[0][1].fits else list(aot.changes(config, tried[0][1].rows))
    else:
        tried = []
        from ctllm_jax import sharding

        mesh = {axis: int(size) for axis, size in sharding.make_mesh(
            config.mesh.model_dump(), devices, nodes=topology.slices).shape.items()}
        rows = config.batch.rows * mesh[TENSOR] // topology.devices or 1
        ladder = sorted(((name, each) for name, each in aot.candidates(config, rows)
                         if each.batch.rows_per_device <= rows),
                        key=lambda pair: roofline(pair[1], topology, mesh=mesh, collectives=None).step)
        # A candidate whose estimate is far above the memory is not compiled.
        ladder = [pair for pair in ladder if aot.may_fit(pair[1], topology)] or ladder[-1:]
    for name, changed in ladder:
        if len(tried) >= config.attempts or tried and tried[-1][1].fits:
            break
        tell(f"compiling with {name} …")
        tried.append((name, aot.compile_step(changed, topology, devices)))
    return tried


def pick(tried: list[tuple[str, Report]]) -> Report:
    """The fastest candidate that fits; the first one if none does."""
    fitting = [report for _, report in tried if report.fits]
    return min(fitting, key=lambda report: report.roofline.step) if fitting else tried[0][1]


def show(report: Report, console: Any) -> None:
    """Everything of one compilation."""
    from ctllm_jax.model.flops import flops_per_token
    from ctllm_jax.sharding import describe_mesh
    from ctllm_jax.training.console import print_rows

    config, roof = report.config, report.roofline
    flops = flops_per_token(config.model, sequence_length=config.batch.sequence_length, lora=config.lora)
    mesh = describe_mesh(report.mesh)
    parts = ", ".join(f"{kind} {_gib(size)}" for kind, size in report.memory.items())
    verdict = "[green]fits[/]" if report.fits else "[red]does not fit[/]"
    layers = "scanned" if config.compute.scan_layers else "unrolled"
    rows = [("mesh", f"{mesh}; {report.rows} rows a device at once, {report.accumulation} accumulated"),
            ("ops", ", ".join(f"{op}: {name}" for op, name in report.implementations.items())),
            ("compute", f"remat {config.compute.remat}, loss_chunk {config.compute.loss_chunk:,}, layers "
                        f"{layers}; compiled in {report.seconds:.0f} s"),
            ("flags", " ".join(f"{name}={value}" for name, value in report.flags.items()) or "XLA's own defaults"),
            ("memory", f"{_gib(report.peak)} of {_gib(report.capacity)} a device: {parts}"),
            ("by arithmetic", "of the temporaries " + ", ".join(f"{kind} {_gib(size)}" for kind, size in
                                                                report.estimate.items())),
            ("FLOPs a token", f"{flops.causal / 1e6:,.1f} M causal, {flops.full / 1e6:,.1f} M full"),
            ("at least", f"{_seconds(roof.step)} a step: compute {_seconds(roof.compute)}, memory "
                         f"{_seconds(roof.memory)}, network {_seconds(roof.network)} ({_seconds(roof.exposed)} with "
                         "nothing computed meanwhile)"),
            ("at most", f"{config.batch.tokens / roof.step:,.0f} tokens/s, MFU {roof.mfu_causal:.1%} causal, "
                        f"{roof.mfu_full:.1%} full")]
    print_rows(console, rows, title=f"step of {config.batch.tokens:,} tokens")
    console.print(f"{verdict}" + (f": {report.reason}" if report.reason else ""))
    if report.collectives:
        show_collectives(report, console)
    if not report.fits:
        show_largest(report, console)


def show_collectives(report: Report, console: Any) -> None:
    """Communication by kind, and the largest synchronous collectives."""
    from rich import box
    from rich.table import Table

    table = Table("collective", "runs", "sent a step", "meanwhile computed", "between slices", box=box.SIMPLE_HEAD,
                  pad_edge=False)
    for row in by_kind(report):
        table.add_row(row["kind"], f"{row['runs']:,}", _gib(row["sent"]), "yes" if row["asynchronous"] else "no",
                      "yes" if row["crosses"] else "no")
    console.print(table)
    waiting = [each for each in report.collectives if not each.asynchronous and each.payload > _LEAST]
    for each in waiting[:_SHOWN]:
        console.print(f"  nothing computed meanwhile: {each.kind} of {_gib(each.payload)}, {each.times} times "
                      f"({each.source or 'no name'})", markup=False)


def by_kind(report: Report) -> list[dict[str, Any]]:
    """The collectives added up by kind, asynchronous or not, and whether they leave the slice."""
    rows: dict[tuple, dict[str, Any]] = {}
    for each in report.collectives or ():
        row = rows.setdefault((each.kind, each.asynchronous, each.crosses),
                              {"kind": each.kind, "asynchronous": each.asynchronous, "crosses": each.crosses,
                               "runs": 0, "sent": 0})
        row["runs"] += each.times
        row["sent"] += each.sent
    return sorted(rows.values(), key=lambda row: -row["sent"])


def show_largest(report: Report, console: Any) -> None:
    """The largest users of memory: arrays of the program if the compiler reports them, else estimated parts."""
    if report.largest:
        for each in report.largest[:_SHOWN]:
            console.print(f"  {_gib(each.size):>11}  {each.type}  {each.source}", markup=False)
        return
    parts = {**{kind: size for kind, size in report.memory.items() if kind != "temporaries"}, **report.estimate}
    for kind, size in sorted(parts.items(), key=lambda part: -part[1]):
        console.print(f"  {_gib(size):>11}  {kind}")


def show_attempts(tried: list[tuple[str, Report]], best: Report, console: Any, *, settings: bool) -> None:
    """The tried settings, and the recommended keys."""
    for name, report in tried:
        mark = "fits" if report.fits else "does not fit"
        console.print(f"  {name}: {mark}, {_gib(report.peak)}, at least {_seconds(report.roofline.step)} a step")
    if best.fits:
        name = next(name for name, report in tried if report is best)
        console.print(f"{'recommended' if settings else 'this fits'}: [bold]{name}[/]")
    else:
        console.print("nothing that was tried fits: more devices (mesh.fsdp), or more attempts")


def show_summary(reports: list[Report], console: Any) -> None:
    """One row a topology."""
    from rich import box
    from rich.table import Table

    table = Table("topology", "rows", "memory", "of", "fits", "sent", "exposed", "step", "MFU",
                  box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for report in reports:
        roof = report.roofline
        sent = "unknown" if report.collectives is None else _gib(sum(each.sent for each in report.collectives))
        table.add_row(report.topology.name, f"{report.rows}x{report.accumulation}", _gib(report.peak),
                      _gib(report.capacity), "yes" if report.fits else "no", sent, _seconds(roof.exposed),
                      _seconds(roof.step), f"{roof.mfu_causal:.1%}")
    console.print(table)
    console.print("[dim]rows at once x accumulated; bytes and seconds of a device and step; step and MFU are bounds[/]")


def describe(topology: Any) -> dict[str, Any]:
    """A topology as JSON."""
    return {"name": topology.name, "chip": topology.chip.name, "shape": list(topology.shape),
            "slices": topology.slices, "chips": topology.chips, "cores": topology.cores,
            "devices": topology.devices, "hosts": topology.hosts}


def as_json(report: Report) -> dict[str, Any]:
    """A report as JSON."""
    from dataclasses import asdict

    config = report.config
    return {"rows_per_device": report.rows, "accumulation": report.accumulation, "remat": config.compute.remat,
            "loss_chunk": config.compute.loss_chunk, "scan_layers": config.compute.scan_layers, "mesh": report.mesh,
            "implementations": report.implementations,
            "flags": report.flags,
            "fits": report.fits, "reason": report.reason, "memory": report.memory, "peak": report.peak,
            "capacity": report.capacity, "estimate": report.estimate, "compile_seconds": round(report.seconds, 2),
            "roofline": asdict(report.roofline),
            "collectives": None if report.collectives is None else [
                {**asdict(each), "sent": each.sent} for each in report.collectives],
            "largest": [each._asdict() for each in report.largest]}


def write(path: str, results: list[dict[str, Any]], context: Context) -> None:
    """The JSON file."""
    import importlib.metadata
    import json
    from pathlib import Path

    versions = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"command": context.command_line, "versions": versions, "results": results},
                                     indent=1), encoding="utf-8")


def _seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.1f} ms" if value >= 1e-3 else f"{value * 1e6:,.0f} us"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"
