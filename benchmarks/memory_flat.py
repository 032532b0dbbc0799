"""Does a long run keep its memory? The debug run, 3,000 steps with 100 checkpoints, watched from outside.

    python benchmarks/memory_flat.py [steps=3000] [saves=100] [arenas=2]        # some two minutes on two cores

The resident memory (VmRSS of /proc) of the whole command, `launch.py pretrain`, is read four times a second beside the
step of its status.json. Compared are the medians over the second third of the steps and over the last tenth: the first
third is left out because compiling, the first checkpoints and the caches of the allocator belong to it. Exit status 1:
they differ by more than 2 %.

glibc gives every thread an arena of its own and takes little back from it; each save has new threads. With two arenas
(MALLOC_ARENA_MAX=2) what is measured is what the program keeps; arenas=0 leaves the allocator its own ways.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.02


def resident_mib(pid: int) -> float | None:
    """Resident memory of a process; None when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), None)


def watch(run_dir: Path, *, steps: int, saves: int, arenas: int) -> list[tuple[int, float]]:
    """(step, resident MiB) of a run from its beginning to its end."""
    command = [sys.executable, str(ROOT / "launch.py"), "pretrain", "debug/pretrain", f"run.dir={run_dir}",
               f"steps={steps}", f"checkpoint.every={steps // saves}", "log.every=10"]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(ROOT)}
    if arenas:
        environment["MALLOC_ARENA_MAX"] = str(arenas)
    samples = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None:
            memory = resident_mib(process.pid)
            try:
                step = json.loads((run_dir / "status.json").read_text())["step"]
            except (OSError, ValueError):
                step = 0
            if memory is not None:
                samples.append((step, memory))
            time.sleep(0.25)
    if process.returncode:
        sys.exit(f"the run ended with status {process.returncode}")
    return samples


def main() -> int:
    """Run, print the medians, and say whether they are equal enough."""
    given = dict(word.split("=") for word in sys.argv[1:])
    steps, saves, arenas = (int(given.get(name, default)) for name, default in
                            (("steps", 3000), ("saves", 100), ("arenas", 2)))
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        began = time.monotonic()
        samples = watch(run_dir, steps=steps, saves=saves, arenas=arenas)
        events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    saved = sum(event["event"] == "checkpoint" for event in events)
    parts = {"first third": (1, steps // 3), "second third": (steps // 3, 2 * steps // 3),
             "last third": (2 * steps // 3, steps), "last tenth": (steps - steps // 10, steps)}
    medians = {}
    for name, (start, stop) in parts.items():
        values = [memory for step, memory in samples if start <= step < stop]
        medians[name] = median(values)
        print(f"{name:>12}: {medians[name]:8.1f} MiB (median of {len(values)} readings, at most {max(values):.1f})")
    growth = medians["last tenth"] / medians["second third"] - 1
    print(f"{steps:,} steps, {saved} checkpoints, {time.monotonic() - began:.0f} s: {growth:+.2%} from the second third"
          f" to the last tenth (limit {LIMIT:.0%})")
    return int(growth > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
