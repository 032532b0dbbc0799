"""Tokens a second of a whole train step on CPU: ours against transformers' LlamaForCausalLM with PyTorch's fused AdamW.

    python benchmarks/train_step_cpu.py [--dtype bfloat16] [--threads N] [--rounds N]

The same model (10.1M parameters, Llama), the same weights to start from, the same batches, clipping and AdamW; forward,
backward and update, eager PyTorch. Both take turns in one process, so that what else the machine does hits both alike;
medians over the rounds. Both losses are printed at the end: they must be equal, or the two did not do the same.
The result is printed and written to benchmarks/results/. Needs the extra `parity`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from data_loading import cpu_name

# As a user's shell: one CPU device. Set before jax is imported, which is inside of the functions.
os.environ["JAX_PLATFORMS"] = "cpu"

SETTINGS = {
    "steps": 10_000,
    "model": {
        "vocab_size": 7424,
        "hidden_size": 256,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_dim": 32,
        "ffn_size": 688,
        "context_length": 256,
    },
    "batch": {"tokens": 2048, "sequence_length": 256},
    "optimizer": {"lr": 3e-4, "schedule": "constant"},
    "data": {"kind": "synthetic"},
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


def make_ours(dtype: str, batches: list) -> tuple[Callable[[], float], dict[str, np.ndarray], object]:
    """(a function that takes the next step and gives its loss, the weights it starts from, the config)."""
    import jax

    from ctllm_jax import sharding
    from ctllm_jax.config.pretrain import PretrainConfig
    from ctllm_jax.data.batch import Batch
    from ctllm_jax.training.run import place_batch, plan_step

    config = PretrainConfig.model_validate(
        SETTINGS | {"compute": {"dtype": dtype, "remat": "none", "scan_layers": False, "loss_chunk": 1024}}
    )
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    plan = plan_step(config, mesh)
    compiled = plan.compile()
    state = plan.init(jax.random.key(0))
    weights = jax.device_get(state.params)
    rows, length = batches[0][0].shape
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length), np.int32)
    place = sharding.batch_sharding(mesh)
    losses = []

    def step() -> float:
        nonlocal state
        tokens, targets = batches[len(losses) % len(batches)]
        batch = place_batch(Batch(tokens, targets, ones.astype(np.float32), ones, positions), sharding=place, rows=rows)
        state, metrics = compiled(state, batch, None)
        losses.append(float(metrics["loss"]))
        return losses[-1]

    return step, weights, config


def to_transformers(config, weights: dict):
    """A LlamaForCausalLM with these weights of ours (numpy). `config.model`: the fields of ModelConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.padded_vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            rms_norm_eps=model.norm_eps,
            rope_theta=model.rope_theta,
            tie_word_embeddings=model.tie_embeddings,
            max_position_embeddings=model.context_length,
            attn_implementation="sdpa",
        )
    )
    tensors = {
        "model.embed_tokens.weight": weights["embedding"],
        "model.norm.weight": weights["final_norm"],
        "lm_head.weight": weights["embedding"] if model.tie_embeddings else weights["head"].T,
    }
    names = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for name, theirs in names.items():
        for layer, weight in enumerate(weights["blocks"][name]):
            if weight.ndim > 1:  # [in, out], where heads count as one dim
                weight = weight.reshape(-1, model.hidden_size) if name == "out" else weight.reshape(weight.shape[0], -1)
            tensors[f"model.layers.{layer}.{theirs}.weight"] = weight.T
    llama.load_state_dict({name: torch.tensor(np.ascontiguousarray(value)) for name, value in tensors.items()})
    return llama


