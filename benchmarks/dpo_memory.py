"""Memory of a DPO step of the 2B model on each device, compiled for chips that are not here, beside a two-model step.

    python benchmarks/dpo_memory.py [--tpu v5p:2x2x1] [--no-gpu | --gpu-target FILE]

The step is that of configs/ct_llm_2b/dpo.yaml: a row of 4,096 tokens a device at a time, with both answers of a pair in
it. Beside it are compiled, from the same parts: the step that holds the reference model too and runs it on every batch,
as is usual elsewhere; the step whose head makes whole logits; and the pass that computes our reference before training.
The figures are the compilers' own, nothing runs.

The TPU part needs the extra `tpu`, the GPU part what ctllm_jax/cluster/gpu_target.py names. About two minutes a step on
two cores for the TPU, a quarter of one for a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_loading import cpu_name

# Set before jax is imported, which is inside of the functions: its compilers are asked, no device is looked for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

GIB = 2**30
GROUPS = ("en", "zh")
# How the reference model and the logits are held, by name of the column.
STEPS = {
    "ours": {},
    "two models": {"reference_dtype": "float32"},
    "two models, reference in bfloat16": {"reference_dtype": "bfloat16"},
    "ours with whole logits": {"whole_logits": True},
}
# Four rows do not divide into eight parts: the config's batch takes tensor parallelism there, or is doubled.
GPUS = {1: [[]], 8: [["mesh.tensor=2"], ["batch.tokens=32768"]]}


def make_config(*overrides: str) -> Any:
    """configs/ct_llm_2b/dpo.yaml with what a run would take from its checkpoint and its data."""
    from ctllm_jax.config.dpo import DPOConfig
    from ctllm_jax.config.load import load
    from ctllm_jax.config.pretrain import PretrainConfig
    from ctllm_jax.training.tuning import completed

    model = load(PretrainConfig, target="ct_llm_2b/pretrain").model
    kernels = ["compute.attention=xla", "compute.swiglu=xla"]
    config = load(DPOConfig, target="ct_llm_2b/dpo", overrides=[*kernels, *overrides])
    return completed(config, model=model.model_dump(), steps=1000)


def make_objective(config: Any, *, reference_dtype: str | None = None, whole_logits: bool = False) -> Any:
    """DPO's objective; with a `reference_dtype` the reference model is `frozen`, and runs inside the step."""
    from ctllm_jax.training.dpo import describe, make_loss_fn
    from ctllm_jax.training.objective import Objective
    from ctllm_jax.training.reference import answer_logps

    def make(config, decoder, mesh):
        import jax

        from ctllm_jax.losses.preference import Answers, pair_logps, preference_loss

        if not whole_logits and reference_dtype is None:
            return make_loss_fn(config, decoder, mesh=mesh, groups=GROUPS)
        logps_of = partial(whole_logps if whole_logits else answer_logps, config=config, mesh=mesh)

        def loss_fn(params, frozen, batch):
            known = batch.preference
            logps, lengths = logps_of(decoder, params, batch)
            reference_logps = known.reference_logps
            if reference_dtype is not None:
                reference_logps, _ = jax.lax.stop_gradient(logps_of(decoder.clone(remat="none"), frozen, batch))
            sides = pair_logps(Answers(logps, lengths, reference_logps), known.pair_ids, known.is_chosen)
            return preference_loss(*sides[:2], **config.loss.model_dump(), weights=sides[2], group=known.group,
                                   groups=GROUPS)

        return loss_fn

    return Objective(make, describe, num_segments=2 * config.data.pairs_per_row)


def whole_logps(decoder: Any, params: Any, batch: Any, *, config: Any, mesh: Any) -> tuple[Any, Any]:
    """What `answer_logps` gives, from [B, S, V] logits in float32."""
    import jax
    import jax.numpy as jnp

    from ctllm_jax.model.decoder import head_weights

    hidden_BSD, _ = decoder.apply({"params": params}, batch.tokens, batch.segment_ids, batch.positions)
    head_DV = head_weights(params).astype(hidden_BSD.dtype)
    logits_BSV = jnp.einsum("BSD,DV->BSV", hidden_BSD, head_DV, preferred_element_type=jnp.float32)
    logits_BSV = jnp.where(jnp.arange(logits_BSV.shape[-1]) < config.model.vocab_size, logits_BSV, -1e30)
    picked_BS = jnp.take_along_axis(logits_BSV, batch.targets[:, :, None], axis=2)[:, :, 0]
    logps_BS = batch.loss_weights * (picked_BS - jax.nn.logsumexp(logits_BSV, axis=2))
    segments = jnp.arange(1, batch.preference.pair_ids.shape[1] + 1)
    is_mine_BSM = batch.segment_ids[:, :, None] == segments
    return tuple(jnp.sum(jnp.where(is_mine_BSM, x_BS[:, :, None], 0.0), axis=1)
                 for x_BS in (logps_BS, batch.loss_weights))


