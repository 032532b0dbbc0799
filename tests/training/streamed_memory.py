"""How much memory an import and an export take beyond what the process has before: `python … FOLDER`, prints JSON.

The model has seven parameters of equal size, the stacks of one projection over all layers, and little else.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from ctllm_jax.config.model import ModelConfig
from ctllm_jax.huggingface.architecture import describe_architecture
from ctllm_jax.huggingface.layout import pieces
from ctllm_jax.huggingface.shards import ShardWriter
from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint
from ctllm_jax.training.conversion import export_model, import_model
from ctllm_jax.training.tuning import open_text


def make(folder, tokenizer, layers):
    config = ModelConfig(vocab_size=512, hidden_size=512, num_layers=layers, num_heads=4, num_kv_heads=4, head_dim=128,
                         ffn_size=512)
    folder.mkdir()
    writer = ShardWriter(folder, [(piece.name, piece.matrix, np.dtype(np.float32)) for piece in pieces(config)],
                         shard_bytes=10**8)
    draw = np.random.default_rng(0)
    for piece in pieces(config):
        writer.write(piece.name, draw.standard_normal(piece.matrix, dtype=np.float32))
    writer.close()
    described = describe_architecture(config, rows=512, dtype="float32", ids={})
    (folder / "config.json").write_text(json.dumps(described))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return writer.total_bytes, 512 * 512 * 4 * layers


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_of(work):
    """Bytes that the process grew by at most."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    work()
    return resident("VmHWM") - before


def convert(folder, source):
    _, kept = find_checkpoint(str(folder / "run"))
    tokenizer, template = open_text(kept)
    export_model(kept, folder / "out", tokenizer=tokenizer, template=template, dtype="bfloat16", shard_bytes=10**8)


def main(folder, tokenizer):
    for name, layers in (("small", 1), ("large", 24)):  # the small one for what is loaded and compiled once
        place = folder / name
        place.mkdir()
        total, largest = make(place / "hf", tokenizer, layers)
        found = {"model": total, "largest": largest,
                 "import": peak_of(lambda place=place: import_model(place / "hf", place / "run")),
                 "export": peak_of(lambda place=place: convert(place, place / "hf"))}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
