"""Write docs/scaling.md: estimates of CT-LLM's whole run on three clusters, and of a model of ten times its size.

    python benchmarks/scaling.py [--output docs/scaling.md]

The plan is `launch.py plan`'s, the bounds those of `launch.py compile` with the network counted by hand, as no program
is compiled. Nothing is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ctllm_jax.cluster.saving import CHECKSUM_SECONDS, save_seconds
from ctllm_jax.cluster.topology import Topology, parse_topology
from ctllm_jax.config.load import load
from ctllm_jax.config.plan import PlanConfig
from ctllm_jax.model.parameters import count_parameters
from ctllm_jax.preflight.budget import DISK_BANDWIDTH, fit
from ctllm_jax.preflight.plan import checkpoint_bytes, memory_bytes
from ctllm_jax.preflight.roofline import roofline

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
MFU, STEPS = 0.5, 598_300
COPY_BANDWIDTH = 10e9
"""Bytes a second from the chips to their host's memory, over PCIe: what a save holds the steps up for."""
LARGER = ["model.hidden_size=6144", "model.num_layers=50", "model.num_heads=48", "model.num_kv_heads=8",
          "model.ffn_size=16384"]
CLUSTERS = {
    "v5p-512": (["mesh.fsdp=256", "compute.remat=none"], ["mesh.fsdp=256", "compute.remat=ffn"]),
    "4*v6e-256": (["mesh.replica=4", "mesh.fsdp=128", "mesh.tensor=2", "compute.remat=ffn"],
                  ["mesh.replica=4", "mesh.fsdp=128", "mesh.tensor=2", "compute.remat=block"]),
    "64*a3-highgpu-8g": (["mesh.replica=64", "mesh.fsdp=8", "compute.remat=ffn"],
                         ["mesh.replica=8", "mesh.fsdp=64", "compute.remat=block"]),
}


@dataclass(frozen=True)
class Row:
    """One cluster's figures; seconds and bytes, of one device unless said otherwise."""

    topology: Topology
    config: PlanConfig
    mesh: dict[str, int]
    rows: float
    memory: int
    compute: float
    traffic: float
    links: float
    between: float
    days: float
    tokens_per_second: float

    @property
    def bound(self) -> float:
        """Seconds of a step at least: what is sent within and between slices may hide behind the matmuls."""
        return max(self.compute, self.traffic, self.links, self.between)


def count(name: str, overrides: list[str], *, larger: bool) -> Row:
    """The figures of a cluster."""
    config = load(PlanConfig, target="ct_llm_2b/pretrain", overrides=[
        *(LARGER if larger else []), *overrides, f"topology={name}", "budget=1254.7B", f"mfu={MFU}"])
    topology = parse_topology(name)
    chosen = config.mesh
    mesh = {"replica": chosen.replica or topology.slices, "data": 1, "fsdp": chosen.fsdp, "tensor": chosen.tensor}
    parts = topology.devices // mesh["tensor"]
    rows = config.batch.rows / parts
    plan, bound = fit(config, topology), roofline(config, topology, mesh=mesh, collectives=None)
    parameters, fsdp, replica = count_parameters(config.model), mesh["fsdp"], mesh["replica"]
    # bf16, rings: a weight is gathered forward and backward (and once more for remat "ffn"), its gradient scattered.
    passes = 4 if config.compute.remat == "ffn" else 3
    within = passes * 2 * parameters / mesh["tensor"] * (fsdp - 1) / fsdp
    if mesh["tensor"] > 1:  # the residual stream is summed twice a layer and way, [tokens, D] in bf16
        tokens = config.batch.tokens / parts
        within += 4 * 2 * tokens * config.model.hidden_size * config.model.num_layers
    between = 2 * 2 * parameters / (fsdp * mesh["tensor"]) * (replica - 1) / replica
    chip, node = topology.chip, topology.devices // topology.slices
    if fsdp * mesh["tensor"] > node:  # every device brings its share of a node's part in
        between += within / node
    memory = sum(memory_bytes(config, devices=topology.devices, rows=max(1, round(rows)),
                              slices=topology.slices).values())
    return Row(topology, config, mesh, rows, memory, bound.compute, bound.memory, within / chip.link_bandwidth,
               between / chip.network_bandwidth, plan.seconds / 86400, plan.tokens / plan.seconds)