def make_theirs(dtype: str, batches: list, weights: dict, config) -> Callable[[], float]:
    """A function that takes the next step and gives its loss."""
    import torch

    llama = to_transformers(config, weights).train()
    llama.config.use_cache = False
    decayed = [p for p in llama.parameters() if p.ndim > 1]
    others = [p for p in llama.parameters() if p.ndim == 1]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        fused=True,
    )
    done = 0

    def step() -> float:
        nonlocal done
        tokens, targets = (torch.tensor(x).long() for x in batches[done % len(batches)])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = llama(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        return loss.item()

    return step


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matmuls (autocast there)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--output", type=Path, help="default: results/train_step_cpu.json, or -bfloat16 of it")
    arguments = parser.parse_args()
    # XLA makes as many threads as the process may use processors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    import torch

    torch.set_num_threads(arguments.threads)
    draw = np.random.default_rng(0)
    rows, length = (
        SETTINGS["batch"]["tokens"] // SETTINGS["batch"]["sequence_length"],
        SETTINGS["batch"]["sequence_length"],
    )
    streams = draw.integers(0, SETTINGS["model"]["vocab_size"], (8, rows, length + 1)).astype(np.int32)
    batches = [(stream[:, :-1].copy(), stream[:, 1:].copy()) for stream in streams]
    ours, weights, config = make_ours(arguments.dtype, batches)
    theirs = make_theirs(arguments.dtype, batches, weights, config)

    walls, cpus, losses = {"ours": [], "theirs": []}, {"ours": [], "theirs": []}, {"ours": [], "theirs": []}
    for turn in range(-1, arguments.rounds):  # the first one warms up
        for name, step in (("ours", ours), ("theirs", theirs)):
            began, cpu_began = time.perf_counter(), time.process_time()
            losses[name] += [step() for _ in range(arguments.steps)]
            if turn >= 0:
                walls[name].append((time.perf_counter() - began) / arguments.steps)
                cpus[name].append((time.process_time() - cpu_began) / arguments.steps)
            time.sleep(0.1)  # the threads of the one stop spinning before the other begins
    apart = max(abs(mine - other) for mine, other in zip(losses["ours"], losses["theirs"], strict=True))
    if apart > (2e-3 if arguments.dtype == "float32" else 5e-2):
        raise RuntimeError(f"the losses are {apart:.4f} nats apart: the two did not do the same")

    tokens = config.batch.tokens
    result = {
        name: {
            "tokens_per_second": tokens / statistics.median(walls[name]),
            "tokens_per_cpu_second": tokens / statistics.median(cpus[name]),
            "step_seconds": walls[name],
            "last_loss": losses[name][-1],
        }
        for name in walls
    }
    result |= {
        "ratio": statistics.median(other / mine for mine, other in zip(walls["ours"], walls["theirs"], strict=True)),
        "cpu_ratio": statistics.median(other / mine for mine, other in zip(cpus["ours"], cpus["theirs"], strict=True)),
        "losses_apart": apart,
        "parameters": sum(x.size for x in _leaves(weights)),
        "rows": rows,
        "sequence_length": length,
        "dtype": arguments.dtype,
        "device": cpu_name(),
        "threads": arguments.threads,
        "load_average": os.getloadavg()[0],
        "flags": {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "command": shlex.join(["python", "benchmarks/train_step_cpu.py", *sys.argv[1:]]),
    }
    suffix = "" if arguments.dtype == "float32" else f"_{arguments.dtype}"
    output = arguments.output or Path(__file__).parent / "results" / f"train_step_cpu{suffix}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    print(
        f"{result['parameters'] / 1e6:.1f}M parameters, {arguments.threads} threads, {arguments.dtype}: ours "
        f"{result['ours']['tokens_per_second']:,.0f} tokens/s, PyTorch {result['theirs']['tokens_per_second']:,.0f}; "
        f"ratio {result['ratio']:.2f} ({result['cpu_ratio']:.2f} by CPU seconds)"
    )


def _leaves(tree: dict) -> list[np.ndarray]:
    return [leaf for node in tree.values() for leaf in (_leaves(node) if isinstance(node, dict) else [node])]


if __name__ == "__main__":
    main()