def measure_step(config: Any, mesh: Any, options: dict[str, Any]) -> dict[str, float]:
    """GiB on each device by kind, of one entry of STEPS."""
    import jax
    import jax.numpy as jnp

    from ctllm_jax.training.run import plan_step

    plan = plan_step(config, mesh, objective=make_objective(config, **options))
    frozen = None
    if options.get("reference_dtype"):
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(options["reference_dtype"]),
                                                             sharding=x.sharding), plan.abstract_state.params)
    state = plan.abstract_state
    return measure(lambda: plan.jitted.lower(state, plan.abstract_batch, frozen).compile(),
                   parameters=state.params, optimizer=state.opt_state, reference_model=frozen or {},
                   batch=plan.abstract_batch)


def measure_reference_pass(config: Any, mesh: Any) -> dict[str, float]:
    """The same of the pass that computes the reference's log-probabilities, before there is a state."""
    import jax

    from ctllm_jax import sharding
    from ctllm_jax.training.reference import answer_logps
    from ctllm_jax.training.run import make_decoder, plan_step

    plan = plan_step(config, mesh, objective=make_objective(config))
    decoder = make_decoder(config, mesh).clone(remat="none")
    jitted = jax.jit(lambda params, batch: answer_logps(decoder, params, batch, config=config, mesh=mesh)[0],
                     out_shardings=sharding.replicated(mesh))
    params = plan.abstract_state.params
    return measure(lambda: jitted.lower(params, plan.abstract_batch).compile(), reference_model=params,
                   batch=plan.abstract_batch)


def measure(compile_step: Callable, **kinds: Any) -> dict[str, float]:
    """`kinds` are trees of abstract arguments; what the compiler says of all of them must be their sum."""
    found = compile_step().memory_analysis()
    sizes = {name: bytes_on_a_device(tree) for name, tree in kinds.items()}
    # Paddings of small arrays aside.
    if abs(found.argument_size_in_bytes - sum(sizes.values())) > 0.01 * sum(sizes.values()):
        raise RuntimeError(f"the compiler counts {found.argument_size_in_bytes} bytes of arguments, which are {sizes}")
    peak = (found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
            + found.temp_size_in_bytes)
    return {**{f"{name}_GiB": size / GIB for name, size in sizes.items() if name != "batch"},
            "temporaries_GiB": found.temp_size_in_bytes / GIB, "peak_GiB": peak / GIB}


def bytes_on_a_device(tree: Any) -> int:
    """What one device holds of a tree of shapes with shardings."""
    import jax
    import numpy as np

    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure_all(chips: str, devices: Any, overrides: Sequence[str] = ()) -> dict[str, dict[str, dict[str, float]]]:
    """One table, by its heading."""
    from ctllm_jax import sharding

    config = make_config(*overrides)
    mesh = sharding.make_mesh(config.mesh.model_dump(), devices)
    title = (f"{chips}, fsdp {mesh.shape['fsdp']} x tensor {mesh.shape['tensor']}, {config.batch.rows} pairs a step")
    print(title)
    columns = {}
    for name in (*STEPS, "ours, reference pass"):
        columns[name] = (measure_step(config, mesh, STEPS[name]) if name in STEPS else
                         measure_reference_pass(config, mesh))
        print(f"  {name}: {columns[name]['peak_GiB']:.2f} GiB", flush=True)
    return {title: columns}


def write(output: Path, section: dict[str, Any]) -> None:
    """Add a table to the result, where others stay: the TPU's and the GPU's may be made on different machines."""
    sections = json.loads(output.read_text(encoding="utf-8"))["sections"] if output.exists() else {}
    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-pjrt", "nvidia-cuda-nvcc"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    result = {"sections": sections | section, "figures": {"parameters": 2_134_509_568, "sequence_length": 4096},
              "device": f"compiled on {cpu_name()}", "python": platform.python_version(), "versions": versions,
              "flags": {"compute": "bfloat16", "state": "float32", "remat": "block", "kernels": "xla"},
              "command": "python benchmarks/dpo_memory.py"}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tpu", default="v5p:2x2x1", help="a slice of TPUs; empty: none")
    parser.add_argument("--no-gpu", action="store_true", help="no table for one and for eight H100")
    parser.add_argument("--gpu-target", type=Path, help="XLA's description of an H100 (.txtpb); none: ours")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "dpo_memory.json")
    arguments = parser.parse_args()
    from jax.experimental import topologies

    if arguments.tpu:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=arguments.tpu)
        write(arguments.output, measure_all(f"TPU {arguments.tpu}", chips.devices))
    from ctllm_jax.cluster.gpu_target import find_gpus

    description = arguments.gpu_target.read_text(encoding="utf-8") if arguments.gpu_target else None
    for count, meshes in ({} if arguments.no_gpu else GPUS).items():
        for overrides in meshes:
            write(arguments.output, measure_all(f"{count} x H100", find_gpus("h100", count, description=description),
                                                overrides))


if __name__ == "__main__":
    main()