def render() -> str:
    """The page."""
    small = [count(name, keys[0], larger=False) for name, keys in CLUSTERS.items()]
    large = [count(name, keys[1], larger=True) for name, keys in CLUSTERS.items()]
    first = small[0]
    chip, batch = first.topology.chip, first.config.batch
    lines = [
        "# CT-LLM on a cluster, on paper", "",
        "Written by `python benchmarks/scaling.py`: arithmetic from the vendors' peak figures, not measurements."
        f" 1,254.7 B tokens in {STEPS:,} steps of {batch.tokens:,} tokens, {batch.rows} rows of"
        f" {batch.sequence_length:,}; the batch does not depend on the number of devices.", "",
        "## 2.13 B parameters", "", *table(small), "",
        "On 1,024 chips there are more chips than rows: two chips share a row (`mesh.tensor=2`). The best peers report"
        f" {MFU:.0%} for models of 7 B on H100; no run can be faster than the bound.", "",
        "## The arithmetic", "", f"For {first.topology.name} ({first.topology.describe()}):", "", "```",
        *arithmetic(first), "```", "",
        f"Peaks of {chip.name}: {chip.peak_flops / 1e12:,.0f} TFLOP/s, {chip.memory_bandwidth / 1e9:,.0f} GB/s of"
        f" memory, {chip.link_bandwidth / 1e9:,.0f} GB/s over all links, {chip.network_bandwidth / 1e9:,.2f} GB/s"
        " between slices (`ctllm_jax/cluster/chips.py`). Computed FLOPs: matmuls and causal attention, recomputation"
        " included.", "",
        f"## Ten times the size: {count_parameters(large[0].config.model) / 1e9:.1f} B parameters", "",
        "`" + " ".join(LARGER) + "`, the same tokens and batch.", "", *table(large), "",
        *changes(small, large, [count(name, keys[0], larger=True) for name, keys in CLUSTERS.items()]), "",
        "Before renting: `python launch.py compile CONFIG topology=NAME` compiles the step itself and prints its"
        " memory, collectives and bound; `python launch.py plan CONFIG budget=36h topology=NAME` fits a run to a"
        " budget.", ""]
    return "\n".join(lines)


def table(rows: list[Row]) -> list[str]:
    """Markdown, a cluster a column."""
    columns: list[tuple[str, list[str]]] = [
        ("devices", [f"{row.topology.devices:,} {row.topology.chip.name}" for row in rows]),
        ("mesh", [" x ".join(f"{axis} {size}" for axis, size in row.mesh.items() if size > 1) for row in rows]),
        ("rows a device, remat", [f"{row.rows:g}, {row.config.compute.remat}" for row in rows]),
        ("memory, estimated, GiB", [f"{row.memory / 2**30:,.1f} of {row.topology.chip.memory_gib:g}" for row in rows]),
        ("compute, s", [f"{row.compute:.3f}" for row in rows]),
        ("memory traffic, s", [f"{row.traffic:.3f}" for row in rows]),
        ("links of a slice or node, s", [f"{row.links:.3f}" for row in rows]),
        ("between slices or nodes, s", [f"{row.between:.3f}" for row in rows]),
        ("step at least, s", [f"**{row.bound:.3f}**" for row in rows]),
        ("whole run at least, days", [f"{row.bound * STEPS / 86400:,.1f}" for row in rows]),
        (f"whole run at {MFU:.0%} MFU, days", [f"**{row.days:,.1f}**" for row in rows]),
        ("tokens/s then", [f"{row.tokens_per_second:,.0f}" for row in rows]),
        ("chip hours then", [f"{row.days * 24 * row.topology.chips:,.0f}" for row in rows]),
        ("checkpoint, GiB", [f"{saved(row) / 2**30:,.1f}" for row in rows]),
        ("steps held up by a save, s", [f"{saved(row) / row.topology.hosts / COPY_BANDWIDTH:.2f}" for row in rows]),
        ("written and checked during the steps, s", [f"{save(row):.1f}" for row in rows]),
        ("checked before a restart, s", [f"{saved(row) / DISK_BANDWIDTH:.0f}" for row in rows]),
        ("data read, MB/s in all", [f"{row.tokens_per_second * 4 / 1e6:,.1f}" for row in rows]),
    ]
    names = [row.topology.name for row in rows]
    return ["|  | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names),
            *(f"| {name} | " + " | ".join(values) + " |" for name, values in columns)]


