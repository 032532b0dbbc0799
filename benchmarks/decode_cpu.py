"""Tokens a second of generation on CPU: our engine beside transformers' generate on the same weights.

    python benchmarks/decode_cpu.py [--threads N] [--rounds N] [--model RUN]

A Llama of 10.1M parameters (or a MODEL of ours), float32, prompts of 32 random tokens, 96 new tokens each, for 1 and
for 16 rows at once; greedy, and drawn with temperature 0.8 and top-p 0.95. Both take turns in one process, so that what
else the machine does hits both alike; medians over the rounds. Greedy texts of both must be equal, or the two did not
do the same. The result is printed and written to benchmarks/results/. Needs the extra `parity`, and a machine that does
nothing else.
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
from types import SimpleNamespace

import numpy as np
from data_loading import cpu_name
from train_step_cpu import SETTINGS, to_transformers

# As a user's shell: one CPU device. Set before jax is imported, which is inside of the functions.
os.environ["JAX_PLATFORMS"] = "cpu"

ROWS, PROMPT, NEW = (1, 16), 32, 96
WAYS = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 0.8, "top_p": 0.95}}
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")


def load(name: str | None) -> tuple[object, dict]:
    """(decoder, weights) of a MODEL, or of random ones."""
    import jax

    from ctllm_jax.config.pretrain import PretrainConfig
    from ctllm_jax.inference.model import load_model
    from ctllm_jax.model.decoder import Decoder, init_params

    if name is not None:
        model = load_model(name)
        return model.decoder, model.params
    config = PretrainConfig.model_validate(SETTINGS).model
    # Larger weights than training starts from, so that texts have turns and no token is a tie.
    params = jax.tree.map(lambda weight: weight * (4 if weight.ndim > 2 else 1), init_params(config, jax.random.key(0)))
    return Decoder(config), params


def make_ours(decoder: object, params: dict, rows: int) -> Callable[..., list[list[int]]]:
    """`(prompts, way) -> new tokens` of our engine."""
    from ctllm_jax.inference.engine import Engine
    from ctllm_jax.inference.request import Request

    engine = Engine(decoder, params, slots=rows, max_length=PROMPT + NEW)

    def write(prompts: np.ndarray, way: dict) -> list[list[int]]:
        requests = [Request(prompt=tuple(prompt.tolist()), max_tokens=NEW, row=row, **way)
                    for row, prompt in enumerate(prompts)]
        return [[token.id for token in tokens] for tokens, _, _ in engine.run(requests)]

    return write


def make_theirs(decoder: object, params: dict) -> Callable[..., list[list[int]]]:
    """The same of transformers."""
    import jax
    import torch

    llama = to_transformers(SimpleNamespace(model=decoder.config), jax.device_get(params)).eval()
    llama.generation_config.eos_token_id = None
    padded = list(range(decoder.config.vocab_size, decoder.config.padded_vocab_size)) or None

    def write(prompts: np.ndarray, way: dict) -> list[list[int]]:
        options = {"do_sample": False} if way["temperature"] == 0 else {"do_sample": True, "top_k": 0, **way}
        tokens = torch.tensor(prompts).long()
        with torch.inference_mode():
            out = llama.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=NEW,
                                 pad_token_id=0, use_cache=True, suppress_tokens=padded, **options)
        return out[:, prompts.shape[1]:].tolist()

    return write


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--model", help="a run directory or RUN@STEP; default: random weights")
    parser.add_argument("--output", type=Path, help="default: results/decode_cpu.json")
    arguments = parser.parse_args()
    # XLA makes as many threads as the process may use processors.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:arguments.threads])
    import torch

    torch.set_num_threads(arguments.threads)
    decoder, params = load(arguments.model)
    theirs = make_theirs(decoder, params)
    result: dict[str, object] = {}
    for rows in ROWS:
        prompts = np.random.default_rng(0).integers(0, decoder.config.vocab_size, (rows, PROMPT))
        writers = {"ours": make_ours(decoder, params, rows), "transformers": theirs}
        for name, way in WAYS.items():
            walls: dict[str, list[float]] = {each: [] for each in writers}
            texts = {}
            for turn in range(-1, arguments.rounds):  # the first one compiles and warms up
                for each, write in writers.items():
                    began = time.perf_counter()
                    texts[each] = write(prompts, way)
                    if turn >= 0:
                        walls[each].append(time.perf_counter() - began)
                    time.sleep(0.1)  # the threads of the one stop spinning before the other begins
            if name == "greedy" and texts["ours"] != texts["transformers"]:
                raise RuntimeError("the greedy texts differ: the two did not do the same")
            speeds = {each: rows * NEW / statistics.median(walls[each]) for each in walls}
            ratio = statistics.median(b / a for a, b in zip(walls["ours"], walls["transformers"], strict=True))
            result[f"{name}_{rows}"] = {"tokens_per_second": speeds, "ratio": ratio, "seconds": walls}
            print(f"{name}, {rows} rows: ours {speeds['ours']:,.0f} tokens/s, transformers "
                  f"{speeds['transformers']:,.0f}; ratio {ratio:.2f}")
    result |= {
        "model": arguments.model or "random weights", "parameters": sum(leaf.size for leaf in _leaves(params)),
        "prompt_tokens": PROMPT, "new_tokens": NEW, "device": cpu_name(), "threads": arguments.threads,
        "load_average": os.getloadavg()[0], "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "command": shlex.join(["python", "benchmarks/decode_cpu.py", *sys.argv[1:]])}
    output = arguments.output or Path(__file__).parent / "results" / "decode_cpu.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {output}")


def _leaves(tree: dict) -> list:
    return [leaf for node in tree.values() for leaf in (_leaves(node) if isinstance(node, dict) else [node])]


if __name__ == "__main__":
    main()
