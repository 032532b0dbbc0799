"""Peak memory and time of a 2B model's way in from Hugging Face's layout and out again, each command a process.

    python benchmarks/conversion.py TOKENIZER [--config CONFIG] [--scratch FOLDER]

Random weights of configs/ct_llm_2b/pretrain.yaml in float32 (8.5 GB, written a tensor at a time) with a SentencePiece
model of yours, which must not have more pieces than the config; then `import-hf`, `export-hf` of the run, and
`export-hf dtype=bfloat16 padding=cut`. The exported files must be the first ones, byte for byte. Memory is what the
kernel says that the process held at most; CPU seconds say more than the clock where others use the machine. Needs
35 GB of disk in the scratch folder, which is emptied.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from data_loading import cpu_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "numpy", "orbax-checkpoint", "tensorstore")


def make(folder: Path, config: str, tokenizer: Path) -> tuple[int, int]:
    """A folder of random weights; its bytes, and those of the largest parameter (a projection of all layers)."""
    from ctllm_jax.config.load import load
    from ctllm_jax.config.pretrain import PretrainConfig
    from ctllm_jax.huggingface.architecture import describe_architecture
    from ctllm_jax.huggingface.layout import pieces
    from ctllm_jax.huggingface.shards import ShardWriter
    from ctllm_jax.model.parameters import decoder_parameters

    model = load(PretrainConfig, target=config, overrides=["data=synthetic"]).model
    folder.mkdir()
    table = pieces(model)
    writer = ShardWriter(folder, [(piece.name, piece.matrix, np.dtype(np.float32)) for piece in table],
                         shard_bytes=5 * 10**9)
    draw = np.random.default_rng(0)
    for piece in table:
        writer.write(piece.name, draw.standard_normal(piece.matrix, dtype=np.float32))
    writer.close()
    described = describe_architecture(model, rows=model.padded_vocab_size, dtype="float32", ids={})
    (folder / "config.json").write_text(json.dumps(described))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    parameters = decoder_parameters(model)
    leaves = [*parameters.pop("blocks").values(), *parameters.values()]
    return writer.total_bytes, max(4 * int(np.prod(leaf.shape)) for leaf in leaves)


def run(*words: str) -> dict[str, float]:
    """A command of launch.py: GiB at its peak, CPU seconds, seconds."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / "launch.py"), *words],
                               env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{shlex.join(words)}: status {os.waitstatus_to_exitcode(status)}")
    return {"peak_gib": usage.ru_maxrss / 2**20, "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "seconds": time.perf_counter() - began}


def digests(folder: Path) -> dict[str, str]:
    """Of the weights' files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="a SentencePiece model")
    parser.add_argument("--config", default="ct_llm_2b/pretrain")
    parser.add_argument("--scratch", type=Path, help="default: a temporary folder")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "conversion.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        total, largest = make(scratch / "hf", arguments.config, arguments.tokenizer)
        figures = {"import-hf": run("import-hf", str(scratch / "hf"), f"output={scratch / 'run'}")}
        expected = digests(scratch / "hf")
        shutil.rmtree(scratch / "hf")
        figures["export-hf"] = run("export-hf", str(scratch / "run"), f"output={scratch / 'out'}", "dtype=float32")
        equal = digests(scratch / "out") == expected
        shutil.rmtree(scratch / "out")
        figures["export-hf dtype=bfloat16 padding=cut"] = run(
            "export-hf", str(scratch / "run"), f"output={scratch / 'half'}", "dtype=bfloat16", "padding=cut")
    for command, each in figures.items():
        above = each["peak_gib"] - largest / 2**30
        print(f"{command:40} peak {each['peak_gib']:.2f} GiB ({above:.2f} above the largest parameter), "
              f"CPU {each['cpu_seconds']:.0f} s, {each['seconds']:.0f} s")
    print(f"exported files are the imported ones, byte for byte: {equal}")
    result = {"figures": {"weights_gb": total / 1e9, "largest_parameter_gib": largest / 2**30,
                          "files_came_back_byte_for_byte": equal,
                          **{f"{part}": {command: each[part] for command, each in figures.items()}
                             for part in ("peak_gib", "cpu_seconds", "seconds")}},
              "device": cpu_name(), "python": platform.python_version(), "load_average": os.getloadavg()[0],
              "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
              "command": shlex.join(["python", "benchmarks/conversion.py", *sys.argv[1:]])}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