def saved(row: Row) -> int:
    """Bytes of a resumable checkpoint."""
    return checkpoint_bytes(row.config)["resumable"]


def save(row: Row) -> float:
    """Seconds until a save counts."""
    return save_seconds(saved(row), machines=row.topology.hosts, write=DISK_BANDWIDTH)


def arithmetic(row: Row) -> list[str]:
    """The figures of one column, step by step."""
    config, topology, chip = row.config, row.topology, row.topology.chip
    parameters, fsdp = count_parameters(config.model), row.mesh["fsdp"]
    passes = 4 if config.compute.remat == "ffn" else 3
    flops = row.compute * chip.peak_flops * topology.devices
    return [
        f"compute   {flops / config.batch.tokens / 1e9:.2f} GFLOPs a token x {config.batch.tokens:,} tokens"
        f" / ({topology.devices} x {chip.peak_flops / 1e12:.0f} T) = {row.compute:.3f} s",
        f"links     {passes} x 2 bytes x {parameters:,} x {fsdp - 1}/{fsdp} / {chip.link_bandwidth / 1e9:.0f} GB/s"
        f" = {row.links:.3f} s   ({passes - 1} gathers of the weights, one scatter of the gradients)",
        f"run       {STEPS:,} steps x {row.bound:.3f} s = {row.bound * STEPS / 86400:.1f} days at least;"
        f" at {MFU:.0%} MFU {row.days:.1f} days",
        f"save      3 x 4 bytes x {parameters:,} = {saved(row) / 2**30:.1f} GiB over {topology.hosts} hosts:"
        f" {saved(row) / topology.hosts / COPY_BANDWIDTH:.2f} s to their memory at {COPY_BANDWIDTH / 1e9:.0f} GB/s,"
        f" then {save(row):.1f} s to write at {DISK_BANDWIDTH / 1e9:.0f} GB/s each and for checksums of what each wrote"
        f" ({CHECKSUM_SECONDS} s a GiB)",
        f"restart   the first process compares the whole step with its checksums (checkpoint.verify=full):"
        f" {saved(row) / 1e9:.1f} GB / {DISK_BANDWIDTH / 1e9:.0f} GB/s = {saved(row) / DISK_BANDWIDTH:.0f} s;"
        " size compares sizes only",
        f"data      {row.tokens_per_second:,.0f} tokens/s x 4 bytes = {row.tokens_per_second * 4 / 1e6:.1f} MB/s,"
        f" {row.tokens_per_second * 4 / topology.hosts / 1e3:.0f} kB/s a host",
    ]


def changes(small: list[Row], large: list[Row], unchanged: list[Row]) -> list[str]:
    """Describe the changes at ten times the size; `unchanged` has the larger model with the smaller one's settings."""
    times = ", ".join(f"{before.topology.name} {after.days / before.days:.1f}"
                      for before, after in zip(small, large, strict=True))
    share = ", ".join(f"{after.topology.name} {max(after.links, after.between) / after.compute:.0%}"
                      f" (was {max(before.links, before.between) / before.compute:.0%})"
                      for before, after in zip(small, large, strict=True))
    memory = ", ".join(f"{row.topology.name} {row.memory / 2**30:,.0f} GiB of {row.topology.chip.memory_gib:g}"
                       for row in unchanged)
    size = saved(large[0])
    return [
        "What changes:",
        f"- Time at the same MFU grows with the FLOPs: {times} times.",
        f"- Communication time as a share of compute time: {share}. Both grow alike while the batch"
        " stays the same, so the share moves with the mesh more than with the size.",
        f"- Under the settings of the smaller model a device would need {memory}, which does not fit, or leaves too"
        " little for memory that the estimate does not count; hence more recomputation, and on H100 parameters sharded"
        " over eight nodes, whose weights then go through the network too.",
        f"- A checkpoint of {size / 2**30:,.0f} GiB is written during the steps, and must be finished before the next"
        f" one: on {large[0].topology.name} after {save(large[0]):.1f} s. A restart reads it whole on the first host:"
        f" {size / DISK_BANDWIDTH:.0f} s at 1 GB/s, or none with `checkpoint.verify=size`.",
        "- The batch of 2 M tokens is small for that size; a larger one can use more devices.",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PAGE)
    target = parser.parse_args().output
    target.write_text(render(), encoding="utf-8")
    print(target)
