"""Instruction bundles of our TPU attention beside JAX's splash attention, at the same block sizes, by TPU's compiler.

    python benchmarks/kernel_bundles.py [--chips v5e v6e ...] [--block 512] [--length 4096] [--output FILE]

Both are compiled ahead of time for packed causal rows, head dim 128, bfloat16, and the compiler leaves its final
schedules. A bundle is what a core issues in one cycle if nothing stalls: good for comparing two kernels on one chip, no
speed, blind to copies and to how often a loop runs. What is counted is the code that meets one block of queries with
one block of keys. Splash compares segments in each; ours does where a document ends or the diagonal crosses. Needs the
pip extra tpu, and no TPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
HEADS, HEAD_DIM = 2, 128
OURS = {"forward": "attention_forward", "backward": "attention_backward"}
SPLASH = {"forward": "splash_mha_fwd", "backward": "splash_mha_dkv"}


def count_regions(path: Path) -> list[int]:
    """Bundles of each stretch of a schedule that no loop or branch cuts, longest first."""
    stretches, depth = [], None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = re.match(r"\s*0x[0-9a-f]+\s+(\w\w)?\s*: ?(>*) ?\{", line)
        if not found:
            continue
        if found.group(1) or len(found.group(2)) != depth or not stretches:
            stretches.append(0)
        depth = len(found.group(2))
        stretches[-1] += 1
    return sorted(stretches, reverse=True)


def schedules(folder: Path, kernel: str) -> list[int]:
    """The stretches of the newest schedule of a kernel."""
    paths = [path for path in folder.glob(f"*{kernel}*final_bundles.txt") if "schedule-analysis" not in path.name]
    return count_regions(max(paths, key=lambda path: path.stat().st_mtime))


def compile_ours(device, *, block: int, length: int):
    """Both passes with one size of block for everything; (forward, backward) compiled."""
    from ctllm_jax.kernels.attention import make_request
    from ctllm_jax.kernels.attention.cases import compile_cases
    from ctllm_jax.kernels.attention.tpu_blocks import Blocks, find_chip

    request = make_request(length=length, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM)._replace(
        platform="tpu", device_kind=device.device_kind)
    # What is held in VMEM changes no bundle of the inner loop.
    blocks = Blocks(block, block, 2048, block, block, 2048)
    return [case.lower().compile() for case in compile_cases(request, find_chip(device.device_kind), device,
                                                             blocks=blocks)]


def compile_splash(device, *, block: int, length: int):
    """Splash attention's gradient, with its fused backward pass."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import SingleDeviceSharding

    sizes = splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
                              block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True)
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(HEADS)])
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def gradients(query, key, value, ids, cotangent):
        function = jax.vmap(lambda query, key, value, ids: kernel(query, key, value, splash.SegmentIds(ids, ids)))
        return jax.vjp(lambda *inputs: function(*inputs, ids), query, key, value)[1](cotangent)

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    array = abstract((1, HEADS, length, HEAD_DIM), jnp.bfloat16)
    return jax.jit(gradients).lower(array, array, array, abstract((1, length), jnp.int32), array).compile()


def measure(chip: str, folder: Path, *, block: int, length: int) -> dict[str, dict[str, float | None]]:
    """The columns of one chip."""
    from ctllm_jax.kernels.topology import find_topology

    device = find_topology(chip)[0]
    compile_ours(device, block=block, length=length)
    compile_splash(device, block=block, length=length)
    ours, theirs = {}, {}
    for way in OURS:
        bodies = schedules(folder, OURS[way])[:2]
        ours |= {f"{way}, a block seen whole": min(bodies), f"{way}, a block with a mask": max(bodies)}
        splash = schedules(folder, SPLASH[way])[0]
        theirs |= {f"{way}, a block seen whole": splash, f"{way}, a block with a mask": splash}
    return {"ours": ours, "splash": theirs, "ours / splash": {name: ours[name] / theirs[name] for name in ours}}


def main() -> int:
    """Compile, count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=["v4", "v5e", "v5p", "v6e", "tpu7x"])
    parser.add_argument("--block", type=int, default=512, help="queries, and keys, of a block")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "kernel_bundles.json")
    arguments = parser.parse_args()
    sections = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
                       "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"}
        for chip in arguments.chips:
            sections[chip] = measure(chip, Path(folder), block=arguments.block, length=arguments.length)
            print(chip, json.dumps(sections[chip], indent=1), flush=True)
            for path in Path(folder).iterdir():
                path.unlink()
            result = {"sections": sections, "device": "TPU chips that were not there: compiled ahead of time",
                      "flags": {"block": arguments.block, "length": arguments.length, "head_dim": HEAD_DIM},
                      "python": platform.python_version(), "date": date.today().isoformat(),
                      "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")},
                      "command": shlex.join(["python", "benchmarks/kernel_bundles.py", *sys.argv[1:]])}
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
